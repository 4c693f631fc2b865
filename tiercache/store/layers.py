"""Chooses the codes of one layer after another: rounded, calibrated, or calibrated and tuned.

Knows planned units and the text's way through the model; not where the bytes go, nor what a journal is.
"""

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from tiercache.quant import tune
from tiercache.quant.gptq import LayerMoments
from tiercache.quant.tune import Piece
from tiercache.store import encode
from tiercache.store.activations import Walk
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
        walk: the calibration text, before the first layer that is asked for; None where codes are rounded.
        steps: of learned rounding in each layer; above 0 only with a walk that looks back.
    """

    def __init__(self, source: Source, group: int, reader: Reader, walk: Walk | None, steps: int) -> None:
        self._source, self._group, self._reader = source, group, reader
        self._walk, self._steps = walk, steps
        self._in_layer = False

    def blocks(self, units: list[UnitPlan]) -> Iterator[tuple[UnitPlan, Iterator[dict[str, Buffer]], str]]:
        """Each unit with its bytes, see `encode.blocks`, and what distinguishes the factors of its inputs.

        Args:
            units: all of a decoder layer, or the head's, or dense ones.
        """
        walk, layer = self._walk, units[0].layer
        self._in_layer = layer is not None
        if walk is None or units[0].dense:
            for unit in units:
                yield unit, encode.blocks(unit, self._source, self._reader, self._group), ""
            return
        found = walk.layer() if layer is not None else _of_head(walk, units)
        moments = LayerMoments(found, scaled=units[0].scaled)
        del found  # for tuning, once moments are gone too
        if self._steps and layer is not None:
            made = [self._calibrated(unit, moments) for unit in units]
            inputs = [_inputs(unit, moments) for unit in units]
            del moments
            for unit, planes, own in zip(units, self._tuned(walk, layer, units, made), inputs, strict=True):
                yield unit, encode.blocks_of(unit, planes), own
            return
        for unit in units:  # moments are made as codes are chosen: the digest comes behind them
            yield unit, encode.blocks_of(unit, self._calibrated(unit, moments)), _inputs(unit, moments)

    def keep(self) -> None:
        """Put what the next layer begins with on disk; what earlier ones began with may go once this is vouched for."""
        if self._walk is not None and self._in_layer:
            self._walk.keep()

    def forget(self) -> None:
        """Remove what layers that are done began with."""
        if self._walk is not None:
            self._walk.forget(upto=self._walk.at)

    def _calibrated(self, unit: UnitPlan, moments: LayerMoments) -> list[Coded]:
        return encode.calibrated(unit, self._source, self._reader, self._group, moments)

    def _tuned(self, walk: Walk, layer: int, units: list[UnitPlan], made: list[list[Coded]]) -> list[list[Coded]]:
        """The units' planes with learned codes. The layer's number is the seed, for resumed runs."""
        with walk.passed() as (name, whole):
            pieces = [
                Piece(part.parameter.removeprefix(name + "."), part.first, part.transposed, one.planes, one.factors)
                for unit, own in zip(units, made, strict=True)
                for part, one in zip(unit.parts, own, strict=True)
            ]
            found = iter(tune.tuned(whole, pieces, self._steps, seed=layer))
        return [[replace(one, planes=next(found)) for one in own] for own in made]


def _inputs(unit: UnitPlan, moments: LayerMoments) -> str:
    """See `PlaneWeight.inputs`."""
    return moments.digest(unit.members[0].module) if unit.scaled else ""


def _of_head(walk: Walk, units: list[UnitPlan]) -> dict[str, Tensor]:
    """The moments of the head's inputs, by the name of its module."""
    hessian = walk.head()
    return {member.module: hessian for unit in units for member in unit.members}
