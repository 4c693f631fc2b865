"""The policies of the neuron cache by name; a new one is a file beside this one and a line here."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

from policies.atu import Atu
from policies.belady import Belady
from policies.hot import Hot
from policies.lfru import Lfru
from policies.lru import Lru
from policies.protocol import Eviction
from policies.sieve import Sieve

__all__ = ["BOUND", "POLICIES", "Eviction", "Factory", "make"]

BOUND = "belady"
"""The policy that knows the future: a bound for the others, which no run can follow."""

Future = Sequence[npt.NDArray[np.integer]]
Factory = Callable[[Future | None, npt.ArrayLike | None], Eviction]


def _hot(future: Future | None, hot: npt.ArrayLike | None) -> Eviction:
    if hot is None:
        raise ValueError("the policy hot keeps a calibrated set: give it frequencies, hot=[neurons]")
    return Hot(hot)


def _belady(future: Future | None, hot: npt.ArrayLike | None) -> Eviction:
    if future is None:
        raise ValueError("the policy belady knows the future: give it the wanted neurons of every step, future=[...]")
    return Belady(future)


POLICIES: Mapping[str, Factory] = MappingProxyType(
    {
        "atu": lambda future, hot: Atu(),
        "lru": lambda future, hot: Lru(),
        "lfru": lambda future, hot: Lfru(),
        "sieve": lambda future, hot: Sieve(),
        "hot": _hot,
        BOUND: _belady,
    }
)


def make(name: str, *, future: Future | None = None, hot: npt.ArrayLike | None = None) -> Eviction:
    """A policy by its name, for one layer and plane.

    Args:
        name: one of `POLICIES`.
        future: the wanted neurons of every step, for "belady"; others do not look.
        hot: frequencies [neurons], for "hot"; others do not look.

    Raises:
        ValueError: an unknown name, or what the policy needs is missing.
    """
    if name not in POLICIES:
        raise ValueError(f"no policy {name!r}: there are {', '.join(POLICIES)}")
    return POLICIES[name](future, hot)
