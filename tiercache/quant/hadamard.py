"""The Hadamard transform of rows in blocks of 64 numbers: it spreads a large number over its block.

Planes hold rows that were transformed first. Otherwise one large weight would set the step of its whole group, and
every model has a few inputs and outputs with large weights. (QuaRot, arXiv 2404.00456, section 4, transforms whole
rows.) Numbers behind the last whole block stay as they are. The transform is its own inverse, and it is orthogonal: the
product of a transformed row with transformed inputs is the product of the row with the inputs.

The columns of a matrix may have *factors*, which are positive and fp32. A row is divided by them before it is
transformed. Down matrices lie transposed, so that their columns are outputs: there the factor is the largest magnitude
of the output's weights. The columns of others are inputs: there `quant.gptq` chooses the factors, and whoever has the
inputs multiplies them by the factors.
"""

import torch
from torch import Tensor

from tiercache.quant.planes import DECODE_SCRATCH_BYTES, Planes, decode

BLOCK = 64
_FACTOR = 0.125  # one over the root of BLOCK: exact
RESTORING_BYTES = 24
"""Scratch for a number that is restored, before the bound sets in: decoding it, and two stages of the transform."""


def transform(x: Tensor) -> Tensor:
    """x [..., columns] in fp32 or fp64 -> the same shape, each whole block of 64 columns times H / 8.

    Six stages of sums and differences of numbers 1, 2, 4, ... 32 places apart: every implementation adds in this order,
    so that all give the same bits.
    """
    columns = x.shape[-1]
    whole = columns // BLOCK * BLOCK
    blocks = x[..., :whole].reshape(-1, BLOCK)
    apart = 1
    while apart < BLOCK:
        pairs = blocks.view(-1, BLOCK // (2 * apart), 2, apart)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        blocks = torch.stack((first + second, first - second), dim=2).view(-1, BLOCK)
        apart *= 2
    done = (blocks * _FACTOR).view(*x.shape[:-1], whole)
    return done if whole == columns else torch.cat([done, x[..., whole:]], dim=-1)


def stored(rows: Tensor, factors: Tensor | None = None) -> Tensor:
    """What planes hold of rows [..., columns] of a matrix: fp32, divided by the columns' factors, transformed."""
    return transform(rows.float() if factors is None else rows.float() / factors)


def restored(planes: Planes, factors: Tensor | None, out: Tensor) -> Tensor:
    """The rows that were given to `stored`, at the precision held, into `out` [rows, columns] of any dtype and strides.

    Besides the result it allocates less than DECODE_SCRATCH_BYTES, for rows that are not longer than that.
    """
    high = max(1, DECODE_SCRATCH_BYTES // (RESTORING_BYTES * planes.columns))
    for first in range(0, planes.rows, high):
        r = slice(first, first + high)
        some = Planes(tuple(plane[r] for plane in planes.planes), planes.scales[r], planes.columns, planes.group)
        rows = transform(decode(some, torch.float32))
        out[r].copy_(rows if factors is None else rows.mul_(factors))
    return out
