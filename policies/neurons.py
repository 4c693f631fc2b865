"""Which neurons of a layer are in a plane's slots, and what one token changes about it.

The one place where the neuron cache decides: the engine moves rows as a `Step` says, and a replay of a recorded trace
asks the same object and gets the same hits, loads and evictions. Knows neither time nor bytes. A step touches every
wanted neuron a few times in numpy and never one at a time: microseconds, for it runs once a layer, plane and token.
"""

from __future__ import annotations

from dataclasses import dataclass

from policies.arrays import IntArray, np
from policies.protocol import Eviction

__all__ = ["IntArray", "NeuronResidency", "Step"]


@dataclass(frozen=True)
class Step:
    """What one token does to the slots; `hits`, `loads` and `refused` together are what it wanted.

    Attributes:
        hits: wanted neurons that were here before, most important first; they stay where they are.
        loads: neurons brought now, in the order in which to bring them.
        slots: the slot of each of `loads`.
        evicted: neurons that lost their slot to a load.
        refused: wanted, not here and not brought, most important first: beyond `max_fetches`, no room, or not worth it.
    """

    hits: IntArray
    loads: IntArray
    slots: IntArray
    evicted: IntArray
    refused: IntArray


class NeuronResidency:
    """The neurons of one layer in one plane's slots.

    Slots are filled in ascending order and never emptied but for a load in the same step.

    Args:
        neurons: of the layer.
        slots: of this plane, each for one neuron; 0 refuses everything.
        eviction: who comes and who leaves; it belongs to this residency from now on, and is reset.
        max_fetches: loads in one step at most; None for as many as there is room for.

    Attributes:
        slot_of: [neurons], the slot of each, -1 where absent; to read, not to write.

    Raises:
        ValueError: a number is negative, or the policy does not fit the neurons.
    """

    def __init__(self, neurons: int, slots: int, eviction: Eviction, *, max_fetches: int | None = None) -> None:
        if min(neurons, slots, max_fetches or 0) < 0:
            raise ValueError(f"{neurons} neurons, {slots} slots, {max_fetches} fetches: none may be negative")
        self.neurons, self.slots, self.max_fetches = neurons, slots, max_fetches
        self._eviction = eviction
        self.slot_of: IntArray = np.empty(neurons, dtype=np.int64)
        self._neuron_of: IntArray = np.zeros(slots, dtype=np.int64)
        self.clear()

    @property
    def resident(self) -> IntArray:
        """The neurons that are here, ascending."""
        return np.flatnonzero(self.slot_of >= 0)

    def clear(self) -> None:
        """Empty every slot, and let the policy forget."""
        self.slot_of.fill(-1)
        self._full = 0  # the slots [0, _full) hold neurons
        self._eviction.reset(self.neurons, self.slots)

    def warm(self, neurons: IntArray) -> IntArray:
        """Put neurons into free slots, most important first, and return the slot of each.

        The policy takes them as used one after the other, the most important last.

        Raises:
            ValueError: out of range, twice, here already, or more than there are free slots.
        """
        neurons = self._checked(neurons)
        free = self.slots - self._full
        if neurons.size > free:
            raise ValueError(f"{neurons.size} neurons for {free} free slots: give the first {free}")
        if np.any(self.slot_of[neurons] >= 0) or self._doubled(neurons):
            raise ValueError("a neuron twice, or one that is here already: give each absent neuron once")
        slots = np.arange(self._full, self._full + neurons.size)
        self._put(neurons, slots)
        self._full += neurons.size
        self._eviction.loaded(neurons[::-1], slots[::-1])
        return slots

    def step(self, wanted: IntArray) -> Step:
        """One token: the neurons it wants, and what changes so that more of them are here.

        Misses are brought in the given order, unless the policy declines some or prefers another, into free slots
        first, then in place of neurons that are not wanted now.

        Args:
            wanted: distinct neurons, most important first.

        Raises:
            ValueError: not whole numbers, out of range, or a neuron twice; nothing has changed then.
        """
        wanted = self._checked(wanted)
        self.slot_of.max(initial=-1)  # read in order: brings the table into the CPU's cache before it is read at random
        where = self.slot_of.take(wanted, mode="clip")
        here = where >= 0
        at = here.nonzero()[0]
        hits, hit_slots = wanted.take(at), where.take(at)
        misses = wanted.take((~here).nonzero()[0])
        evictable = np.ones(self.slots, dtype=np.bool_)  # new each time: memory that the caches still know
        evictable[self._full :] = False
        evictable[hit_slots] = False
        others = self._full - hits.size
        if np.count_nonzero(evictable) != others or self._doubled(misses):
            raise ValueError("a neuron is wanted twice: give each once")
        bring = self._eviction.admit(wanted, misses)
        most = bring.size if self.max_fetches is None else min(bring.size, self.max_fetches)
        free = min(most, self.slots - self._full)
        gone = self._eviction.victims(hit_slots, evictable, min(most - free, others))
        loads = bring[: free + gone.size]
        slots = np.concatenate((np.arange(self._full, self._full + free), gone))
        evicted = self._neuron_of.take(gone)
        self.slot_of[evicted] = -1
        self._put(loads, slots)
        self._full += free
        self._eviction.loaded(loads, slots)
        return Step(hits, loads, slots, evicted, self._without(misses, loads, in_order=bring is misses))

    def _checked(self, wanted: IntArray) -> IntArray:
        wanted = np.asarray(wanted)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise ValueError(f"neurons as {wanted.dtype} of shape {wanted.shape}: give one row of whole numbers")
        wanted = wanted.astype(np.int64, copy=False)
        if wanted.size and wanted.view(np.uint64).max() >= self.neurons:  # a negative one is a huge one
            raise ValueError(f"neurons from {wanted.min()} to {wanted.max()}: a layer has [0, {self.neurons})")
        return wanted

    def _doubled(self, neurons: IntArray) -> bool:
        marked = np.zeros(self.neurons, dtype=np.bool_)
        marked[neurons] = True
        return int(np.count_nonzero(marked)) != neurons.size

    def _put(self, neurons: IntArray, slots: IntArray) -> None:
        self.slot_of[neurons] = slots
        self._neuron_of[slots] = neurons

    def _without(self, misses: IntArray, loads: IntArray, *, in_order: bool) -> IntArray:
        """The misses that were not loaded; `in_order` where the loads are the first of them."""
        if in_order:
            return misses[loads.size :]
        left = np.ones(self.neurons, dtype=np.bool_)
        left[loads] = False
        return misses.take(left.take(misses).nonzero()[0])
