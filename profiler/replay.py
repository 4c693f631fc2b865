"""A recorded trace under any policy: the engine's own decisions, taken again without moving a byte.

Each layer and plane has the `NeuronResidency` that the engine would have, and is asked in the engine's order: for each
token, each layer, each plane that has slots. So a policy, a cache size or an upload cap is judged on what the model
really wished for, beside Belady's bound and beside chance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from policies.arrays import ArrayLike, IntArray, np
from policies.eviction import BOUND, POLICIES, make
from policies.hot import hottest
from policies.neurons import NeuronResidency, Step
from policies.rates import rate
from profiler.trace import Trace

Log = Callable[[int, int, int, Step], None]


@dataclass(frozen=True)
class ReplayOutcome:
    """What a replay counted, in neurons; the arrays are [layers, planes].

    Attributes:
        policy: its name.
        neurons: of each layer.
        slots: of each plane of each layer.
        requests: neurons wanted.
        hits: of those, here before.
        loads: of those, brought.
        refused: of those, neither: a plane without slots refuses all.
        evictions: neurons that lost their slot.
    """

    policy: str
    neurons: int
    slots: IntArray
    requests: IntArray
    hits: IntArray
    loads: IntArray
    refused: IntArray
    evictions: IntArray

    @property
    def hit_rate(self) -> float:
        """Hits / requests; 0 without requests."""
        return rate(self.hits.sum(), self.requests.sum()) or 0.0

    @property
    def chance(self) -> float:
        """The hit rate of a random set in the same slots: their share of the neurons, weighted by requests."""
        share = np.minimum(1.0, self.slots / max(1, self.neurons))
        return rate((share * self.requests).sum(), self.requests.sum()) or 0.0

    @property
    def lift(self) -> float:
        """Hit rate / chance; 0 without slots."""
        return rate(self.hit_rate, self.chance) or 0.0


def replay(
    trace: Trace,
    slots: ArrayLike,
    policy: str,
    max_fetches: int | None = None,
    *,
    hot: ArrayLike | None = None,
    log: Log | None = None,
) -> ReplayOutcome:
    """Count what a policy would have done.

    Args:
        trace: the wishes.
        slots: [layers, planes], neurons that each has room for.
        policy: one of `policies.eviction.POLICIES`.
        max_fetches: loads of one plane of one layer for one token at most; None for no cap.
        hot: calibrated frequencies [layers, neurons]. With them every plane starts warm: with what the policy would
            start with, if it has an opinion, else with the hottest neurons. Without them it starts empty.
        log: called after each step with the token, layer, plane and `Step`.

    Raises:
        ValueError: slots or frequencies of another shape, an unknown policy or one that lacks `hot`.
    """
    slots = _slots(trace, slots)
    residencies = _residencies(trace, slots, policy, max_fetches, hot)
    requests = trace.counts * trace.tokens
    hits, loads, evictions = (np.zeros_like(requests) for _ in range(3))
    for token in range(trace.tokens):
        for (layer, plane), residency in residencies.items():
            step = residency.step(trace.wanted(layer, plane, token))
            hits[layer, plane] += step.hits.size
            loads[layer, plane] += step.loads.size
            evictions[layer, plane] += step.evicted.size
            if log is not None:
                log(token, layer, plane, step)
    return ReplayOutcome(policy, trace.neurons, slots, requests, hits, loads, requests - hits - loads, evictions)


def _slots(trace: Trace, slots: ArrayLike) -> IntArray:
    slots = np.array(slots, dtype=np.int64)
    if slots.shape != trace.counts.shape or np.any(slots < 0):
        raise ValueError(f"slots {slots.tolist()}: give {trace.layers} layers x {trace.planes} planes, none negative")
    return slots


def _residencies(
    trace: Trace, slots: IntArray, policy: str, max_fetches: int | None, hot: ArrayLike | None
) -> dict[tuple[int, int], NeuronResidency]:
    """One for each layer and plane with slots, warm if there are frequencies, in the order of asking."""
    heat = None if hot is None else np.asarray(hot)
    if heat is not None and heat.shape != (trace.layers, trace.neurons):
        raise ValueError(f"frequencies of shape {heat.shape}: give {trace.layers} layers x {trace.neurons} neurons")
    found = {}
    for layer, plane in np.argwhere(slots > 0).tolist():
        room = min(int(slots[layer, plane]), trace.neurons)
        future = list(trace.rows(layer, plane)) if policy == BOUND else None
        eviction = make(policy, future=future, hot=None if heat is None else heat[layer])
        residency = NeuronResidency(trace.neurons, room, eviction, max_fetches=max_fetches)
        if heat is not None:
            own = eviction.preload()
            residency.warm(own if own.size else hottest(heat[layer], room))
        found[layer, plane] = residency
    return found


@dataclass(frozen=True)
class PolicyRow:
    """One policy of a comparison.

    Attributes:
        policy: its name.
        hit_rate: hits / requests.
        chance: the hit rate of a random set in the same slots.
        lift: hit rate / chance.
        loaded_bytes: brought into slots.
        refused_bytes: wanted and neither here nor brought; they are fetched or computed elsewhere all the same.
        belady: the hit rate that no policy exceeds, however many may be fetched.
    """

    policy: str
    hit_rate: float
    chance: float
    lift: float
    loaded_bytes: int
    refused_bytes: int
    belady: float

    @property
    def missed_bytes(self) -> int:
        """Loaded and refused: what the cache did not save."""
        return self.loaded_bytes + self.refused_bytes


def compare(
    trace: Trace,
    slots: ArrayLike,
    max_fetches: int | None,
    row_bytes: Sequence[int],
    *,
    hot: ArrayLike | None = None,
) -> list[PolicyRow]:
    """Every policy on one trace, Belady's bound among them, in the registry's order.

    The bound is replayed without an upload cap, where it is one, and from the start that suits it best.

    Args:
        trace: the wishes.
        slots: [layers, planes].
        max_fetches: cap of one step, or None.
        row_bytes: bytes of one neuron at each plane [planes].
        hot: calibrated frequencies [layers, neurons], best from another trace. Without them the policy "hot" is left
            out, for its set would have to be taken from the very trace it is judged on, and every start is empty.

    Raises:
        ValueError: as for `replay`, or row bytes that are not one for each plane.
    """
    sizes = np.array(row_bytes, dtype=np.int64)
    if sizes.shape != (trace.planes,):
        raise ValueError(f"row bytes {sizes.tolist()}: give one for each of {trace.planes} planes")
    names = [name for name in POLICIES if name != "hot" or hot is not None]
    outcomes = [replay(trace, slots, name, None if name == BOUND else max_fetches, hot=hot) for name in names]
    bound = next(outcome.hit_rate for outcome in outcomes if outcome.policy == BOUND)
    return [
        PolicyRow(
            outcome.policy,
            outcome.hit_rate,
            outcome.chance,
            outcome.lift,
            int((outcome.loads * sizes).sum()),
            int((outcome.refused * sizes).sum()),
            bound,
        )
        for outcome in outcomes
    ]


def best(rows: Sequence[PolicyRow]) -> str:
    """The policy that misses the fewest bytes, the earlier one on a tie; never Belady's, which needs the future.

    Raises:
        ValueError: there is no other.
    """
    possible = [row for row in rows if row.policy != BOUND]
    if not possible:
        raise ValueError("no policy to choose from: give the rows of `compare`")
    return min(possible, key=lambda row: row.missed_bytes).policy
