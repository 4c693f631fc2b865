"""Slots in the upper tier for single neurons' planes, filled from the tier below as the neuron cache decides.

Knows layers and planes by number, rows of bytes, slots; never modules or what the bytes mean. A slot is a row of a
slab. One slab holds a plane's slots of all layers and, behind them, the passing rows: neurons fetched for one token.

Ordering: everything happens on the computing thread and its current stream; the tiers' owner has the stream of a pass
follow that of the pass before. A fetch gathers rows in the tier below into the plane's staging memory, copies that to
the passing rows, and copies rows that stay from there into their slots. Kernels queued later on the same stream see all
of it. An evicted row is overwritten only after the matmuls queued before have read it. A plane's staging memory is
written again once the copy before has read it: the thread sleeps until then, while other planes' kernels and copies are
under way.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from policies import eviction
from policies.arrays import IntArray
from policies.hot import hottest
from policies.neurons import NeuronResidency
from tiercache.kernels.contract import Kernels
from tiercache.stats.neurons import NeuronStats
from tiercache.tiers.device import Device, Event, device_of
from tiercache.tiers.link import Link
from tiercache.tiers.slab import Slab

PlaneRows = Callable[[int, int], Tensor]
INDEX_BYTES = 8  # of a row's number
NEURONS_PER_SUM = 512
"""The CPU's kernels sum the products of so many neurons before they add them to others."""


@dataclass(frozen=True)
class SlotPlan:
    """How the memory for neurons is divided.

    Attributes:
        slots: of each layer and plane.
        passing: rows of each plane for neurons that are fetched for one token only.
        widths: bytes of a neuron in each plane.
        neurons: of a layer.
    """

    slots: tuple[tuple[int, ...], ...]
    passing: tuple[int, ...]
    widths: tuple[int, ...]
    neurons: int

    @property
    def empty(self) -> bool:
        """Whether no layer has a slot."""
        return not any(map(any, self.slots))

    @property
    def nbytes(self) -> int:
        """All of it."""
        rows = [sum(layer[plane] for layer in self.slots) + more for plane, more in enumerate(self.passing)]
        return sum(count * width for count, width in zip(rows, self.widths, strict=True))


@dataclass(frozen=True)
class Caching:
    """How slots are given away.

    Attributes:
        policy: a name of `policies.eviction`.
        max_fetches: neurons that a token may fetch into a layer's plane at most.
        on_cpu: the CPU multiplies neurons without a slot in the tier below, and none is fetched for one token only.
        hot: how often each neuron is wanted, [layers, neurons]; the slots begin with the most wanted.
    """

    policy: str = "lfru"
    max_fetches: int | None = None
    on_cpu: bool = False
    hot: np.ndarray | None = None


class _Staging:
    """Pinned main memory that rows are gathered into, a piece for each plane, with the event that frees the piece.

    Args:
        plan: tells the most that each plane fetches at a time.
        device: that copies from it.
    """

    def __init__(self, plan: SlotPlan, device: Device) -> None:
        self._device = device
        self._sizes = [count * width for count, width in zip(plan.passing, plan.widths, strict=True)]
        indices = [INDEX_BYTES * count for count in plan.passing]
        self._slab = Slab(sum(indices) + sum(self._sizes), torch.device("cpu"), pinned_for=device.at)
        parts = self._slab.bytes.split([*indices, *self._sizes])  # indices first: they are aligned then
        self._indices = [part.view(torch.int64) for part in parts[: len(indices)]]
        self._rows = parts[len(indices) :]
        self._read_until: dict[int, Event | None] = {}

    def rows(self, plane: int, count: int, width: int) -> Tensor:
        """Memory for rows, once nothing reads it any more."""
        self._wait(plane)
        rows: Tensor = self._rows[plane]
        return rows[: count * width].view(count, width)

    def index(self, plane: int, index: Tensor) -> Tensor:
        """A copy of an index; the one before must have been read as well, with the rows that were kept by it."""
        kept: Tensor = self._indices[plane]
        return kept[: index.numel()].copy_(index)

    def copied(self, plane: int) -> None:
        """The current stream reads the plane's piece until here."""
        self._read_until[plane] = self._device.last_use()

    def close(self) -> None:
        """Unlock the memory, once the device has done all that it was asked for."""
        self._slab.close()

    def _wait(self, plane: int) -> None:
        event = self._read_until.pop(plane, None)
        if event is not None:
            event.synchronize()


