"""A matrix as bit planes: one stored copy that can be read at three precisions.

A *plane* holds some of the bits of every weight's codes (`quant.codes`), packed as `quant.packing` says. The first
plane alone gives int3, the first two int4, all three int8. A *group* is a run of weights in a row that share scales.
`decode` is the oracle of `kernels/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.quant.codes import CELL, MIDDLES, ranges, upper_codes
from tiercache.quant.packing import pack, spread, unpack

PLANE_BITS: tuple[int, ...] = (3, 1, 4)
"""Bits of each plane, most significant first; they sum to 8."""

PRECISIONS: Mapping[str, int] = {"int3": 1, "int4": 2, "int8": 3}
"""Precision name -> number of planes read."""

GROUPS: tuple[int, ...] = (32, 64, 128)  # allowed sizes, in columns

DECODE_SCRATCH_BYTES = 8 << 20
"""Upper bound of what `decode` allocates besides its output, whatever the matrix."""

_BLOCK = 1 << 20  # weights decoded or encoded at a time; decode needs less than 6 bytes of scratch for each
_EACH_BYTE = 0x0101010101010101  # times a byte below 256: that byte eight times, in an int64


def num_groups(columns: int, group: int) -> int:
    """Groups in a row of `columns` weights, the last one padded."""
    if group not in GROUPS or columns < 1:
        raise UsageError(f"{columns} columns in groups of {group}: need columns >= 1 and group in {GROUPS}")
    return -(-columns // group)


def plane_row_bytes(columns: int, group: int, plane: int) -> int:
    """Bytes of one row of plane `plane` (0 is the most significant)."""
    return num_groups(columns, group) * group * PLANE_BITS[plane] // 8


def plane_widths(columns: int, group: int, planes: int = len(PLANE_BITS)) -> tuple[int, ...]:
    """Bytes of one row of each of the first `planes` planes."""
    return tuple(plane_row_bytes(columns, group, plane) for plane in range(planes))


def scale_row_bytes(columns: int, group: int) -> int:
    """Bytes of one row of scales: fp16 lo and fp16 step, interleaved, per group."""
    return 4 * num_groups(columns, group)


def factor_bytes(columns: int) -> int:
    """Bytes of the factors of a matrix's columns."""
    return 4 * columns


@dataclass(frozen=True, eq=False)  # as tensors are: equal only to itself, so that it can be a key
class Planes:
    """A matrix held as its first planes; how many are held is its precision.

    planes: uint8 [rows, plane_row_bytes(columns, group, p)] each, any strides, most significant first.
    scales: fp16 [rows, groups, 2], lo and step.
    slabs: each plane, and the scales, is a slab of slots of its own, with any number of rows: which of them make up
        a row of the matrix is said by whoever multiplies by it.
    """

    planes: tuple[Tensor, ...]
    scales: Tensor
    columns: int
    group: int
    slabs: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if not 1 <= len(self.planes) <= len(PLANE_BITS):
            raise UsageError(f"{len(self.planes)} planes given: a matrix holds 1 to {len(PLANE_BITS)}")
        _check("scales", self.scales, torch.float16, (self.rows, num_groups(self.columns, self.group), 2))
        for p, plane in enumerate(self.planes):
            width = plane_row_bytes(self.columns, self.group, p)
            height = plane.shape[:1] if self.slabs else (self.rows,)
            _check(f"plane {p}", plane, torch.uint8, (*height, width))

    @property
    def rows(self) -> int:
        """Rows of the matrix; of slabs, those of the scales."""
        return self.scales.shape[0]

    @property
    def precision(self) -> str:
        """Name of the precision held: the key of `PRECISIONS`."""
        return next(name for name, count in PRECISIONS.items() if count == len(self.planes))

    @property
    def middle(self) -> float:
        """What the bits that are not held count for, in steps."""
        return MIDDLES[len(self.planes) - 1]

    def at(self, precision: str) -> Planes:
        """The same matrix at a lower (or the same) precision: a view, nothing is copied."""
        count = PRECISIONS.get(precision)
        if count is None or count > len(self.planes):
            raise UsageError(
                f"precision {precision!r} of a matrix held at {self.precision}; precisions are {', '.join(PRECISIONS)}"
            )
        return replace(self, planes=self.planes[:count])


