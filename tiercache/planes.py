"""Weights as sums of planes: nested group-wise quantisation, one stored copy for three precisions.

Knows tensors; nothing of files, tiers or models. `decode` and `product` are the oracles of `kernels/`.

**Codes.** A row of `columns` weights is cut into groups of `group` consecutive columns (the last one padded).
Each group stores `lo` and `step` in fp16, rounded outwards so that [lo, lo + 256 step] covers the group, and
each weight an 8-bit code measured against those *stored* values:

    u = floor((w - lo) / step), 0..255        u = 64 a + 16 b + c        planes a, b, c of 2, 2 and 4 bits

**Rungs.** Reading only the first planes (int2: a; int4: a, b; int8: all) leaves the low k = 6, 4 or 0 bits
unknown, so the weight is rebuilt in the middle of what they could be:

    w ~ lo + step * (2**k * top + 2**k / 2)         |w - decoded| <= step * 2**k / 2, up to fp32 rounding

`step` has 11 significant bits and the bracket 9, so their product is exact in fp32: a decoder gets the same
bits with or without fused multiply-add; only the sum is rounded (then, once more, to the output type).

**Packing.** A plane of b bits takes B = group * b / 8 bytes per group; code i of the group lies in byte
`i % B` at bit `b * (i // B)`: one shift and mask of all bytes yields B consecutive codes. Padding has code 0.

**Choice** (examples/pico/rungs.py: KL in nats from the 16-bit pico on 8k held-out tokens, int2 | int4; int8
loses nothing). This .044 | .0024; direct .067 | .0023, direct with the best clipping .052 | .0023; rounded
twice .073 | .0027; least-squares levels .056 | .0023 (least error, but shrunken weights); levels with a gain
against that .042 | .0022, not worth a second formula; group 32 .042 | .0024, group 128 .048 | .0029. The head
at the rung as well .107 | .0061; the head at int8 as without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor

from tiercache.errors import QuantizationError, UsageError

PLANE_BITS: tuple[int, ...] = (2, 2, 4)
"""Bits of each plane, most significant first; they sum to 8."""

PLANE_SHIFTS: tuple[int, ...] = (6, 4, 0)
"""Where each plane's lowest bit stands in the 8-bit code."""

RUNGS: Mapping[str, int] = {"int2": 1, "int4": 2, "int8": 3}
"""Precision name -> number of planes read."""

GROUPS: tuple[int, ...] = (32, 64, 128)  # allowed sizes, in columns

DECODE_SCRATCH_BYTES = 8 << 20
"""Upper bound of what `decode` allocates besides its output, whatever the matrix."""

_BLOCK = 1 << 20  # weights decoded or encoded at a time; decode needs less than 6 bytes of scratch for each
_FP16_MAX = 65504.0
_EACH_BYTE = 0x0101010101010101  # times a byte below 128: that byte eight times, in an int64


