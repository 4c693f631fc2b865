"""Turns one planned unit into the bytes of its files, a chunk of whole rows at a time.

It reads the unit's tensors from the checkpoint, at most one feed-forward block at once. It encodes them and puts the
rows of the unit's matrices side by side. It does not know where the bytes go.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from tiercache.errors import QuantizationError
from tiercache.quant import gptq, hadamard
from tiercache.quant.gptq import LayerMoments
from tiercache.quant.planes import Planes, encode
from tiercache.store.format import PLANE_FILES, SCALE_FILE
from tiercache.store.header import DTYPES, TensorRef
from tiercache.store.layout import Part, UnitPlan
from tiercache.store.manifest import plain_unit
from tiercache.store.reader import Buffer, Reader, aligned_buffer
from tiercache.store.source import Source

_CHUNK_WEIGHTS = 1 << 20  # encoded at once: bounds the fp32 copies


def load(reader: Reader, ref: TensorRef) -> torch.Tensor:
    """A tensor of the checkpoint, in fresh memory."""
    unit, weight = plain_unit(0, "", ref)
    slot = aligned_buffer(unit.slot_bytes)
    reader.read(unit.pieces, slot).wait()
    return weight.view(torch.from_numpy(slot))


def rounded_chunks(unit: UnitPlan, source: Source, reader: Reader, group: int) -> Iterator[dict[str, Buffer]]:
    """The unit's bytes for each file, in order; then the factors of a down matrix's outputs.

    Each weight is rounded by itself.

    Args:
        unit: what to encode.
        source: the checkpoint.
        reader: reads it.
        group: weights that share scales.
    """
    if unit.dense:
        (part,), (name,) = unit.parts, unit.sizes
        yield {name: load(reader, source.tensors[part.parameter]).flatten().view(torch.uint8).numpy()}
        return
    parts, factors = _stored(unit, source, reader)
    for some in _slices(unit):
        made = [_rounded(unit, n, part[some], some.start, group, factors) for n, part in enumerate(parts)]
        yield _side_by_side(made)
    if factors is not None:
        yield _factors(factors)


@dataclass(frozen=True)
class Coded:
    """One matrix of a unit, as codes.

    Attributes:
        planes: as `hadamard.stored` says.
        factors: of its columns, fp32; None for ones.
    """

    planes: Planes
    factors: torch.Tensor | None


def calibrated(unit: UnitPlan, source: Source, reader: Reader, group: int, moments: LayerMoments) -> list[Coded]:
    """The codes of the unit's parts.

    Args:
        unit, source, reader, group: see `rounded_chunks`.
        moments: of the modules' inputs.
    """
    parts, factors = _stored(unit, source, reader)
    return [_calibrated(unit, n, part, group, moments, factors) for n, part in enumerate(parts)]


def coded_chunks(unit: UnitPlan, parts: list[Coded]) -> Iterator[dict[str, Buffer]]:
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


def _stored(unit: UnitPlan, source: Source, reader: Reader) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """The unit's parts as they will lie, and the factors of the last's columns, if it is a down matrix."""
    tensors = {name: load(reader, source.tensors[name]) for name in dict.fromkeys(p.parameter for p in unit.parts)}
    parts = []
    for part in unit.parts:
        stored = tensors[part.parameter].T if part.transposed else tensors[part.parameter]
        parts.append(stored[part.first : part.first + unit.rows])
    return parts, _output_factors(parts[-1]) if len(parts) > 1 else None


def _slices(unit: UnitPlan) -> Iterator[slice]:
    """Rows that are encoded together."""
    step = max(1, _CHUNK_WEIGHTS // (unit.columns * len(unit.parts)))
    for low in range(0, unit.rows, step):
        yield slice(low, min(unit.rows, low + step))


def _rounded(
    unit: UnitPlan, place: int, rows: torch.Tensor, first_row: int, group: int, factors: torch.Tensor | None
) -> Planes:
    part = unit.parts[place]
    scale = factors if place == len(unit.parts) - 1 else None
    with _named(part):
        return encode(hadamard.stored(rows, scale), group, first_row=part.first + first_row)


def _calibrated(
    unit: UnitPlan,
    place: int,
    stored: torch.Tensor,
    group: int,
    moments: LayerMoments,
    factors: torch.Tensor | None,
) -> Coded:
    module = next(member.module for member in unit.members if place in member.own)
    with _named(unit.parts[place]):
        if factors is not None and place == len(unit.parts) - 1:
            return Coded(gptq.quantize_columns(stored, moments.of(module, None), group, factors), factors)
        inputs = moments.of(module, group)
        return Coded(gptq.quantize_rows(stored, inputs, group), inputs.factors)


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


def weight_bytes(unit: UnitPlan, source: Source) -> int:
    """Bytes of the checkpoint that the unit is made from."""
    if unit.dense:
        return source.tensors[unit.parts[0].parameter].nbytes
    itemsize = {name: DTYPES[source.tensors[name].dtype].itemsize for name in {p.parameter for p in unit.parts}}
    return sum(unit.rows * unit.columns * itemsize[part.parameter] for part in unit.parts)