def encode(weight: Tensor, group: int = 64, *, first_row: int = 0) -> Planes:
    """Quantise `weight` [rows, columns] (fp32, fp16 or bf16, any strides) to all three planes, each weight by itself.

    Errors count rows from `first_row`, for callers that encode a matrix block by block.

    Raises QuantizationError for NaN, infinity or a magnitude above fp16's 65504, UsageError for other dtypes.
    """
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"weight is {weight.dtype} {list(weight.shape)}, expected a 16- or 32-bit matrix")
    rows, columns = weight.shape
    groups = num_groups(columns, group)
    scales = torch.empty(rows, groups, 2, dtype=torch.float16, device=weight.device)
    widths = plane_widths(columns, group)
    planes = [torch.empty(rows, width, dtype=torch.uint8, device=weight.device) for width in widths]
    table = upper_codes(weight.device)
    high = max(1, _BLOCK // (groups * group))
    for first in range(0, rows, high):
        r = slice(first, min(rows, first + high))
        values = weight[r].float()
        ragged = groups * group - columns
        if ragged:  # repeat the last column: it changes no group's range
            values = torch.cat([values, values[:, -1:].expand(-1, ragged)], dim=1)
        values = values.reshape(values.shape[0], groups, group)
        lo, step = ranges(values.amin(-1), values.amax(-1), first_row=first_row + first)
        scale = torch.where(step > 0, 1 / step.float(), 0)[..., None]
        total = ((values - lo.float()[..., None]) * scale).round_().clamp_(0, len(table) - 1)
        h = table[total.int()]
        c = total.to(torch.uint8) - CELL * h
        if ragged:
            h[:, -1, -ragged:], c[:, -1, -ragged:] = 0, 0
        scales[r, :, 0], scales[r, :, 1] = lo, step
        for plane, packed in zip(planes, pack(h, c), strict=True):
            plane[r] = packed
    return Planes(tuple(planes), scales, columns, group)


def from_codes(h: Tensor, c: Tensor, scales: Tensor, group: int) -> Planes:
    """The matrix of some codes, uint8 [rows, columns] each."""
    rows, columns = h.shape
    groups = num_groups(columns, group)
    padded = (torch.nn.functional.pad(codes, (0, groups * group - columns)) for codes in (h, c))
    return Planes(pack(*(codes.reshape(rows, groups, group) for codes in padded)), scales, columns, group)


def codes_of(planes: Planes) -> tuple[Tensor, Tensor]:
    """Codes of a matrix held whole: h and c, uint8 [rows, columns]."""
    whole = slice(0, planes.rows), slice(0, planes.scales.shape[1])
    top, low, c = (
        unpack(packed, bits).view(planes.rows, -1)[:, : planes.columns] for packed, bits, _ in _fields(planes, *whole)
    )
    return 4 * top + low, c


def decode(planes: Planes, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The weights [rows, columns] at the precision held, in `dtype`; written into `out` (any strides) when given.

    Works block by block: besides the result it allocates less than DECODE_SCRATCH_BYTES. Every element is the
    same arithmetic on the same codes: no block size, stride or place of a plane changes a bit of the result.

    Raises UsageError for slabs, which have no rows of their own.
    """
    if planes.slabs:
        raise UsageError("slabs have no rows of their own: gather the rows wanted into a matrix first")
    if out is None:
        out = torch.empty(planes.rows, planes.columns, dtype=dtype, device=planes.scales.device)
    _check("out", out, dtype, (planes.rows, planes.columns))
    for r, g in _blocks(planes.rows, planes.scales.shape[1], planes.group):
        columns = slice(g.start * planes.group, min(planes.columns, g.stop * planes.group))
        values = _block_values(planes, r, g)[:, : columns.stop - columns.start]
        out[r, columns].copy_(values)
        del values  # before the next block is made
    return out


def _blocks(rows: int, groups: int, group: int) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and groups that cut a matrix into pieces of at most _BLOCK weights (or one group)."""
    wide = min(groups, max(1, _BLOCK // group))
    high = max(1, _BLOCK // (wide * group))
    for r in range(0, rows, high):
        for g in range(0, groups, wide):
            yield slice(r, min(rows, r + high)), slice(g, min(groups, g + wide))


def _fields(planes: Planes, r: slice, g: slice) -> Iterator[tuple[Tensor, int, int]]:
    """Packed codes of a block's cells (row, group) as planes of 2 or 4 bits: bytes, bits, and steps of a unit."""
    cells, groups = (r.stop - r.start) * (g.stop - g.start), planes.scales.shape[1]

    def cut(plane: Tensor, width: int, begin: int = 0) -> Tensor:  # `width` bytes a group
        return plane[r, begin + g.start * width : begin + g.stop * width].reshape(cells, width)

    pair, bit = planes.group // 4, planes.group // 8
    first = planes.planes[0]
    yield cut(first, pair), 2, 4 * CELL
    lower = spread(cut(first, bit, groups * pair)) << 1
    if len(planes.planes) > 1:
        lower |= spread(cut(planes.planes[1], bit))
    yield lower, 2, CELL
    if len(planes.planes) > 2:
        yield cut(planes.planes[2], planes.group // 2), 4, 1


def _block_values(planes: Planes, r: slice, g: slice) -> Tensor:
    """The weights of a block in fp32, padding included: [rows, groups * group]."""
    values = _merged_codes(planes, r, g).view(torch.uint8).float()  # [cells, group]
    if planes.middle:
        values += planes.middle
    scales = planes.scales[r, g].reshape(-1, 2).float()  # [cells, 2]
    values.mul_(scales[:, 1:]).add_(scales[:, :1])
    return values.view(r.stop - r.start, -1)


def _merged_codes(planes: Planes, r: slice, g: slice) -> Tensor:
    """12 h + c of a block's cells (row, group), unknown bits 0: int64 [cells, group / 8], a byte for each."""
    cells = (r.stop - r.start) * (g.stop - g.start)
    merged = torch.zeros((planes.group // 8, cells), dtype=torch.int64, device=planes.scales.device)
    part = torch.empty_like(merged)
    for packed, bits, weight in _fields(planes, r, g):
        words = packed.clone(memory_format=torch.contiguous_format).view(torch.int64)
        lanes = words.T.contiguous()  # [words, cells]: long loops
        for i, piece in enumerate(part.chunk(8 // bits)):
            torch.bitwise_right_shift(lanes, bits * i, out=piece)
        part.bitwise_and_(((1 << bits) - 1) * _EACH_BYTE)
        merged += part.mul_(weight)  # no byte overflows: 12 * 15 + 15 = 195
    return merged.T.contiguous()


def _check(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise UsageError(f"{what} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")
