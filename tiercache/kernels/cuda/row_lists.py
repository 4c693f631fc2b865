"""Which rows of a matrix a call takes, as the CUDA kernels read it: lists of int32 on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tiercache.kernels.contract import Selection, SlotRows
from tiercache.quant.planes import Planes


@dataclass(frozen=True)
class RowLists:
    """See the module.

    Attributes:
        lists: of each plane and, last, of the scales; one for all; none for all rows.
    """

    lists: tuple[Tensor, ...] = ()

    @staticmethod
    def of(rows: Selection, device: torch.device) -> RowLists:
        """The lists of a selection."""
        if rows is None:
            return RowLists()
        given = (*rows.planes, rows.scales) if isinstance(rows, SlotRows) else (rows,)
        return RowLists(tuple(each.to(device, torch.int32).contiguous() for each in given))

    def __bool__(self) -> bool:
        return bool(self.lists)

    def count(self, weight: Planes) -> int:
        """How many rows of `weight` are taken."""
        return len(self.lists[-1]) if self.lists else weight.rows

    def cut(self, some: slice) -> RowLists:
        """Some of the rows."""
        return RowLists(tuple(each[some] for each in self.lists))

    def each(self, planes: int) -> tuple[Tensor, ...]:
        """A list for each of so many planes and for the scales."""
        lists = self.lists
        return (*(lists[p] if len(lists) > 1 else lists[0] for p in range(planes)), lists[-1])

    def pointers(self, planes: int) -> list[int]:
        """What a kernel for so many planes is given; those it does not look at stay null."""
        if not self.lists:
            return []
        *own, scales = (each.data_ptr() for each in self.each(planes))
        return [*own, *[0] * (3 - planes), scales]
