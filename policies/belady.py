"""Belady's bound: after each step the neurons stay whose next use comes soonest (IBM Systems Journal 5, 1966).

With bypass (Mattson et al., IBM Systems Journal 9, 1970): a neuron that is wanted again later than everything here is
not brought at all, nor is one that is not wanted again. All rows of a plane have one size and no upload is capped:
then no policy of this interface has more hits, given the same start or a worse one. Two neurons whose next use is in
the same step are told apart by the use after that, and so on: what is wanted in a step holds its slot during that step,
so who is here then decides who can be here afterwards. Under a cap it is a good policy but no bound, for it may choose
soon and cheap over late and lasting.
"""

from __future__ import annotations

from collections.abc import Sequence

from policies.arrays import BoolArray, IntArray, NDArray, np
from policies.protocol import Eviction


class Belady(Eviction):
    """Knows the future, so it serves comparisons only.

    Args:
        future: the wanted neurons of every step to come, each as `step` will be given them.
    """

    def __init__(self, future: Sequence[NDArray[np.integer]]) -> None:
        self._future = future

    def reset(self, neurons: int, slots: int) -> None:
        """Back to the first step of the future.

        Raises:
            IndexError: the future wants a neuron outside [0, `neurons`).
        """
        # A use is step * neurons + place, the place among the neurons of that step by the use that follows in turn.
        self._never = len(self._future) * neurons
        self._next = np.full(neurons, self._never, dtype=np.int64)  # the next use of each neuron
        self._after: list[IntArray] = []  # last step first: the use that follows, of each wanted
        for step in range(len(self._future) - 1, -1, -1):
            wanted = self._future[step]
            self._after.append(self._next[wanted])
            self._next[wanted[np.argsort(self._after[-1], kind="stable")]] = step * neurons + np.arange(len(wanted))
        self._slots, self._full, self._step = slots, 0, 0
        self._neuron_of = np.zeros(slots, dtype=np.int64)
        self._coming = self._next[:0]  # next uses of the misses that are worth bringing, soonest first

    def preload(self) -> IntArray:
        """The neurons with the soonest first use."""
        soonest = np.argsort(self._next, kind="stable")[: self._slots].astype(np.int64)
        return soonest[self._next[soonest] < self._never]

    def admit(self, wanted: IntArray, misses: IntArray) -> IntArray:
        """The misses that are wanted again, soonest first.

        Raises:
            ValueError: these are not the neurons that the future has for this step.
        """
        steps = len(self._future)
        if self._step >= steps or not np.array_equal(wanted, self._future[self._step]):
            raise ValueError(f"step {self._step} is not the one in the future of {steps} steps that was given")
        self._next[wanted] = self._after[-1 - self._step]
        self._step += 1
        uses = self._next[misses]
        order = np.argsort(uses, kind="stable")
        order = order[: np.count_nonzero(uses < self._never)]
        self._coming = uses[order]
        return misses[order]

    def victims(self, hits: IntArray, evictable: BoolArray, count: int) -> IntArray:
        """The slots with the latest next use, as long as what would come in their place is wanted sooner."""
        slots = evictable.nonzero()[0]
        uses = self._next[self._neuron_of[slots]]
        order = np.argsort(-uses, kind="stable")[:count]
        free = self._slots - self._full
        gains = np.count_nonzero(uses[order] > self._coming[free : free + count])
        return slots[order[:gains]]

    def loaded(self, neurons: IntArray, slots: IntArray) -> None:
        """Remember which neuron is where."""
        self._neuron_of[slots] = neurons
        if slots.size:
            self._full = max(self._full, int(slots.max()) + 1)
