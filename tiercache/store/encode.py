"""Turns one planned unit into the bytes of its files, a block of rows at a time.

Reads the unit's tensors from the checkpoint (at most one feed-forward block at once), encodes and interleaves them.
Knows nothing of where the bytes go.
"""

from collections.abc import Iterator

import numpy as np
import torch

from tiercache import planes as codes
from tiercache.errors import QuantizationError
from tiercache.store.format import PLANE_FILES, SCALE_FILE
from tiercache.store.header import DTYPES, TensorRef
from tiercache.store.layout import UnitPlan
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


def blocks(unit: UnitPlan, source: Source, reader: Reader, group: int) -> Iterator[dict[str, Buffer]]:
    """The unit's bytes for each file, in order, in blocks of whole rows."""
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
    step = max(1, _BLOCK_WEIGHTS // (unit.columns * len(parts)))
    for low in range(0, unit.rows, step):
        yield _encode(unit, [part[low : low + step] for part in parts], low, group)


def _encode(unit: UnitPlan, parts: list[torch.Tensor], first_row: int, group: int) -> dict[str, Buffer]:
    """Planes and scales of equal numbers of rows, interleaved row by row."""
    encoded = []
    for part, rows in zip(unit.parts, parts, strict=True):
        try:
            encoded.append(codes.encode(rows, group, first_row=part.first + first_row))
        except QuantizationError as error:
            turned = " (transposed)" if part.transposed else ""
            raise QuantizationError(f"{part.parameter}{turned}: {error}") from error
    files: dict[str, Buffer] = {}
    for plane, name in enumerate(PLANE_FILES):
        files[name] = _flat(torch.stack([one.planes[plane] for one in encoded], dim=1))
    files[SCALE_FILE] = _flat(torch.stack([one.scales for one in encoded], dim=1).view(torch.uint8))
    return files


def _flat(tensor: torch.Tensor) -> Buffer:
    return np.ascontiguousarray(tensor.numpy()).reshape(-1)


def weight_bytes(unit: UnitPlan, source: Source) -> int:
    """Bytes of the checkpoint that the unit is made from."""
    if unit.dense:
        return source.tensors[unit.parts[0].parameter].nbytes
    itemsize = {name: DTYPES[source.tensors[name].dtype].itemsize for name in {p.parameter for p in unit.parts}}
    return sum(unit.rows * unit.columns * itemsize[part.parameter] for part in unit.parts)