def num_groups(columns: int, group: int) -> int:
    """Groups in a row of `columns` weights, the last one padded."""
    if group not in GROUPS or columns < 1:
        raise UsageError(f"{columns} columns in groups of {group}: need columns >= 1 and group in {GROUPS}")
    return -(-columns // group)


def plane_row_bytes(columns: int, group: int, plane: int) -> int:
    """Bytes of one row of plane `plane` (0 is the most significant)."""
    return num_groups(columns, group) * group * PLANE_BITS[plane] // 8


def scale_row_bytes(columns: int, group: int) -> int:
    """Bytes of one row of scales: fp16 lo and fp16 step, interleaved, per group."""
    return 4 * num_groups(columns, group)


@dataclass(frozen=True, eq=False)  # as tensors are: equal only to itself, so that it can be a key
class Planes:
    """A matrix held as its first planes; how many are held is its rung.

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
    def rung(self) -> str:
        """Name of the precision held: the key of `RUNGS`."""
        return next(name for name, count in RUNGS.items() if count == len(self.planes))

    @property
    def missing_bits(self) -> int:
        """Low bits of the 8-bit code that the planes held do not tell: 6, 4 or 0."""
        return 8 - sum(PLANE_BITS[: len(self.planes)])

    def at(self, rung: str) -> Planes:
        """The same matrix at a lower (or the same) rung: a view, nothing is copied."""
        count = RUNGS.get(rung)
        if count is None or count > len(self.planes):
            raise UsageError(f"rung {rung!r} of a matrix held at {self.rung}; rungs are {', '.join(RUNGS)}")
        return Planes(self.planes[:count], self.scales, self.columns, self.group, slabs=self.slabs)


def encode(weight: Tensor, group: int = 64, *, first_row: int = 0) -> Planes:
    """Quantise `weight` [rows, columns] (fp32, fp16 or bf16, any strides) to all three planes, on its device.

    Errors count rows from `first_row`, for callers that encode a matrix block by block.

    Raises QuantizationError for NaN, infinity or a magnitude above fp16's 65504, UsageError for other dtypes.
    """
    if weight.ndim != 2 or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"weight is {weight.dtype} {list(weight.shape)}, expected a 16- or 32-bit matrix")
    rows, columns = weight.shape
    groups = num_groups(columns, group)
    scales = torch.empty(rows, groups, 2, dtype=torch.float16, device=weight.device)
    shapes = [(rows, groups, group * bits // 8) for bits in PLANE_BITS]
    planes = [torch.empty(shape, dtype=torch.uint8, device=weight.device) for shape in shapes]
    for r, g in _blocks(rows, groups, group):
        values = weight[r, g.start * group : g.stop * group].float()
        ragged = (g.stop - g.start) * group - values.shape[1]
        if ragged:  # repeat the last column: it changes no group's range
            values = torch.cat([values, values[:, -1:].expand(-1, ragged)], dim=1)
        values = values.reshape(values.shape[0], -1, group)  # [r, g, group]
        lo, step = _ranges(values, first_row=first_row + r.start)
        scales[r, g, 0], scales[r, g, 1] = lo, step
        lo, step = lo.float()[..., None], step.float()[..., None]
        codes = ((values - lo) / step.where(step > 0, torch.inf)).clamp_(0, 255).to(torch.uint8)  # floor
        codes[:, -1, group - ragged :] = 0
        for plane, bits, shift in zip(planes, PLANE_BITS, PLANE_SHIFTS, strict=True):
            plane[r, g] = _pack((codes >> shift) & ((1 << bits) - 1), bits)
    return Planes(tuple(plane.flatten(1) for plane in planes), scales, columns, group)


def decode(planes: Planes, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The weights [rows, columns] at the rung held, in `dtype`; written into `out` (any strides) when given.

    Works block by block: besides the result it allocates less than DECODE_SCRATCH_BYTES. Every element is the
    same arithmetic on the same codes: no block size, stride or place of a plane changes a bit of the result.

    Raises UsageError for slabs, which have no rows of their own.
    """
    _check_whole(planes)
    if out is None:
        out = torch.empty(planes.rows, planes.columns, dtype=dtype, device=planes.scales.device)
    _check("out", out, dtype, (planes.rows, planes.columns))
    for r, g in _blocks(planes.rows, planes.scales.shape[1], planes.group):
        target = out[r, g.start * planes.group : g.stop * planes.group]
        target.copy_(_block_values(planes, r, g)[:, : target.shape[1]])
    return out


def product(x: Tensor, planes: Planes) -> Tensor:
    """W x in the fp32 or fp64 of x [..., columns]: sum of (scale_p codes_p) x + offset (group sums of x)."""
    _check_whole(planes)
    if x.dtype not in (torch.float32, torch.float64) or x.shape[-1:] != (planes.columns,):
        raise UsageError(f"x is {x.dtype} {list(x.shape)}, expected fp32 or fp64 [..., {planes.columns}]")
    groups = num_groups(planes.columns, planes.group)
    padded = torch.nn.functional.pad(x, (0, groups * planes.group - planes.columns))
    grouped = padded.reshape(-1, groups, planes.group)  # [tokens, groups, group]
    lo, step = planes.scales.to(x.dtype).unbind(-1)  # [rows, groups]
    result: Tensor = grouped.sum(-1) @ (lo + step * (2**planes.missing_bits / 2)).T  # [tokens, rows]
    for plane, bits, shift in zip(planes.planes, PLANE_BITS, PLANE_SHIFTS, strict=False):
        codes = _unpack(plane.reshape(planes.rows, groups, planes.group * bits // 8), bits).to(x.dtype)
        result += grouped.flatten(1) @ (codes * (step * 2**shift)[..., None]).flatten(1).T
    return result.reshape(*x.shape[:-1], planes.rows)


def _ranges(values: Tensor, first_row: int) -> tuple[Tensor, Tensor]:
    """fp16 lo and step [rows, groups] of fp32 values [rows, groups, group], rounded outwards."""
    least, most = values.amin(-1), values.amax(-1)  # both carry NaN
    held = (least >= -_FP16_MAX) & (most <= _FP16_MAX)
    if not bool(held.all()):
        row, at = (int(i) for i in (~held).nonzero()[0])
        raise QuantizationError(
            f"row {first_row + row} holds {float(least[row, at])} to {float(most[row, at])}; weights must be "
            f"finite and within +-{_FP16_MAX:.0f}: repair the checkpoint or leave this matrix unquantised"
        )
    constant = least == most  # step 0, and lo rounded to nearest: the same value back at every rung
    lo = least.half().where(constant, _fp16_below(least))
    step = -_fp16_below((lo.float() - most) / 256)
    return lo, step.where(~constant, 0)


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


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`."""
    return torch.cat([(packed >> (bits * i)) & ((1 << bits) - 1) for i in range(8 // bits)], dim=-1)


def _blocks(rows: int, groups: int, group: int) -> Iterator[tuple[slice, slice]]:
    """Slices of rows and groups that cut a matrix into pieces of at most _BLOCK weights (or one group)."""
    wide = min(groups, max(1, _BLOCK // group))
    high = max(1, _BLOCK // (wide * group))
    for r in range(0, rows, high):
        for g in range(0, groups, wide):
            yield slice(r, min(rows, r + high)), slice(g, min(groups, g + wide))


def _block_values(planes: Planes, r: slice, g: slice) -> Tensor:
    """The weights of a block in fp32, padding included: [rows, groups * group]."""
    values = _merged_codes(planes, r, g).view(torch.uint8).float()  # [cells, group]
    if planes.missing_bits == 0:
        values += 0.5  # the other rungs carry their half in the code
    scales = planes.scales[r, g].reshape(-1, 2).float()  # [cells, 2]
    values.mul_(scales[:, 1:]).add_(scales[:, :1])
    return values.view(r.stop - r.start, -1)


def _merged_codes(planes: Planes, r: slice, g: slice) -> Tensor:
    """Code bytes of a block's cells (row, group), unknown bits at their middle: int64 [cells, group / 8]."""
    cells, half = (r.stop - r.start) * (g.stop - g.start), (1 << planes.missing_bits) >> 1
    shape, device = (planes.group // 8, cells), planes.scales.device
    merged = torch.full(shape, half * _EACH_BYTE, dtype=torch.int64, device=device)
    part = torch.empty_like(merged)
    for plane, bits, shift in zip(planes.planes, PLANE_BITS, PLANE_SHIFTS, strict=False):
        width = planes.group * bits // 8  # bytes per group
        packed = plane[r, g.start * width : g.stop * width].clone(memory_format=torch.contiguous_format)
        lanes = packed.view(torch.int64).view(cells, width // 8).T.contiguous()  # [words, cells]: long loops
        for i, piece in enumerate(part.chunk(8 // bits)):
            torch.bitwise_right_shift(lanes, bits * i, out=piece)
        merged |= part.bitwise_and_(((1 << bits) - 1) * _EACH_BYTE).bitwise_left_shift_(shift)
    return merged.T.contiguous()


def _check_whole(planes: Planes) -> None:
    if planes.slabs:
        raise UsageError("slabs have no rows of their own: gather the rows wanted into a matrix first")


def _check(what: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape:
        raise UsageError(f"{what} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}")
