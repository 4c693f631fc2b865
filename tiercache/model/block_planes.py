"""The planes of one feed-forward block's neurons, as matmuls want them: all at a precision, or some at some.

Knows slots and slabs, not modules. How neurons are chosen is told in `model.block_passes`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiercache.kernels.contract import Parts, Selection
from tiercache.quant.planes import Planes
from tiercache.store.manifest import NeuronBlock
from tiercache.tiers.tier import SlotSource

_ALL = slice(None)


@dataclass(frozen=True)
class Group:
    """Neurons that are multiplied at one precision.

    Attributes:
        precision: how many planes.
        neurons: which, [count].
        rows: where they lie in `parts`.
        parts: the inward matrices and the down matrix, at the precision; of a held group the down matrix alone.
        added: `parts` hold only the planes above those that another group multiplies, and lie in main memory; the
            products are added to that group's.
    """

    precision: int
    neurons: Tensor
    rows: Selection
    parts: Parts
    added: bool = False


def cut(
    block: NeuronBlock,
    planes: Sequence[Tensor],
    scales: Tensor,
    some: slice = _ALL,
    *,
    neurons: slice = _ALL,
    slabs: bool = False,
) -> list[Planes]:
    """Matrices of the block's parts `some`, from planes [neurons, those parts, bytes].

    Scales are those of all parts, likewise.
    """
    parts = range(block.parts)[some]
    rows = scales[neurons]
    return [
        Planes(
            tuple(plane[:, place] for plane in planes),
            rows[:, part].view(torch.float16).view(rows.shape[0], -1, 2),
            block.columns,
            block.group,
            slabs=slabs,
        )
        for place, part in enumerate(parts)
    ]


class BlockPlanes:
    """The planes of a block, from `open` to `close`: its first unit, and in a subclass what lies above it.

    Attributes:
        block: which.
        top: the most planes that any of its neurons can have.
        device: where they are multiplied.
        input_factors: factors of the inputs of the inward matrices, fp32 [columns]; None for ones.
        output_factors: factors of the down matrix's outputs, fp32 [columns], from the first `open` on.

    Args:
        supply: where its first unit comes from.
    """

    def __init__(self, block: NeuronBlock, supply: SlotSource, device: torch.device) -> None:
        self.block, self.top, self.device = block, len(block.units), device
        self._supply = supply
        self._held = False
        self._placed: tuple[int, dict[int, list[Planes]]] = 0, {}  # by precision, made once for a slot that stays
        self.input_factors: Tensor | None = None
        self.output_factors: Tensor | None = None

    def open(self) -> None:
        """The block's turn in a pass begins: what is always there is there when this returns."""
        slot = self._supply.acquire(self.block.units[0])
        self._held = True
        if self._placed[0] != slot.data_ptr():
            self._placed = slot.data_ptr(), self._cut(slot)
            self.input_factors, self.output_factors = self.block.input_factors(slot), self.block.output_factors(slot)

    def close(self) -> None:
        """Its turn is over; harmless when it had none."""
        if self._held:
            self._held = False
            self._supply.release(self.block.units[0])

    def whole(self, precision: int) -> Parts:
        """All neurons at a precision that is always there."""
        return self._placed[1][precision]

    def groups(self, order: Tensor, counts: Sequence[int], *, keep: bool) -> list[Group]:
        """The neurons of one token by precision.

        Args:
            order: neurons, most important first.
            counts: how many of them, in turn, are wanted at 3, 2 and 1 planes.
            keep: leave the slots as they are, and do with what is there.
        """
        raise NotImplementedError

    def held(self, group: Group) -> Group:
        """What of a group its down product will read, kept from the choices of the tokens that follow."""
        return group

    def chunks(self, some: slice) -> Iterator[tuple[slice, Parts]]:
        """All neurons' `some` of the parts at the top precision, as many at a time as fit, until the next."""
        raise NotImplementedError

    def _cut(self, slot: Tensor) -> dict[int, list[Planes]]:
        """The matrices of each precision over a slot."""
        raise NotImplementedError


class DirectPlanes(BlockPlanes):
    """All planes lie in one unit's slot, and are multiplied there. See `BlockPlanes`."""

    def _cut(self, slot: Tensor) -> dict[int, list[Planes]]:
        planes = [self.block.plane(slot, plane) for plane in range(self.top)]
        scales = self.block.scales(slot)
        return {precision: cut(self.block, planes[:precision], scales) for precision in range(1, self.top + 1)}

    def groups(self, order: Tensor, counts: Sequence[int], *, keep: bool) -> list[Group]:
        found, first = [], 0
        for precision, count in zip((3, 2, 1), counts, strict=True):
            some = order[first : first + count]
            first += count
            if count:
                here = min(precision, self.top)
                found.append(Group(here, some, some, self._placed[1][here]))
        return found

    def chunks(self, some: slice) -> Iterator[tuple[slice, Parts]]:
        yield slice(0, self.block.neurons), self._placed[1][self.top][some]
