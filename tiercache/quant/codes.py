"""The two codes of a weight, which serve three precisions: nested quantisation in groups.

**Codes.** A *group* is a run of consecutive weights in one row. Each group has two scales, `lo` and `step`, in fp16.
Each weight has two codes of 4 bits, h and c:

    w ~ lo + step * (12 h + c)

**Precisions.** int8 reads all eight bits. int4 reads h alone, int3 only the upper 3 bits of h. Bits that are not read
count as the middle of what they could be: c as 7.5, the last bit of h as 1/2. So w ~ lo + step * (integer + middle),
with the middle 13.5, 7.5 or 0. The product of a step (11 significant bits) and a bracket (9) is exact in fp32. So a
decoder gets the same bits with or without fused multiply-add: only the sum is rounded, and then the output's type.

**Overlap.** The weights that int4 rounds to one level form a *cell*. A cell is 12 steps wide and c reaches over 16: 2
steps into either neighbour. So `quant.gptq` may choose the h that makes up best for int4's other errors, and c can
still say what int8 needs. With cells of 16, which do not overlap, int4 loses a fifth more. With cells of 8 int8 loses
half as much again (docs/measured.md).
"""

import torch
from torch import Tensor

from tiercache.errors import QuantizationError

CELL = 12
"""Steps from one int4 level to the next: what h counts."""

MIDDLES: tuple[float, ...] = (7.5 + CELL / 2, 7.5, 0.0)
"""What the bits below count for, in steps, where 1, 2 or 3 planes are read."""

TOP = 15
"""The largest h, and the largest c."""

_LEAST, _MOST = 7.5 - CELL / 2, 7.5 + CELL * (TOP + 0.5)  # what the int4 cells cover, in steps above lo
_WEIGHTS = (0.5, 1.0, 64.0)  # what a squared error counts at int3, int4 and int8
_FP16_MAX = 65504.0


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


def nearest_codes(w3: Tensor, w4: Tensor, w8: Tensor, lo: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
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
        h.clamp_(0, TOP)
        base = h * CELL
        c = (t8 - base).round_().clamp_(0, TOP)
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


def upper_codes(device: torch.device) -> Tensor:
    """h for each sum 12 h + c that can be."""
    sums, one = torch.arange(CELL * TOP + TOP + 1.0, device=device), torch.ones((), device=device)
    return nearest_codes(sums, sums, sums, one - 1, one)[0]


def _fp16_below(x: Tensor) -> Tensor:
    """The largest fp16 not above fp32 `x`. fp16 is sign and magnitude: a neighbour is one integer away."""
    near = x.half()
    bits = near.view(torch.int16)
    below = torch.where(near > 0, bits - 1, torch.where(near < 0, bits + 1, -0x7FFF))  # 0: the least negative
    return torch.where(near.float() > x, below, bits).view(torch.float16)
