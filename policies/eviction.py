"""The policies of the neuron cache by name; a new one is a file beside this one and a line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from policies.arrays import ArrayLike, NDArray, np
from policies.atu import Atu
from policies.belady import Belady
from policies.hot import Hot
from policies.lfru import Lfru
from policies.lru import Lru
from policies.protocol import Eviction
from policies.sieve import Sieve

BOUND = "belady"
"""The policy that knows the future: a bound for the others, which no run can follow."""

POLICIES: Mapping[str, type[Eviction]] = MappingProxyType(
    {
        "atu": Atu,
        "lru": Lru,
        "lfru": Lfru,
        "sieve": Sieve,
        "hot": Hot,
        BOUND: Belady,
    }
)


def make(name: str, *, future: Sequence[NDArray[np.integer]] | None = None, hot: ArrayLike | None = None) -> Eviction:
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
    if name == "hot":
        if hot is None:
            raise ValueError("the policy hot keeps a calibrated set: give it frequencies, hot=[neurons]")
        return Hot(hot)
    if name == BOUND:
        if future is None:
            raise ValueError(
                "the policy belady knows the future: give it the wanted neurons of every step, future=[...]"
            )
        return Belady(future)
    return POLICIES[name]()
