"""Chooses the codes of one layer after another: rounded, calibrated, or calibrated and tuned.

Knows planned units and the calibration text in the model; not where the bytes go, nor what a journal is.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from tiercache.quant import tune
from tiercache.quant.gptq import LayerMoments
from tiercache.quant.tune import CodedPiece
from tiercache.store import encode
from tiercache.store.activations import TextPass
from tiercache.store.encode import Coded
from tiercache.store.layout import UnitPlan
from tiercache.store.reader import Buffer, Reader
from tiercache.store.source import Source


class Quantiser:
    """Turns the units of a checkpoint into bytes, in their order.

    Args:
        source: the checkpoint.
        group: weights that share scales.
        reader: reads weights.
        text_pass: the calibration text, before the first layer that is asked for; None where codes are rounded.
        steps: of learned rounding in each layer; above 0 only with a pass that looks back.
    """

    def __init__(self, source: Source, group: int, reader: Reader, text_pass: TextPass | None, steps: int) -> None:
        self._source, self._group, self._reader = source, group, reader
        self._text_pass, self._steps = text_pass, steps
        self._in_layer = False

    def blocks(self, units: list[UnitPlan]) -> Iterator[tuple[UnitPlan, Iterator[dict[str, Buffer]], str]]:
        """Each unit with its bytes, see `encode.rounded_chunks`, and what distinguishes the factors of its inputs.

        Args:
            units: all of a decoder layer, or the head's, or dense ones.
        """
        text_pass, layer = self._text_pass, units[0].layer
        self._in_layer = layer is not None
        if text_pass is None or units[0].dense:
            for unit in units:
                yield unit, encode.rounded_chunks(unit, self._source, self._reader, self._group), ""
            return
        found = text_pass.layer() if layer is not None else _of_head(text_pass, units)
        moments = LayerMoments(found, scaled=units[0].scaled)
        del found  # for tuning, once moments are gone too
        if self._steps and layer is not None:
            made = [self._calibrated(unit, moments) for unit in units]
            inputs = [_inputs(unit, moments) for unit in units]
            del moments
            for unit, planes, own in zip(units, self._tuned(text_pass, layer, units, made), inputs, strict=True):
                yield unit, encode.coded_chunks(unit, planes), own
            return
        for unit in units:  # choosing codes prepares the moments, which the digest reads: in this order
            yield unit, encode.coded_chunks(unit, self._calibrated(unit, moments)), _inputs(unit, moments)

    def keep(self) -> None:
        """Write the hidden states before the next layer to disk; earlier ones may go once the journal says so."""
        if self._text_pass is not None and self._in_layer:
            self._text_pass.keep()

    def forget(self) -> None:
        """Remove the hidden states before layers that are done."""
        if self._text_pass is not None:
            self._text_pass.forget(upto=self._text_pass.at)

    def _calibrated(self, unit: UnitPlan, moments: LayerMoments) -> list[Coded]:
        return encode.calibrated(unit, self._source, self._reader, self._group, moments)

    def _tuned(
        self, text_pass: TextPass, layer: int, units: list[UnitPlan], made: list[list[Coded]]
    ) -> list[list[Coded]]:
        """The units' planes with learned codes. The layer's number is the seed, for resumed runs."""
        with text_pass.passed() as (name, whole):
            pieces = [
                CodedPiece(
                    part.parameter.removeprefix(name + "."), part.first, part.transposed, one.planes, one.factors
                )
                for unit, own in zip(units, made, strict=True)
                for part, one in zip(unit.parts, own, strict=True)
            ]
            found = iter(tune.tuned(whole, pieces, self._steps, seed=layer))
        return [[replace(one, planes=next(found)) for one in own] for own in made]


def _inputs(unit: UnitPlan, moments: LayerMoments) -> str:
    """See `PlaneWeight.inputs`."""
    return moments.digest(unit.members[0].module) if unit.scaled else ""


def _of_head(text_pass: TextPass, units: list[UnitPlan]) -> dict[str, Tensor]:
    """The moments of the head's inputs, by the name of its module."""
    hessian = text_pass.head()
    return {member.module: hessian for unit in units for member in unit.members}
