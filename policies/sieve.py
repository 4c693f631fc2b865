"""SIEVE: a queue in the order of arrival, one bit for each neuron, and a hand (Zhang et al., NSDI 2024, algorithm 1).

The hand goes from the tail (oldest) to the head and round again. What was used since it came by last is spared and its
bit cleared, without moving it; the first that was not used goes. A neuron that is wanted now is spared on every round.
One step's evictions are found in one pass over the queue; the result is that of taking its loads one at a time.
"""

from __future__ import annotations

from policies.arrays import BoolArray, IntArray, np
from policies.protocol import Eviction, nothing


class Sieve(Eviction):
    """A hit costs one bit; survivors keep their place in the queue, so what was wanted once is soon swept out."""

    def reset(self, neurons: int, slots: int) -> None:
        """An empty queue, and the hand at its tail."""
        self._queue = nothing()  # full slots, oldest arrival first
        self._visited = np.zeros(slots, dtype=np.bool_)
        self._hand = 0  # place in the queue; beyond its end: at what comes next, if anything

    def victims(self, hits: IntArray, evictable: BoolArray, count: int) -> IntArray:
        """The next `count` slots that the hand sweeps out."""
        self._visited[hits] = True
        if not count:
            return nothing()
        places = self._round(evictable & ~self._visited)[:count]
        if places.size == count:
            self._clear(int(places[-1]))
        else:  # a second round, now that every bit is cleared
            again = self._round(evictable & self._visited)[: count - places.size]
            places = np.concatenate((places, again))
            self._visited.fill(False)
        last = int(places[-1])
        stays = np.ones(self._queue.size, dtype=np.bool_)
        stays[places] = False
        gone = self._queue.take(places)
        self._hand = int(np.count_nonzero(stays[:last]))
        self._queue = self._queue.take(stays.nonzero()[0])
        return gone

    def loaded(self, neurons: IntArray, slots: IntArray) -> None:
        """The loads come to the head, unvisited."""
        beyond = self._hand >= self._queue.size
        if beyond and slots.size < 2:  # the last to come was not there yet when the hand went on: back to the tail
            self._hand = 0
        self._queue = np.concatenate((self._queue, slots))

    def _round(self, sought: BoolArray) -> IntArray:
        """Places of the queue whose slots are sought, as the hand meets them in one round."""
        places = sought.take(self._queue).nonzero()[0]
        start = int(np.searchsorted(places, self._hand))
        return np.concatenate((places[start:], places[:start]))

    def _clear(self, last: int) -> None:
        """Clear the bits that the hand passes on its way to the place `last`."""
        if last >= self._hand:
            self._visited[self._queue[self._hand : last]] = False
        else:
            self._visited[self._queue[self._hand :]] = False
            self._visited[self._queue[:last]] = False
