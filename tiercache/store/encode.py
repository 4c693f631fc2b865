"""Turns the planned units of a layer into the bytes of their files: rounded, calibrated, or calibrated and tuned.

It reads a unit's tensors from the checkpoint, at most one feed-forward block at once. It encodes them and puts the
rows of the unit's matrices side by side, a chunk of whole rows at a time. It does not know where the bytes go.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from tiercache.errors import QuantizationError
from tiercache.quant import gptq, hadamard, tune
from tiercache.quant.gptq import LayerMoments
from tiercache.quant.planes import Planes, encode
from tiercache.quant.tune import CodedPiece
from tiercache.store.activations import TextPass
from tiercache.store.checkpoint import Checkpoint
from tiercache.store.format import PLANE_FILES, SCALE_FILE
from tiercache.store.header import DTYPES
from tiercache.store.layout import Part, UnitPlan
from tiercache.store.reader import Buffer

_CHUNK_WEIGHTS = 1 << 20  # encoded at once: bounds the fp32 copies

ReadTensor = Callable[[str], torch.Tensor]
"""Reads a parameter of the checkpoint, by its name."""

UnitBytes = tuple[UnitPlan, Iterator[dict[str, Buffer]], str]
"""A unit, its bytes as in `rounded_chunks`, and what `PlaneWeight.inputs` will say."""


def quantized(
    units: list[UnitPlan], read: ReadTensor, group: int, text_pass: TextPass | None, steps: int
) -> Iterator[UnitBytes]:
    """The units of a layer as bytes, in their order: all of a decoder layer, or the head's, or dense ones.

    `text_pass` is the calibration text, before this layer; without it codes are rounded. `steps` of learned rounding
    need a pass that looks back.
    """
    layer = units[0].layer
    if text_pass is None or units[0].dense:
        for unit in units:
            yield unit, rounded_chunks(unit, read, group), ""
        return
    if layer is not None:
        hessians = text_pass.layer()
    else:
        of_head = text_pass.head()
        hessians = {member.module: of_head for unit in units for member in unit.members}
    moments = LayerMoments(hessians, scaled=units[0].scaled)
    del hessians  # for tuning, once moments are gone too
    if steps and layer is not None:
        made = [calibrated(unit, read, group, moments) for unit in units]
        inputs = [_inputs(unit, moments) for unit in units]
        del moments
        for unit, pieces, own in zip(units, _tuned(text_pass, layer, made, steps), inputs, strict=True):
            yield unit, coded_chunks(unit, pieces), own
        return
    for unit in units:  # choosing codes prepares the moments, which the digest reads: in this order
        yield unit, coded_chunks(unit, calibrated(unit, read, group, moments)), _inputs(unit, moments)


def _tuned(text_pass: TextPass, layer: int, made: list[list[CodedPiece]], steps: int) -> list[list[CodedPiece]]:
    """The units' pieces with learned codes. The layer's number is the seed, for resumed runs."""
    with text_pass.passed() as whole:
        found = iter(tune.tuned(whole, [piece for pieces in made for piece in pieces], steps, seed=layer))
    return [[replace(piece, planes=next(found)) for piece in pieces] for pieces in made]


def _inputs(unit: UnitPlan, moments: LayerMoments) -> str:
    return moments.digest(unit.members[0].module) if unit.scaled else ""


def rounded_chunks(unit: UnitPlan, read: ReadTensor, group: int) -> Iterator[dict[str, Buffer]]:
    """The unit's bytes for each file, each weight rounded by itself; then the factors of a down matrix's outputs."""
    if unit.dense:
        (part,), (name,) = unit.parts, unit.sizes
        yield {name: read(part.parameter).flatten().view(torch.uint8).numpy()}
        return
    matrices = _matrices(unit, read)
    for some in _slices(unit):
        made = []
        for part, rows, factors in matrices:
            with _named(part):
                made.append(encode(hadamard.stored(rows[some], factors), group, first_row=part.first + some.start))
        yield _side_by_side(made)
    if (factors := matrices[-1][2]) is not None:
        yield _factors(factors)


def calibrated(unit: UnitPlan, read: ReadTensor, group: int, moments: LayerMoments) -> list[CodedPiece]:
    """The unit's parts with codes that GPTQ chose; `moments` are of the modules' inputs."""
    found = []
    for place, (part, rows, factors) in enumerate(_matrices(unit, read)):
        module = next(member.module for member in unit.members if place in member.own)
        with _named(part):
            if factors is None:
                inputs = moments.of(module, group)
                planes, factors = gptq.quantize_rows(rows, inputs, group), inputs.factors
            else:
                planes = gptq.quantize_columns(rows, moments.of(module, None), group, factors)
        found.append(CodedPiece(part.parameter, part.first, part.transposed, planes, factors))
    return found


def coded_chunks(unit: UnitPlan, parts: list[CodedPiece]) -> Iterator[dict[str, Buffer]]:
    """As `rounded_chunks`, of parts whose codes are chosen; factors of the unit's inputs, if any, lie before down's."""
    whole = [part.planes for part in parts]
    for some in _slices(unit):
        yield _side_by_side(
            [replace(one, planes=tuple(p[some] for p in one.planes), scales=one.scales[some]) for one in whole]
        )
    if unit.scaled:
        yield _factors(parts[0].factors)
    if len(parts) > 1:
        yield _factors(parts[-1].factors)


def _matrices(unit: UnitPlan, read: ReadTensor) -> list[tuple[Part, torch.Tensor, torch.Tensor | None]]:
    """The unit's parts, their rows as they will lie, and the factors of a down matrix's columns."""
    tensors = {name: read(name) for name in dict.fromkeys(part.parameter for part in unit.parts)}
    found = []
    for place, part in enumerate(unit.parts):
        whole = tensors[part.parameter].T if part.transposed else tensors[part.parameter]
        rows = whole[part.first : part.first + unit.rows]
        is_down = 0 < place == len(unit.parts) - 1
        found.append((part, rows, _output_factors(rows) if is_down else None))
    return found


def _slices(unit: UnitPlan) -> Iterator[slice]:
    """Rows that are encoded together."""
    step = max(1, _CHUNK_WEIGHTS // (unit.columns * len(unit.parts)))
    for low in range(0, unit.rows, step):
        yield slice(low, min(unit.rows, low + step))


@contextmanager
def _named(part: Part) -> Iterator[None]:
    """Within, errors name the parameter."""
    try:
        yield
    except QuantizationError as error:
        turned = " (transposed)" if part.transposed else ""
        raise QuantizationError(f"{part.parameter}{turned}: {error}") from error


def _output_factors(stored: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each column, fp32; 1 where it is zero, so that nothing is divided by it.

    What is not finite is left to the encoder, which says where it stands.
    """
    largest = stored.abs().amax(dim=0).float()
    return largest.where((largest > 0) & largest.isfinite(), 1.0)


def _side_by_side(parts: list[Planes]) -> dict[str, Buffer]:
    """Planes and scales of equal numbers of rows, interleaved row by row."""
    files: dict[str, Buffer] = {}
    for plane, name in enumerate(PLANE_FILES):
        files[name] = _flat(torch.stack([one.planes[plane] for one in parts], dim=1))
    files[SCALE_FILE] = _flat(torch.stack([one.scales for one in parts], dim=1).view(torch.uint8))
    return files


def _factors(factors: torch.Tensor | None) -> dict[str, Buffer]:
    assert factors is not None
    return {SCALE_FILE: _flat(factors.view(torch.uint8))}


def _flat(tensor: torch.Tensor) -> Buffer:
    return np.ascontiguousarray(tensor.numpy()).reshape(-1)


def weight_bytes(unit: UnitPlan, checkpoint: Checkpoint) -> int:
    """Bytes of the checkpoint that the unit is made from."""
    if unit.dense:
        return checkpoint.tensors[unit.parts[0].parameter].nbytes
    itemsize = {name: DTYPES[checkpoint.tensors[name].dtype].itemsize for name in {p.parameter for p in unit.parts}}
    return sum(unit.rows * unit.columns * itemsize[part.parameter] for part in unit.parts)
