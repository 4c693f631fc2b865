"""Weights as sums of planes: nested group-wise quantisation, one stored copy for three precisions.

Knows tensors; nothing of files, tiers or models. `decode` and `product` are the oracles of `kernels/`.

**Codes.** A row of `columns` weights is cut into groups of `group` consecutive columns (the last one padded). Each
group stores `lo` and `step` in fp16, each weight an 8-bit pair of codes, h and c of 4 bits each:

    w ~ lo + step * (12 h + c)                           planes: the upper 3 bits of h, its last bit, the 4 bits of c

**Rungs.** Reading only the first planes (int3, int4; int8: all) leaves bits unknown. They count as the middle of what
they could be: c as 7.5, the last bit of h as 1/2. So w ~ lo + step * (integer + middle), with the middle 13.5, 7.5
or 0. The product of a step (11 significant bits) and a bracket (9) is exact in fp32: a decoder gets the same bits with
or without fused multiply-add; only the sum is rounded (then, once more, to the output type).

**Overlap.** An int4 cell is 12 steps wide and c reaches over 16: 2 steps into either neighbour. So h may be the code
that compensates int4's other errors best and c can still say what int8 needs (`quant.gptq`). With cells of 16, which do
not overlap, int4 loses a fifth more; with cells of 8 int8 loses half as much again (docs/measured.md).

**Packing.** A plane of 2 or 4 bits takes B = group * bits / 8 bytes per group; code i of the group lies in byte
`i % B` at bit `bits * (i // B)`: one shift and mask of all bytes yields B consecutive codes. Single bits are packed so
that they fall into the places of a 2-bit plane: with its B = group / 4, the bit of code i lies in byte
`i % B % (B / 2)` at bit `2 * (i // B) + (i % B) // (B / 2)`. A row of the first plane is the 2-bit codes of all its
groups (the top of h), then the single bits of all its groups (the next). Padding has code 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

import torch
from torch import Tensor

from tiercache.errors import QuantizationError, UsageError

PLANE_BITS: tuple[int, ...] = (3, 1, 4)
"""Bits of each plane, most significant first; they sum to 8."""

PRECISIONS: Mapping[str, int] = {"int3": 1, "int4": 2, "int8": 3}
"""Precision name -> number of planes read."""

CELL = 12
"""Steps from one int4 level to the next: what h counts."""

MIDDLES: tuple[float, ...] = (7.5 + CELL / 2, 7.5, 0.0)
"""What the bits below count for, in steps, where 1, 2 or 3 planes are read."""

GROUPS: tuple[int, ...] = (32, 64, 128)  # allowed sizes, in columns

DECODE_SCRATCH_BYTES = 8 << 20
"""Upper bound of what `decode` allocates besides its output, whatever the matrix."""

_TOP = 15  # the largest h, and the largest c
_LEAST, _MOST = 7.5 - CELL / 2, 7.5 + CELL * (_TOP + 0.5)  # what the int4 cells cover, in steps above lo
_WEIGHTS = (0.5, 1.0, 64.0)  # what a squared error counts at int3, int4 and int8
_BLOCK = 1 << 20  # weights decoded or encoded at a time; decode needs less than 6 bytes of scratch for each
_FP16_MAX = 65504.0
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
    """Quantise `weight` [rows, columns] (fp32, fp16 or bf16, any strides) to all three planes, on its device.

    Each weight by itself; `quant.gptq` also lets a weight make up for the errors of others.

    Args:
        weight: the matrix.
        group: weights that share lo and step.
        first_row: errors count rows from it, for callers that encode a matrix block by block.

    Raises QuantizationError for NaN, infinity or a magnitude above fp16's 65504, UsageError for other dtypes.
    """
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"weight is {weight.dtype} {list(weight.shape)}, expected a 16- or 32-bit matrix")
    rows, columns = weight.shape
    groups = num_groups(columns, group)
    scales = torch.empty(rows, groups, 2, dtype=torch.float16, device=weight.device)
    widths = plane_widths(columns, group)
    planes = [torch.empty(rows, width, dtype=torch.uint8, device=weight.device) for width in widths]
    table = _upper_codes(weight.device)
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


def ranges(least: Tensor, most: Tensor, *, first_row: int = 0) -> tuple[Tensor, Tensor]:
    """fp16 lo and step of groups whose weights reach from `least` to `most` (fp32, [rows, groups]).

    The int4 cells cover the groups: lo is rounded down and step, measured from it, up.

    Raises QuantizationError for NaN, infinity or a magnitude above 65504.
    """
    held = (least >= -_FP16_MAX) & (most <= _FP16_MAX)
    if not bool(held.all()):
        row, at = (int(i) for i in (~held).nonzero()[0])
        raise QuantizationError(
            f"row {first_row + row} holds {float(least[row, at])} to {float(most[row, at])}; weights must be "
            f"finite and within +-{_FP16_MAX:.0f}: repair the checkpoint or leave this matrix unquantised"
        )
    constant = least == most  # step 0, and lo rounded to nearest: the same value back at every precision
    below = (least - (most - least) * (_LEAST / (_MOST - _LEAST))).clamp_min(-_FP16_MAX)
    lo = least.half().where(constant, _fp16_below(below))
    step = -_fp16_below((lo.float() - most) / _MOST)
    return lo, step.where(~constant, 0)


def choose(w3: Tensor, w4: Tensor, w8: Tensor, lo: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Codes h and c (uint8) whose weighted squared errors against int3's, int4's and int8's targets are least.

    Targets are fp32 of one shape; lo and step (fp16) broadcast against them. Tried are the h nearest to int4's
    target, its neighbours, and those nearest to int8's and to int3's; of equal ones the first is taken.
    """
    lo, step = lo.float(), step.float()
    scale = torch.where(step > 0, 1 / step, 0)
    t3, t4, t8 = ((w - lo) * scale for w in (w3, w4, w8))
    near = ((t4 - MIDDLES[1]) / CELL).round_()
    pair = ((t3 - MIDDLES[0]) / (2 * CELL)).round_() * 2  # the lower of the two h that are int3's nearest level
    best: Tensor | None = None
    for h in (near, near - 1, near + 1, ((t8 - MIDDLES[1]) / CELL).round_(), pair + (t4 > pair * CELL + MIDDLES[0])):
        h.clamp_(0, _TOP)
        base = h * CELL
        c = (t8 - base).round_().clamp_(0, _TOP)
        cost = _WEIGHTS[1] * (t4 - base - MIDDLES[1]).square_()
        cost += _WEIGHTS[2] * (t8 - base - c).square_()
        cost += _WEIGHTS[0] * (t3 - (h / 2).floor_() * (2 * CELL) - MIDDLES[0]).square_()
        if best is None:
            best, best_h, best_c = cost, h, c
            continue
        better = cost < best
        best = torch.where(better, cost, best)
        best_h, best_c = torch.where(better, h, best_h), torch.where(better, c, best_c)
    return best_h.to(torch.uint8), best_c.to(torch.uint8)


