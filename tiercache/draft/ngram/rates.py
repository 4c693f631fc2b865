"""Measures acceptance rates of n-gram guesses; old observations fade.

The rates turn counts and ranks into probabilities that can be compared between drafters.
"""

from collections.abc import Sequence

_PRIOR_WEIGHT = 8.0  # observations that what is assumed beforehand counts for
_HITS_KEPT, _RANKS_KEPT = 256.0, 512.0  # observations; at more, they are halved


class HitRates:
    """For each of several kinds of guess, the share that came true.

    Args:
        prior: the shares assumed before anything was seen.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self._hits = [share * _PRIOR_WEIGHT for share in prior]
        self._trials = [_PRIOR_WEIGHT] * len(prior)

    def __getitem__(self, kind: int) -> float:
        """The share of a kind."""
        return self._hits[kind] / self._trials[kind]

    def add(self, kind: int, hit: bool) -> None:
        """One more observation."""
        self._hits[kind] += hit
        self._trials[kind] += 1
        if self._trials[kind] > _HITS_KEPT:
            self._hits[kind] /= 2
            self._trials[kind] /= 2


class RankShares:
    """How often the token that came stood at each rank of a list.

    Args:
        prior: the share of each rank, assumed before anything was seen.
    """

    def __init__(self, prior: Sequence[float]) -> None:
        self._hits = [share * _PRIOR_WEIGHT for share in prior]
        self._trials = _PRIOR_WEIGHT

    def shares(self) -> list[float]:
        """Of each rank; they sum to 1 at most."""
        return [hits / self._trials for hits in self._hits]

    def add(self, rank: int | None) -> None:
        """One more observation; None where the token was not on the list."""
        if rank is not None:
            self._hits[rank] += 1
        self._trials += 1
        if self._trials > _RANKS_KEPT:
            self._hits = [hits / 2 for hits in self._hits]
            self._trials /= 2
