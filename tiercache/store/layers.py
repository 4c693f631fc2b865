"""Chooses the codes of one layer: rounded, calibrated, or calibrated and tuned.

Knows planned units and the calibration text in the model; not where the bytes go, nor what a journal is.
"""

from collections.abc import Iterator
from dataclasses import replace

from tiercache.quant import tune
from tiercache.quant.gptq import LayerMoments
from tiercache.quant.tune import CodedPiece
from tiercache.store import encode
from tiercache.store.activations import TextPass
from tiercache.store.encode import ReadTensor
from tiercache.store.layout import UnitPlan
from tiercache.store.reader import Buffer

UnitBytes = tuple[UnitPlan, Iterator[dict[str, Buffer]], str]
"""A unit, its bytes as in `encode.rounded_chunks`, and what `PlaneWeight.inputs` will say."""


def quantized(
    units: list[UnitPlan], read: ReadTensor, group: int, text_pass: TextPass | None, steps: int
) -> Iterator[UnitBytes]:
    """The units of a layer as bytes, in their order.

    Args:
        units: all of a decoder layer, or the head's, or dense ones.
        read: reads their tensors.
        group: weights that share scales.
        text_pass: the calibration text, before this layer; None where codes are rounded.
        steps: of learned rounding; above 0 only with a pass that looks back.
    """
    layer = units[0].layer
    if text_pass is None or units[0].dense:
        for unit in units:
            yield unit, encode.rounded_chunks(unit, read, group), ""
        return
    if layer is not None:
        hessians = text_pass.layer()
    else:
        of_head = text_pass.head()
        hessians = {member.module: of_head for unit in units for member in unit.members}
    moments = LayerMoments(hessians, scaled=units[0].scaled)
    del hessians  # for tuning, once moments are gone too
    if steps and layer is not None:
        made = [encode.calibrated(unit, read, group, moments) for unit in units]
        inputs = [_inputs(unit, moments) for unit in units]
        del moments
        for unit, pieces, own in zip(units, _tuned(text_pass, layer, made, steps), inputs, strict=True):
            yield unit, encode.coded_chunks(unit, pieces), own
        return
    for unit in units:  # choosing codes prepares the moments, which the digest reads: in this order
        yield unit, encode.coded_chunks(unit, encode.calibrated(unit, read, group, moments)), _inputs(unit, moments)


def _tuned(text_pass: TextPass, layer: int, made: list[list[CodedPiece]], steps: int) -> list[list[CodedPiece]]:
    """The units' pieces with learned codes. The layer's number is the seed, for resumed runs."""
    with text_pass.passed() as whole:
        found = iter(tune.tuned(whole, [piece for pieces in made for piece in pieces], steps, seed=layer))
    return [[replace(piece, planes=next(found)) for piece in pieces] for pieces in made]


def _inputs(unit: UnitPlan, moments: LayerMoments) -> str:
    return moments.digest(unit.members[0].module) if unit.scaled else ""