def values(h: Tensor, c: Tensor, lo: Tensor, step: Tensor) -> Tensor:
    """What codes stand for at int3, int4 and int8, in fp32: [3, *their shape]."""
    upper = torch.stack([(h & 14) * CELL + MIDDLES[0], h * CELL + MIDDLES[1], (h * CELL + c).float()])
    return lo.float() + step.float() * upper


def _upper_codes(device: torch.device) -> Tensor:
    """h for each sum 12 h + c that can be."""
    sums, one = torch.arange(CELL * _TOP + _TOP + 1.0, device=device), torch.ones((), device=device)
    return choose(sums, sums, sums, one - 1, one)[0]


def pack(h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (uint8 [rows, groups, group]) -> the rows of the three planes, as in the module docstring."""
    upper, middle, lower = _pack(h >> 2, 2), _pack_bits((h >> 1) & 1), _pack_bits(h & 1)
    return torch.cat([upper.flatten(1), middle.flatten(1)], dim=1), lower.flatten(1), _pack(c, 4).flatten(1)


def unpack(planes: Planes) -> tuple[Tensor, Tensor]:
    """Codes of a matrix held whole: h and c, uint8 [rows, columns]."""
    whole = slice(0, planes.rows), slice(0, planes.scales.shape[1])
    top, low, c = (
        _unpack(packed, bits).view(planes.rows, -1)[:, : planes.columns] for packed, bits, _ in _fields(planes, *whole)
    )
    return 4 * top + low, c


def decode(planes: Planes, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The weights [rows, columns] at the precision held, in `dtype`; written into `out` (any strides) when given.

    Works block by block: besides the result it allocates less than DECODE_SCRATCH_BYTES. Every element is the
    same arithmetic on the same codes: no block size, stride or place of a plane changes a bit of the result.

    Raises UsageError for slabs, which have no rows of their own.
    """
    _check_whole(planes)
    if out is None:
        out = torch.empty(planes.rows, planes.columns, dtype=dtype, device=planes.scales.device)
    _check("out", out, dtype, (planes.rows, planes.columns))
    for r, g in _blocks(planes.rows, planes.scales.shape[1], planes.group):
        columns = slice(g.start * planes.group, min(planes.columns, g.stop * planes.group))
        values = _block_values(planes, r, g)[:, : columns.stop - columns.start]
        out[r, columns].copy_(values)
        del values  # before the next block is made
    return out


def matmul(x: Tensor, planes: Planes) -> Tensor:
    """W x in the fp32 or fp64 of x [..., columns]: sum of (scale_p codes_p) x + offset (group sums of x)."""
    _check_whole(planes)
    if x.dtype not in (torch.float32, torch.float64) or x.shape[-1:] != (planes.columns,):
        raise UsageError(f"x is {x.dtype} {list(x.shape)}, expected fp32 or fp64 [..., {planes.columns}]")
    groups = num_groups(planes.columns, planes.group)
    padded = torch.nn.functional.pad(x, (0, groups * planes.group - planes.columns))
    grouped = padded.reshape(-1, groups, planes.group)  # [tokens, groups, group]
    lo, step = planes.scales.to(x.dtype).unbind(-1)  # [rows, groups]
    result: Tensor = grouped.sum(-1) @ (lo + step * planes.middle).T  # [tokens, rows]
    whole = slice(0, planes.rows), slice(0, groups)
    for packed, bits, weight in _fields(planes, *whole):
        codes = _unpack(packed, bits).view(planes.rows, groups, planes.group).to(x.dtype)
        result += grouped.flatten(1) @ (codes * (step * weight)[..., None]).flatten(1).T
    return result.reshape(*x.shape[:-1], planes.rows)


def _fp16_below(x: Tensor) -> Tensor:
    """The largest fp16 not above fp32 `x`. fp16 is sign and magnitude: a neighbour is one integer away."""
    near = x.half()
    bits = near.view(torch.int16)
    below = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, -0x7FFF))  # 0: the least negative
    return torch.where(near.float() > x, below, bits).view(torch.float16)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., group] below 2**bits -> bytes [..., group * bits / 8], as in the module docstring."""
    parts = (part << (bits * i) for i, part in enumerate(codes.chunk(8 // bits, dim=-1)))
    return reduce(torch.bitwise_or, parts)


def _pack_bits(codes: Tensor) -> Tensor:
    """Single bits [..., group] -> bytes [..., group / 8], in the places of a 2-bit plane."""
    first, second = _pack(codes, 2).chunk(2, dim=-1)
    return first | (second << 1)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`."""
    return torch.cat([(packed >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)], dim=-1)


def _spread(packed: Tensor) -> Tensor:
    """Bytes of single bits -> those of a 2-bit plane that holds the same codes."""
    return torch.cat([packed & 0x55, (packed >> 1) & 0x55], dim=-1)


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
    lower = _spread(cut(first, bit, groups * pair)) << 1
    if len(planes.planes) > 1:
        lower |= _spread(cut(planes.planes[1], bit))
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
        lanes = (
            packed.clone(memory_format=torch.contiguous_format).view(torch.int64).T.contiguous()
        )  # [words, cells]: long loops
        for i, piece in enumerate(part.chunk(8 // bits)):
            torch.bitwise_right_shift(lanes, bits * i, out=piece)
        part.bitwise_and_(((1 << bits) - 1) * _EACH_BYTE)
        merged += part.mul_(weight)  # no byte overflows: 12 * 15 + 15 = 195
    return merged.T.contiguous()


def _check_whole(planes: Planes) -> None:
    if planes.slabs:
        raise UsageError("slabs have no rows of their own: gather the rows wanted into a matrix first")


def _check(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise UsageError(f"{what} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")
