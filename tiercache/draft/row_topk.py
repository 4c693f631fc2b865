"""The highest few of each row of scores over a vocabulary, sooner than `torch.topk` finds them.

torch's walks over copies of whole rows on the CPU. Here one pass takes the highest of each block of columns; the
highest of a row lie in those blocks alone whose own highest are among the row's.
"""

import torch
from torch import Tensor

from tiercache.tiers.device import on_host

_BLOCK = 64  # columns, each so far from the next as there are blocks: whole rows of blocks are compared at once
_WORTH = 8  # times as many blocks as are wanted, at least, for the detour to pay


def row_topk(rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each row [rows, columns] the `count` highest values, highest first, and their columns: [rows, count] each.

    Which of equal values are taken is not defined, as in `torch.topk`; NaN is higher than any number.
    """
    blocks = rows.shape[1] // _BLOCK
    if not on_host(rows.device) or blocks < _WORTH * count:
        found = rows.topk(count)
        return found.values, found.indices
    whole = blocks * _BLOCK
    highest = rows[:, :whole].unflatten(1, (_BLOCK, blocks)).amax(1)
    columns = (highest.topk(count).indices[:, :, None] + torch.arange(0, whole, blocks)).flatten(1)
    if whole < rows.shape[1]:
        rest = torch.arange(whole, rows.shape[1]).expand(rows.shape[0], -1)
        columns = torch.cat((columns, rest), dim=1)
    values, places = rows.gather(1, columns).topk(count)
    return values, columns.gather(1, places)