class NeuronSlots:
    """See the module. Planes are counted from the first that has slots.

    Args:
        plan: how `memory` is divided.
        memory: uint8, of `plan.nbytes`, in the upper tier.
        lower: gives the rows of a layer's plane in the tier below: uint8 [neurons, width].
        caching: who stays.
        kernels: gather rows in the tier below.
        link: what copies cross.
        stats: where to count.
    """

    def __init__(
        self,
        plan: SlotPlan,
        memory: Tensor,
        lower: PlaneRows,
        caching: Caching,
        kernels: Kernels,
        link: Link,
        stats: NeuronStats,
    ) -> None:
        self.plan, self.stats = plan, stats
        self._lower, self._caching, self._kernels, self._link = lower, caching, kernels, link
        self.slabs: list[Tensor] = []
        self._base: list[list[int]] = []
        at = 0
        for plane, width in enumerate(plan.widths):
            counts = [layer[plane] for layer in plan.slots]
            rows = sum(counts) + plan.passing[plane]
            self.slabs.append(memory[at : at + rows * width].view(rows, width))
            self._base.append([sum(counts[:layer]) for layer in range(len(counts) + 1)])
            at += rows * width
        self._device = device_of(memory.device)
        self._staging = None if self._device.on_host else _Staging(plan, self._device)
        self._residencies = [
            [self._residency(layer, plane) for plane in range(len(plan.widths))] for layer in range(len(plan.slots))
        ]

    def _residency(self, layer: int, plane: int) -> NeuronResidency:
        slots = self.plan.slots[layer][plane]
        hot = None if self._caching.hot is None else self._caching.hot[layer]
        policy = eviction.make(self._caching.policy, hot=hot)
        return NeuronResidency(self.plan.neurons, slots, policy, max_fetches=self._caching.max_fetches)

    def close(self) -> None:
        """Wait for the device and unlock the staging memory; harmless when done twice."""
        self._device.synchronize()  # kernels may still read the slots, whose memory is the caller's
        if self._staging is not None:
            self._staging.close()

    def fill(self) -> None:
        """Before the first pass: fetch the neurons most often wanted into the slots, where that is known."""
        if self._caching.hot is None:
            return
        for layer, residencies in enumerate(self._residencies):
            heat = self._caching.hot[layer]
            for plane, residency in enumerate(residencies):
                chosen = hottest(heat, residency.slots)
                slots = residency.warm(chosen)
                for first in range(0, len(chosen), max(1, self.plan.passing[plane])):
                    part = slice(first, first + max(1, self.plan.passing[plane]))
                    self._fetch(layer, plane, chosen[part])
                    self._keep(layer, plane, slots[part])

    def place(self, layer: int, order: IntArray, counts: Sequence[int]) -> list[IntArray]:
        """One token's wishes: `order[:counts[plane]]` is wanted in each plane, most important first.

        Returns:
            for each plane the row of its slab in which each of them lies, -1 for a neuron that has none.
        """
        found = []
        for plane, count in enumerate(counts):
            try:
                found.append(self._place(layer, plane, order[:count]))
            except BaseException:  # Ctrl-C among them: slots that may lack what the table says are given up
                self._residencies[layer][plane].clear()
                raise
        return found

    def _place(self, layer: int, plane: int, wanted: IntArray) -> IntArray:
        """The rows in one plane; see `place`."""
        residency, caching = self._residencies[layer][plane], self._caching
        began_at = time.perf_counter()
        step = residency.step(wanted)
        self.stats.policy_s += time.perf_counter() - began_at
        fetched = 0 if caching.on_cpu else min(step.refused.size, self.plan.passing[plane] - step.loads.size)
        if caching.max_fetches is not None:
            fetched = min(fetched, caching.max_fetches - step.loads.size)
        moved = np.concatenate((step.loads, step.refused[:fetched]))
        self._fetch(layer, plane, moved)
        self.stats.moved_bytes += moved.size * self.plan.widths[plane]
        self._keep(layer, plane, step.slots)
        rows = self._rows(layer, plane, residency.slot_of[wanted])
        if fetched:
            passing = np.full(self.plan.neurons, -1)
            passing[step.refused[:fetched]] = self._behind(plane) + step.loads.size + np.arange(fetched)
            rows = np.where(rows >= 0, rows, passing[wanted])
        self._count(plane, step.hits.size, wanted.size, moved.size, step.refused.size - fetched, residency)
        return rows

    def peek(self, layer: int, order: IntArray, counts: Sequence[int]) -> list[IntArray]:
        """What `place` would find, with nothing fetched and nothing changed."""
        return [
            self._rows(layer, plane, self._residencies[layer][plane].slot_of[order[:count]])
            for plane, count in enumerate(counts)
        ]

    @property
    def max_fetches(self) -> int | None:
        """Neurons that a token may fetch into a layer's plane at most."""
        return self._caching.max_fetches

    @property
    def at_once(self) -> int:
        """Neurons that `stage` can fetch at a time: all, or a multiple of NEURONS_PER_SUM."""
        most = min(self.plan.passing)
        return most if most >= self.plan.neurons else most // NEURONS_PER_SUM * NEURONS_PER_SUM or most

    def stage(self, layer: int, plane: int, neurons: slice, columns: slice) -> Tensor:
        """Fetch some neurons: these bytes of their rows, valid until the next call for the plane."""
        fetched = self._fetch(layer, plane, np.arange(neurons.start, neurons.stop), columns)
        self.stats.dense_bytes += fetched.numel()
        return fetched

    def _behind(self, plane: int) -> int:
        """The first row behind the slots."""
        return self._base[plane][-1]

    def _rows(self, layer: int, plane: int, slots: IntArray) -> IntArray:
        return np.where(slots >= 0, slots + self._base[plane][layer], -1)

    def _fetch(self, layer: int, plane: int, neurons: IntArray, columns: slice = slice(None)) -> Tensor:  # noqa: B008
        """Copy rows of `neurons`, or some bytes of each, to behind the slots, in one block."""
        began_at, source = time.perf_counter(), self._lower(layer, plane)[:, columns]
        width, behind = source.shape[1], self.slabs[plane][self._behind(plane) :]
        target = behind.view(-1)[: neurons.size * width].view(-1, width)
        if not neurons.size:
            return target
        staging = target if self._staging is None else self._staging.rows(plane, neurons.size, width)
        self._kernels.gather([source], torch.from_numpy(neurons), staging.view(-1))
        if self._staging is not None:
            target.copy_(staging, non_blocking=True)
            self._staging.copied(plane)
        self._link.carry(neurons.size * width, began_at)
        return target

    def _keep(self, layer: int, plane: int, slots: IntArray) -> None:
        """Copy the first rows behind the slots into `slots`."""
        if not slots.size:
            return
        kept, passing = self.slabs[plane].tensor_split([self._behind(plane)])
        index = torch.from_numpy(slots + self._base[plane][layer])
        if self._staging is not None:
            index = self._staging.index(plane, index).to(kept.device, non_blocking=True)
            self._staging.copied(plane)
        kept.index_copy_(0, index, passing[: slots.size])

    def _count(self, plane: int, hits: int, wanted: int, moved: int, lacking: int, residency: NeuronResidency) -> None:
        width = self.plan.widths[plane]
        self.stats.requests += wanted
        self.stats.hits += hits
        self.stats.hit_bytes += hits * width
        self.stats.wanted_bytes += wanted * width
        self.stats.at_hand += 0 if self._caching.on_cpu else lacking
        self.stats.below += lacking if self._caching.on_cpu else 0
        self.stats.uploads += moved
        self.stats.chance_hits += wanted * residency.slots / max(1, self.plan.neurons)
