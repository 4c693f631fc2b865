"""The neurons that calibration found wanted most stay for good; nothing is ever evicted.

The static placement of PowerInfer (arXiv 2312.12456, section 5: hot neurons on the GPU, cold ones elsewhere), and the
baseline that any moving policy has to beat.
"""

from __future__ import annotations

from policies.arrays import ArrayLike, BoolArray, IntArray, np
from policies.protocol import Eviction, nothing


def hottest(frequencies: ArrayLike, count: int) -> IntArray:
    """The `count` neurons with the highest frequencies [neurons], highest first, the lower index on a tie."""
    return np.argsort(-np.asarray(frequencies), kind="stable")[:count].astype(np.int64)


class Hot(Eviction):
    """A fixed set: as many of the hottest neurons as there are slots.

    Args:
        frequencies: [neurons], any unit: only their order counts.
    """

    def __init__(self, frequencies: ArrayLike) -> None:
        self._frequencies = np.array(frequencies)

    def reset(self, neurons: int, slots: int) -> None:
        """Choose the set.

        Raises:
            ValueError: the frequencies are not one for each neuron.
        """
        if self._frequencies.shape != (neurons,):
            raise ValueError(f"frequencies of shape {self._frequencies.shape} for {neurons} neurons: give one for each")
        self._hot = hottest(self._frequencies, slots)
        self._is_hot = np.zeros(neurons, dtype=np.bool_)
        self._is_hot[self._hot] = True

    def preload(self) -> IntArray:
        """The whole set."""
        return self._hot

    def admit(self, wanted: IntArray, misses: IntArray) -> IntArray:
        """The misses that belong to the set, if it was not preloaded."""
        return misses.take(self._is_hot.take(misses).nonzero()[0])

    def victims(self, hits: IntArray, evictable: BoolArray, count: int) -> IntArray:
        """None, ever."""
        return nothing()
