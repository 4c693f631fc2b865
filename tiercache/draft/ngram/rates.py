"""Measures acceptance rates of n-gram guesses; old observations fade.

The rates turn counts and ranks into probabilities that can be compared between drafters.
"""

from collections.abc import Sequence


class HitRates:
    """For each of several kinds of guess, the share that came true.

    Args:
        prior: the shares assumed before anything was seen.
        weight: how many observations the prior counts for.
        memory: observations of a kind; at as many, they are halved.
    """

    def __init__(self, prior: Sequence[float], *, weight: float = 8.0, memory: float = 256.0) -> None:
        self._hits = [share * weight for share in prior]
        self._trials = [weight] * len(prior)
        self._memory = memory

    def __getitem__(self, kind: int) -> float:
        """The share of a kind."""
        return self._hits[kind] / self._trials[kind]

    def add(self, kind: int, hit: bool) -> None:
        """One more observation."""
        self._hits[kind] += hit
        self._trials[kind] += 1
        if self._trials[kind] > self._memory:
            self._hits[kind] /= 2
            self._trials[kind] /= 2


class RankShares:
    """How often the token that came stood at each rank of a list.

    Args:
        prior: the share of each rank, assumed before anything was seen.
        weight, memory: as `HitRates` has them.
    """

    def __init__(self, prior: Sequence[float], *, weight: float = 8.0, memory: float = 512.0) -> None:
        self._hits = [share * weight for share in prior]
        self._trials = weight
        self._memory = memory

    def shares(self) -> list[float]:
        """Of each rank; they sum to 1 at most."""
        return [hits / self._trials for hits in self._hits]

    def add(self, rank: int | None) -> None:
        """One more observation; None where the token was not on the list."""
        if rank is not None:
            self._hits[rank] += 1
        self._trials += 1
        if self._trials > self._memory:
            self._hits = [hits / 2 for hits in self._hits]
            self._trials /= 2
