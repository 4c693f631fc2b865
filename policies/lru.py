"""Least recently used: the neuron whose last use is oldest goes first (Mattson et al., IBM Systems Journal 9, 1970).

A step counts as many uses, one after the other: its hits in the order of importance, then its loads in their order.
The slots are kept as a queue in the order of last use, which one pass brings up to date: no clock and no sorting.
"""

from __future__ import annotations

from policies.arrays import BoolArray, IntArray, np
from policies.protocol import Eviction, nothing


class Lru(Eviction):
    """Equal to a cache of one key at a time that is asked for a step's hits, then its loads."""

    def reset(self, neurons: int, slots: int) -> None:
        """Forget the order of use."""
        self._queue = nothing()

    def victims(self, hits: IntArray, evictable: BoolArray, count: int) -> IntArray:
        """The `count` slots that were not used for longest; the hits become the newest."""
        rest = self._queue.take(evictable.take(self._queue).nonzero()[0])
        self._queue = np.concatenate((rest[count:], hits))
        return rest[:count]

    def loaded(self, neurons: IntArray, slots: IntArray) -> None:
        """The loads are newer than the hits."""
        self._queue = np.concatenate((self._queue, slots))
