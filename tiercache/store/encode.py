"""Turns one planned unit into the bytes of its files, a block of rows at a time.

Reads the unit's tensors from the checkpoint (at most one feed-forward block at once), encodes and interleaves them.
Knows nothing of where the bytes go.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from tiercache import hadamard
from tiercache import planes as codes
from tiercache.errors import QuantizationError
from tiercache.quant import gptq
from tiercache.quant.gptq import LayerMoments
from tiercache.store.format import PLANE_FILES, SCALE_FILE
from tiercache.store.header import DTYPES, TensorRef
from tiercache.store.layout import Part, UnitPlan
from tiercache.store.manifest import plain_unit
from tiercache.store.reader import Buffer, Reader, aligned_buffer
from tiercache.store.source import Source

_BLOCK_WEIGHTS = 4 << 20  # encoded at once: bounds the fp32 copies


def load(reader: Reader, ref: TensorRef) -> torch.Tensor:
    """A tensor of the checkpoint, in fresh memory."""
    unit, weight = plain_unit(0, "", ref)
    slot = aligned_buffer(unit.slot_bytes)
    reader.read(unit.pieces, slot).wait()
    return weight.view(torch.from_numpy(slot))


def blocks(
    unit: UnitPlan, source: Source, reader: Reader, group: int, moments: LayerMoments | None = None
) -> Iterator[dict[str, Buffer]]:
    """The unit's bytes for each file, in order, in blocks of whole rows; then scales of inputs and down's outputs.

    Args:
        unit: what to encode.
        source: the checkpoint.
        reader: reads it.
        group: weights that share scales.
        moments: of the modules' inputs, where codes are calibrated; None rounds each weight by itself.
    """
    tensors = {name: load(reader, source.tensors[name]) for name in dict.fromkeys(p.parameter for p in unit.parts)}
    if unit.dense:
        (tensor,) = tensors.values()
        (name,) = unit.sizes
        yield {name: tensor.flatten().view(torch.uint8).numpy()}
        return
    parts = []
    for part in unit.parts:
        stored = tensors[part.parameter].T if part.transposed else tensors[part.parameter]
        parts.append(stored[part.first : part.first + unit.rows])
    down = len(parts) - 1 if len(parts) > 1 else None  # its columns are outputs, with scales of their own
    factors = None if down is None else _factors(parts[down])
    step = max(1, _BLOCK_WEIGHTS // (unit.columns * len(parts)))
    whole = None
    if moments is not None:
        whole = [_calibrated(unit, n, part, group, moments, factors) for n, part in enumerate(parts)]
    for low in range(0, unit.rows, step):
        some = slice(low, min(unit.rows, low + step))
        if whole is not None:
            made = [replace(one, planes=tuple(p[some] for p in one.planes), scales=one.scales[some]) for one in whole]
        else:
            made = [_rounded(unit, n, part[some], low, group, factors) for n, part in enumerate(parts)]
        yield _side_by_side(made)
    if unit.scaled:
        assert moments is not None
        inputs = moments.of(unit.members[0].module, group).scale
        assert inputs is not None
        yield {SCALE_FILE: _flat(inputs.view(torch.uint8))}
    if factors is not None:
        yield {SCALE_FILE: _flat(factors.view(torch.uint8))}


def _rounded(
    unit: UnitPlan, place: int, rows: torch.Tensor, first_row: int, group: int, factors: torch.Tensor | None
) -> codes.Planes:
    part = unit.parts[place]
    scale = factors if place == len(unit.parts) - 1 else None
    with _named(part):
        return codes.encode(hadamard.stored(rows, scale), group, first_row=part.first + first_row)


def _calibrated(
    unit: UnitPlan,
    place: int,
    stored: torch.Tensor,
    group: int,
    moments: LayerMoments,
    factors: torch.Tensor | None,
) -> codes.Planes:
    module = next(member.module for member in unit.members if place in member.own)
    with _named(unit.parts[place]):
        if factors is not None and place == len(unit.parts) - 1:
            return gptq.quantize_columns(stored, moments.of(module, None), group, factors)
        return gptq.quantize_rows(stored, moments.of(module, group), group)


@contextmanager
def _named(part: Part) -> Iterator[None]:
    """Errors say which parameter they are about."""
    try:
        yield
    except QuantizationError as error:
        turned = " (transposed)" if part.transposed else ""
        raise QuantizationError(f"{part.parameter}{turned}: {error}") from error


def _factors(stored: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each column, fp32; 1 where it is zero, so that nothing is divided by it.

    What is not finite is left to the encoder, which says where it stands.
    """
    largest = stored.abs().amax(dim=0).float()
    return largest.where((largest > 0) & largest.isfinite(), 1.0)


def _side_by_side(parts: list[codes.Planes]) -> dict[str, Buffer]:
    """Planes and scales of equal numbers of rows, interleaved row by row."""
    files: dict[str, Buffer] = {}
    for plane, name in enumerate(PLANE_FILES):
        files[name] = _flat(torch.stack([one.planes[plane] for one in parts], dim=1))
    files[SCALE_FILE] = _flat(torch.stack([one.scales for one in parts], dim=1).view(torch.uint8))
    return files


def _flat(tensor: torch.Tensor) -> Buffer:
    return np.ascontiguousarray(tensor.numpy()).reshape(-1)


def weight_bytes(unit: UnitPlan, source: Source) -> int:
    """Bytes of the checkpoint that the unit is made from."""
    if unit.dense:
        return source.tensors[unit.parts[0].parameter].nbytes
    itemsize = {name: DTYPES[source.tensors[name].dtype].itemsize for name in {p.parameter for p in unit.parts}}
    return sum(unit.rows * unit.columns * itemsize[part.parameter] for part in unit.parts)
