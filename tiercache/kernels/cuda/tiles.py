"""Cuts a selection of rows into tiles, and brings tiles of planes that lie across the link near."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tiercache.kernels.cuda.driver import Driver
from tiercache.kernels.cuda.launches import FEW_TOKENS, MOST_PIECES, gather_call
from tiercache.kernels.cuda.row_lists import RowLists
from tiercache.quant.planes import Planes

SCRATCH_BYTES = 32 << 20
"""Upper bound of a tile of weights: decoded, or brought near. A single row or slice of rows may exceed it."""

_STORED_BYTES = 2  # of a weight, no less than planes and scales take at any precision and group

Tile = tuple[slice, list[Planes], RowLists]
"""Which of the selected rows, the matrices, and the rows of those to take."""


class Tiler:
    """See the module; for more tokens than `switch` weights are decoded first."""

    def __init__(self, launcher: Driver, device: torch.device, switch: int) -> None:
        self._launcher, self._device, self._switch = launcher, device, switch

    def tiles(self, tokens: int, weights: Sequence[Planes], rows: RowLists, unit: int = 1) -> Iterator[Tile]:
        """The selection cut up for passes over it, before multiples of `unit` rows.

        One pass takes all. More than one read planes again and again, so far planes are first brought near, in tiles.
        """
        count = rows.count(weights[0])
        if not count or not tokens:
            return
        if self.in_one_pass(tokens, weights):
            yield slice(0, count), list(weights), rows
            return
        padded = sum(weight.scales.shape[1] * weight.group for weight in weights)
        most = SCRATCH_BYTES // (padded * (4 if tokens > self._switch else _STORED_BYTES))
        step = max(1, most // unit) * unit
        for start in range(0, count, step):
            some = slice(start, min(count, start + step))
            near, chosen = list(weights), rows.cut(some)
            if not rows:
                near = [_rows_of(weight, some) for weight in weights]
            if tokens <= self._switch:
                near, chosen = [self._brought_near(weight, chosen) for weight in near], RowLists()
            yield some, near, chosen

    def in_one_pass(self, tokens: int, weights: Sequence[Planes]) -> bool:
        """Whether the selection is one tile."""
        if tokens <= FEW_TOKENS:
            return True
        return tokens <= self._switch and all(self._is_near(weight) for weight in weights)

    def gather(self, pieces: Sequence[Tensor], index: Tensor, out: Tensor) -> None:
        """Copy rows of byte matrices into `out`, one matrix after another; `index` is int32 on the device."""
        nbytes = index.numel() * sum(piece.shape[1] for piece in pieces)
        if not nbytes:
            return
        address = self._launcher.address
        at = address(out)
        for first in range(0, len(pieces), MOST_PIECES):
            some = [(address(piece), piece.stride(0), piece.shape[1]) for piece in pieces[first : first + MOST_PIECES]]
            self._launcher.launch(gather_call(some, index.data_ptr(), index.numel(), at))
            at += index.numel() * sum(width for _, _, width in some)

    def _is_near(self, weight: Planes) -> bool:
        return all(self._launcher.is_near(each) for each in (*weight.planes, weight.scales))

    def _brought_near(self, weight: Planes, rows: RowLists) -> Planes:
        """A copy of the rows in the device's memory."""
        rows = rows or RowLists((torch.arange(weight.rows, dtype=torch.int32, device=self._device),))
        pieces, count = [*weight.planes, weight.scales.flatten(1).view(torch.uint8)], rows.count(weight)
        block = torch.empty(count * sum(p.shape[1] for p in pieces), dtype=torch.uint8, device=self._device)
        parts = block.split([count * p.shape[1] for p in pieces])
        if len(rows.lists) == 1:
            self.gather(pieces, rows.lists[0], block)
        else:
            for piece, some, part in zip(pieces, rows.each(len(weight.planes)), parts, strict=True):
                self.gather([piece], some, part)
        planes = tuple(part.view(count, p.shape[1]) for part, p in zip(parts, weight.planes, strict=False))
        scales = parts[-1].view(torch.float16).view(count, -1, 2)
        return replace(weight, planes=planes, scales=scales, slabs=False)


def _rows_of(weight: Planes, some: slice) -> Planes:
    return replace(weight, planes=tuple(plane[some] for plane in weight.planes), scales=weight.scales[some])
