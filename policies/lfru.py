"""Least frequently, then least recently used: classes of decayed frequency, and in a class the oldest use goes first.

The frequency of a neuron is its uses, each worth half as much every eleven steps: the combined recency and frequency
of LRFU (Lee et al., IEEE Transactions on Computers 50, 2001, section 2), in fixed point. It is counted for every
neuron, here or not, so one that comes back is not a stranger. Lists of last use per frequency class are how
llama.cpp's cache of experts does it; vLLM (issue 37190) reports half the slots for the hits of LRU.
"""

from __future__ import annotations

from policies.arrays import BoolArray, IntArray, np
from policies.protocol import Eviction, nothing

_USE = 64  # what one use adds
_DECAY = 4  # a step takes 1/16 off: half in 11 steps
_CLASS = 6  # one class for each whole use: a neuron that is always wanted comes to class 16


class Lfru(Eviction):
    """The lowest frequency class goes first, and in it the oldest use."""

    def reset(self, neurons: int, slots: int) -> None:
        """Forget uses and their order."""
        self._queue = nothing()  # full slots, oldest use first
        self._neuron_of = np.zeros(slots, dtype=np.int64)
        self._heat = np.zeros(neurons, dtype=np.uint16)  # below 18 * _USE

    def admit(self, wanted: IntArray, misses: IntArray) -> IntArray:
        """Count the uses; every miss is worth bringing."""
        used = np.zeros(self._heat.size, dtype=np.uint16)
        used[wanted] = _USE
        self._heat -= self._heat >> _DECAY
        self._heat += used
        return misses

    def victims(self, hits: IntArray, evictable: BoolArray, count: int) -> IntArray:
        """The first `count` slots by class, then by last use; the hits become the newest of their classes."""
        rest = self._queue.take(evictable.take(self._queue).nonzero()[0])
        if count in (0, rest.size):  # none or all of them: no need to compare
            self._queue = np.concatenate((rest[count:], hits))
            return rest[:count]
        classes = (self._heat.take(self._neuron_of.take(rest)) >> _CLASS).astype(np.uint8)
        first = np.argsort(classes, kind="stable")[:count]  # of one byte: a counting sort
        stays = np.ones(rest.size, dtype=np.bool_)
        stays[first] = False
        self._queue = np.concatenate((rest.take(stays.nonzero()[0]), hits))
        return rest.take(first)

    def loaded(self, neurons: IntArray, slots: IntArray) -> None:
        """The loads are newer than the hits."""
        self._neuron_of[slots] = neurons
        self._queue = np.concatenate((self._queue, slots))
