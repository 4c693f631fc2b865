"""Fits a few factors of the cost model to passes that were run.

Measured limits predict to 15 or 30 %, with a few fitted terms beside them to 5 or 10 % (inference-sim #415, #436,
#1525). Fitted are by how much longer the products, the overhead and the reads take than the probe's figures say; what
overlaps stays as measured, and no prediction goes below its bound. Pure functions of numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Any

from profiler.cost_model import PassTime, combined_s
from profiler.figure import Figure

TERMS = ("compute", "overhead", "ssd")
LEAST_PAIRS = 12  # fewer say nothing about three factors
_COUNTS = 0.1  # a term of a smaller share than this in a pass cannot be told from it
_PRIOR = 0.25  # how much a factor's distance from 1 weighs beside a pair's error: pairs win when they are many
_MOST = log(2.0)  # a factor further from 1 is no correction; the probe is wrong then
_ROUNDS, _STEPS = 12, 30


@dataclass(frozen=True)
class Pair:
    """A pass as it was predicted from measured figures, nothing fitted, and as it went.

    Attributes:
        name: the model, its precision, where it lay, and the tokens of the pass.
        busy_s, overhead_s, bound_s: see `PassTime`.
        overlap: as the machine's figures have it.
        actual_s: what it took, the median.
    """

    name: str
    busy_s: Mapping[str, float]
    overhead_s: float
    bound_s: float
    overlap: float
    actual_s: float

    @classmethod
    def of(cls, name: str, made: PassTime, overlap: float, actual_s: float) -> "Pair":
        """From a prediction in which nothing was fitted."""
        return cls(name, dict(made.busy_s), made.overhead_s, made.bound_s, overlap, actual_s)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Pair":
        """From what `dataclasses.asdict` made of one."""
        return cls(**found)

    def predicted_s(self, factors: Mapping[str, float]) -> float:
        """Seconds of the pass with the terms multiplied by `factors`; those that are missing are 1."""
        busy = {name: seconds * factors.get(name, 1.0) for name, seconds in self.busy_s.items()}
        return max(combined_s(busy, self.overhead_s * factors.get("overhead", 1.0), self.overlap), self.bound_s)

    def share(self, term: str) -> float:
        """What of the pass a term is."""
        seconds = self.overhead_s if term == "overhead" else self.busy_s[term]
        return seconds / self.predicted_s({})


def fitted(pairs: Sequence[Pair]) -> dict[str, Figure]:
    """Factors of the terms that enough pairs tell something of; none from few pairs.

    Least squares of the logarithms of predicted over actual seconds, one term after the other until they stay.
    """
    if len(pairs) < LEAST_PAIRS:
        return {}
    told = [term for term in TERMS if sum(pair.share(term) > _COUNTS for pair in pairs) >= LEAST_PAIRS // 2]
    logs = dict.fromkeys(told, 0.0)

    def off(changed: Mapping[str, float]) -> float:
        factors = {term: exp(value) for term, value in changed.items()}
        errors = (log(pair.predicted_s(factors) / pair.actual_s) ** 2 for pair in pairs)
        return sum(errors) + _PRIOR * sum(value**2 for value in changed.values())

    for _ in range(_ROUNDS):
        for term in told:
            logs[term] = _least(lambda value, term=term: off({**logs, term: value}))  # type: ignore[misc]
    factors = {term: exp(value) for term, value in logs.items()}
    left = sqrt(sum(log(pair.predicted_s(factors) / pair.actual_s) ** 2 for pair in pairs) / len(pairs))
    source = f"{len(pairs)} passes that were run"
    return {term: Figure(value, "fitted", source, left) for term, value in factors.items()}


def _least(function: Callable[[float], float]) -> float:
    """Where a function of one number with one valley is least, between a half and twice, by golden sections."""
    ratio = (sqrt(5) - 1) / 2
    low, high = -_MOST, _MOST
    for _ in range(_STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if function(left) <= function(right):
            high = right
        else:
            low = left
    return (low + high) / 2
