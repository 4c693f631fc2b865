"""A block's planes in slots: the first ones stay in the upper tier, those above them come and go neuron by neuron.

Knows slots and slabs, not modules.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from policies.arrays import IntArray
from tiercache.kernels.contract import Parts, SlotRows
from tiercache.model.block_planes import BlockPlanes, Group, cut
from tiercache.quant.codes import MIDDLES
from tiercache.quant.planes import Planes
from tiercache.store.manifest import NeuronBlock
from tiercache.tiers.neurons import NeuronSlots
from tiercache.tiers.tier import SlotSource


class Deltas:
    """What the planes above add to a block's first ones, multiplied in main memory where they lie.

    The product is linear in the planes: with the first ones left out (zero), and with each group's `lo` replaced by
    minus what the first ones alone take for the middle of the unknown bits, what remains is W at the higher precision
    less W at the lower. Rounding that `lo` to fp16 is off by at most a 256th of a step.

    Args:
        scales: of the block: bytes [neurons, parts, bytes of a row's scales].
        above: the planes above, in main memory: [neurons, parts, bytes of a row].
    """

    def __init__(self, block: NeuronBlock, scales: Tensor, above: Sequence[Tensor]) -> None:
        halves = scales.cpu().contiguous().view(torch.float16).view(block.neurons, block.parts, -1, 2).clone()
        halves[..., 0] = halves[..., 1] * -MIDDLES[block.low - 1]
        zeros = [torch.zeros(1, 1, width, dtype=torch.uint8) for width in block.widths[: block.low]]
        first = [zero.expand(block.neurons, block.parts, -1) for zero in zeros]
        flat = halves.view(block.neurons, block.parts, -1).view(torch.uint8)
        self._parts = {block.low + count: cut(block, [*first, *above[:count]], flat) for count in _counts(above)}

    def group(self, precision: int, neurons: IntArray) -> Group:
        """Neurons to be raised to `precision`."""
        chosen = torch.from_numpy(neurons)
        return Group(precision, chosen, chosen, self._parts[precision], added=True)


def _counts(above: Sequence[Tensor]) -> range:
    return range(1, len(above) + 1)


class SlottedPlanes(BlockPlanes):
    """The first planes are one unit in the upper tier, the planes above lie in slots there. See `BlockPlanes`.

    Args:
        slots: of the planes above.
        deltas: multiplies in main memory what has no slot; None leaves such neurons at the precision at hand.
    """

    def __init__(
        self,
        block: NeuronBlock,
        supply: SlotSource,
        slots: NeuronSlots,
        device: torch.device,
        deltas: Deltas | None = None,
    ) -> None:
        super().__init__(block, supply, device)
        self._slots, self._deltas = slots, deltas
        self._low: tuple[list[Tensor], Tensor] | None = None

    def _cut(self, slot: Tensor) -> dict[int, list[Planes]]:
        block = self.block
        planes, scales = [block.plane(slot, plane) for plane in range(block.low)], block.scales(slot)
        self._low = planes, scales
        made = {precision: cut(block, planes[:precision], scales) for precision in range(1, block.low + 1)}
        slabs = [slab.view(len(slab), block.parts, -1) for slab in self._slots.slabs]
        for precision in range(block.low + 1, self.top + 1):
            made[precision] = cut(block, [*planes, *slabs[: precision - block.low]], scales, slabs=True)
        return made

    def groups(self, order: Tensor, counts: Sequence[int], *, keep: bool) -> list[Group]:
        high, middle, low = counts
        wanted = (high + middle + low, high + middle, high)[self.block.low :]
        neurons: IntArray = order.cpu().numpy()
        find = self._slots.peek if keep else self._slots.place
        rows = find(self.block.layer, neurons, wanted[: self.top - self.block.low])
        precisions = np.repeat((3, 2, 1), counts)
        here = np.full(len(neurons), self.block.low)
        for plane, found in enumerate(rows):
            here[: len(found)] += (found >= 0) & (here[: len(found)] == self.block.low + plane)
        groups: list[Group] = []
        added: list[Group] = []
        wished, precisions = precisions, np.minimum(precisions, here)
        if self._deltas is not None and not keep:
            lacking = precisions < wished
            precisions[lacking] = self.block.low
            for precision in range(self.block.low + 1, self.top + 1):
                at = np.flatnonzero(lacking & (wished == precision))
                if at.size:
                    added.append(self._deltas.group(precision, neurons[at]))
        for precision in (3, 2, 1):
            at = np.flatnonzero(precisions == precision)
            if at.size:
                groups.append(
                    self._group(
                        precision, neurons[at], [found[at] for found in rows[: max(0, precision - self.block.low)]]
                    )
                )
        return groups + added

    def _group(self, precision: int, neurons: IntArray, rows: Sequence[IntArray]) -> Group:
        own = torch.from_numpy(neurons).to(self.device)
        above = [torch.from_numpy(found).to(self.device) for found in rows]
        if not above:
            return Group(precision, own, own, self._placed[1][precision])
        selection = SlotRows((*([own] * self.block.low), *above), own)
        return Group(precision, own, selection, self._placed[1][precision])

    def held(self, group: Group) -> Group:
        if not isinstance(group.rows, SlotRows):
            return group
        low, down = self.block.low, group.parts[-1]
        slabs = zip(down.planes[low:], group.rows.planes[low:], strict=False)
        # another token may take the slots, and brings its own behind them
        copies = [plane.index_select(0, rows) for plane, rows in slabs]
        kept = replace(down, planes=(*down.planes[:low], *copies), slabs=True)
        here = torch.arange(len(group.neurons), device=self.device)
        rows = SlotRows((*([group.neurons] * low), *([here] * len(copies))), group.neurons)
        return Group(group.precision, group.neurons, rows, (kept,))

    def chunks(self, some: slice) -> Iterator[tuple[slice, Parts]]:
        assert self._low is not None
        block, (planes, scales) = self.block, self._low
        if self.top == block.low:
            yield slice(0, block.neurons), self._placed[1][self.top][some]
            return
        first, last, _ = some.indices(block.parts)
        widths = block.widths[block.low : self.top]
        for begin in range(0, block.neurons, self._slots.at_once):
            here = slice(begin, min(begin + self._slots.at_once, block.neurons))
            above = [
                self._slots.stage(block.layer, plane, here, slice(first * width, last * width)).view(
                    -1, last - first, width
                )
                for plane, width in enumerate(widths)
            ]
            yield here, cut(block, [*(plane[here, some] for plane in planes), *above], scales, some, neurons=here)
