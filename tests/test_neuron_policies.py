"""The neuron cache's policies against slow oracles: one key at a time, cachetools, brute force, and a golden table."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, combinations

import cachetools
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from policies.eviction import POLICIES, make
from policies.hot import hottest
from policies.neurons import NeuronResidency, Step

Wishes = list[list[int]]


@dataclass(frozen=True)
class Run:
    """A few tokens' wishes and the slots for them."""

    neurons: int
    slots: int
    max_fetches: int | None
    wishes: Wishes

    def residency(self, name: str, *, max_fetches: int | None = None) -> NeuronResidency:
        eviction = make(name, future=[array(wanted) for wanted in self.wishes], hot=self.heat())
        return NeuronResidency(self.neurons, self.slots, eviction, max_fetches=max_fetches)

    def heat(self) -> np.ndarray:
        return np.bincount(array([*chain.from_iterable(self.wishes)]), minlength=self.neurons)

    def steps(self, name: str, *, capped: bool = True) -> list[Step]:
        residency = self.residency(name, max_fetches=self.max_fetches if capped else None)
        return [residency.step(array(wanted)) for wanted in self.wishes]


def array(neurons: Sequence[int]) -> np.ndarray:
    return np.array(neurons, dtype=np.int64)


def hits(steps: list[Step]) -> int:
    return sum(step.hits.size for step in steps)


@st.composite
def runs(draw: st.DrawFn, most: int = 12, tokens: int = 14) -> Run:
    neurons = draw(st.integers(1, most))
    row = st.lists(st.integers(0, neurons - 1), unique=True, max_size=neurons)
    max_fetches = draw(st.none() | st.integers(0, neurons))
    return Run(neurons, draw(st.integers(0, neurons + 1)), max_fetches, draw(st.lists(row, max_size=tokens)))


# ---------------------------------------------------------------- every policy


@settings(max_examples=150)
@given(runs(), st.sampled_from(list(POLICIES)))
def test_a_step_does_what_it_says(run: Run, name: str) -> None:
    residency = run.residency(name, max_fetches=run.max_fetches)
    slots: dict[int, int] = {}  # slot -> neuron
    for wanted in run.wishes:
        before = set(slots.values())
        step = residency.step(array(wanted))
        found, loads, refused = (part.tolist() for part in (step.hits, step.loads, step.refused))
        assert sorted(found + loads + refused) == sorted(wanted)
        assert found == [neuron for neuron in wanted if neuron in before]
        assert refused == [neuron for neuron in wanted if neuron in refused]
        assert len(loads) <= (len(wanted) if run.max_fetches is None else run.max_fetches)
        assert not set(step.evicted.tolist()) & set(wanted)
        lost = [slots.pop(slot) for slot in step.slots.tolist() if slot in slots]
        assert lost == step.evicted.tolist()
        assert len(slots) + len(loads) == run.slots or not lost  # free slots first
        slots |= dict(zip(step.slots.tolist(), loads, strict=True))
        assert len(slots) == len(set(slots.values())) <= run.slots
        assert all(0 <= slot < run.slots for slot in slots)
        where = np.full(run.neurons, -1)
        where[list(slots.values())] = list(slots)
        assert residency.slot_of.tolist() == where.tolist()
        assert residency.resident.tolist() == sorted(slots.values())


@given(runs(), st.sampled_from(["atu", "lru", "lfru", "sieve"]))
def test_moving_policies_load_misses_in_order_as_far_as_there_is_room(run: Run, name: str) -> None:
    for wanted, step in zip(run.wishes, run.steps(name), strict=True):
        misses = [neuron for neuron in wanted if neuron not in step.hits]
        room = min(run.slots - step.hits.size, len(wanted) if run.max_fetches is None else run.max_fetches)
        assert step.loads.tolist() == misses[:room]
        assert step.refused.tolist() == misses[room:]


@given(runs(), st.sampled_from(list(POLICIES)))
def test_clear_starts_again(run: Run, name: str) -> None:
    residency = run.residency(name)
    once = [residency.step(array(wanted)) for wanted in run.wishes]
    residency.clear()
    assert residency.resident.size == 0
    again = [residency.step(array(wanted)) for wanted in run.wishes]
    assert [lists(step) for step in once] == [lists(step) for step in again]


def lists(step: Step) -> list[list[int]]:
    return [part.tolist() for part in (step.hits, step.loads, step.slots, step.evicted, step.refused)]


@given(runs(), st.sampled_from(list(POLICIES)))
def test_a_step_is_never_written_to_afterwards(run: Run, name: str) -> None:
    residency = run.residency(name)
    steps, then = [], []
    for wanted in run.wishes:
        steps.append(residency.step(array(wanted)))
        then.append(lists(steps[-1]))
    assert [lists(step) for step in steps] == then


@pytest.mark.parametrize("name", POLICIES)
def test_no_slots_refuse_everything(name: str) -> None:
    run = Run(4, 0, None, [[3, 1], [1], []])
    assert [lists(step) for step in run.steps(name)] == [[[], [], [], [], wanted] for wanted in run.wishes]


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("wanted", [[4], [-1], [0, 99], [1, 1], [0, 0, 2], [2, 2], [3, 0, 3], [0.5], [[1, 2]]])
def test_a_bad_wish_changes_nothing(wanted: list) -> None:
    residency = NeuronResidency(4, 2, make("lru"))
    residency.step(array([0, 1]))
    with pytest.raises(ValueError, match=r"neuron"):
        residency.step(np.array(wanted))
    assert residency.resident.tolist() == [0, 1]
    assert residency.step(array([2])).evicted.tolist() == [0]


def test_no_wish_and_other_integers_are_fine() -> None:
    residency = NeuronResidency(4, 2, make("lru"))
    assert residency.step(np.array([])).loads.size == 0
    assert residency.step(np.array([3, 2], dtype=np.int32)).loads.tolist() == [3, 2]
    assert NeuronResidency(0, 3, make("sieve")).step(array([])).loads.size == 0


@pytest.mark.parametrize(("neurons", "slots", "max_fetches"), [(-1, 0, None), (1, -1, None), (1, 1, -1)])
def test_negative_numbers_are_refused(neurons: int, slots: int, max_fetches: int | None) -> None:
    with pytest.raises(ValueError, match="negative"):
        NeuronResidency(neurons, slots, make("atu"), max_fetches=max_fetches)


def test_make_knows_the_names() -> None:
    with pytest.raises(ValueError, match=", ".join(POLICIES)):
        make("nobody")
    assert [type(make(name, future=[], hot=[1, 2])) for name in POLICIES] == list(POLICIES.values())
    for name in ("hot", "belady"):
        with pytest.raises(ValueError, match=name):
            make(name)
    with pytest.raises(ValueError, match=r"shape \(2,\) for 3 neurons"):
        NeuronResidency(3, 1, make("hot", hot=[1, 2]))


# ---------------------------------------------------------------- warm


def test_warm_fills_free_slots_and_the_least_important_leaves_first() -> None:
    residency = NeuronResidency(9, 3, make("lru"))
    assert residency.warm(array([5, 2, 7])).tolist() == [0, 1, 2]
    assert residency.slot_of[[5, 2, 7]].tolist() == [0, 1, 2]
    assert [residency.step(array([new])).evicted.tolist() for new in (0, 1, 3)] == [[7], [2], [5]]


@pytest.mark.parametrize("neurons", [[1, 2, 3], [1, 1], [0], [9]])
def test_warm_refuses(neurons: list[int]) -> None:
    residency = NeuronResidency(9, 3, make("atu"))
    residency.step(array([0]))
    with pytest.raises(ValueError, match=r"free slots|twice|layer has"):
        residency.warm(array(neurons))
    assert residency.resident.tolist() == [0]


# ---------------------------------------------------------------- one by one


@settings(max_examples=200)
@given(runs(tokens=25))
def test_lru_is_cachetools(run: Run) -> None:
    reference: cachetools.LRUCache[int, int] = cachetools.LRUCache(run.slots)
    residency = run.residency("lru", max_fetches=run.max_fetches)
    for wanted in run.wishes:
        step = residency.step(array(wanted))
        found = [neuron for neuron in wanted if neuron in reference]
        room = min(run.slots - len(found), len(wanted) if run.max_fetches is None else run.max_fetches)
        for neuron in found:
            assert reference[neuron] == neuron  # a use
        for neuron in [neuron for neuron in wanted if neuron not in found][:room]:
            reference[neuron] = neuron
        assert step.hits.tolist() == found
        assert residency.resident.tolist() == sorted(reference)


class SlowSieve:
    """Algorithm 1 of the paper, one neuron at a time; those that are wanted now are never the hand's victim."""

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.queue: list[int] = []  # tail first
        self.visited: dict[int, bool] = {}
        self.hand: int | None = None  # a neuron

    def step(self, wanted: list[int], max_fetches: int | None) -> list[int]:
        found = [neuron for neuron in wanted if neuron in self.visited]
        for neuron in found:
            self.visited[neuron] = True
        room = min(self.slots - len(found), len(wanted) if max_fetches is None else max_fetches)
        for neuron in [neuron for neuron in wanted if neuron not in found][:room]:
            if len(self.queue) == self.slots:
                self.evict(wanted)
            self.queue.append(neuron)
            self.visited[neuron] = False
        return found

    def evict(self, wanted: list[int]) -> None:
        at = self.queue[0] if self.hand is None else self.hand
        while self.visited[at] or at in wanted:
            self.visited[at] = False
            at = self.before(at) or self.queue[0] if self.before(at) != 0 else 0
        self.hand = self.before(at)
        self.queue.remove(at)
        del self.visited[at]

    def before(self, neuron: int) -> int | None:
        """The next towards the head."""
        place = self.queue.index(neuron) + 1
        return self.queue[place] if place < len(self.queue) else None


@settings(max_examples=300)
@given(runs(tokens=25))
@example(Run(6, 3, None, [[0, 1, 2], [0], [3], [3, 4], [2], [5, 1], [0]]))
def test_sieve_is_its_slow_oracle(run: Run) -> None:
    reference = SlowSieve(run.slots)
    residency = run.residency("sieve", max_fetches=run.max_fetches)
    for wanted in run.wishes:
        assert residency.step(array(wanted)).hits.tolist() == reference.step(wanted, run.max_fetches)
        assert residency.resident.tolist() == sorted(reference.queue)


@settings(max_examples=200)
@given(runs(tokens=25))
def test_lfru_is_its_slow_oracle(run: Run) -> None:
    residency = run.residency("lfru", max_fetches=run.max_fetches)
    heat = dict.fromkeys(range(run.neurons), 0)
    here: list[int] = []  # oldest use first
    for wanted in run.wishes:
        heat = {neuron: uses - uses // 16 + 64 * (neuron in wanted) for neuron, uses in heat.items()}
        found = [neuron for neuron in wanted if neuron in here]
        room = min(run.slots - len(found), len(wanted) if run.max_fetches is None else run.max_fetches)
        loads = [neuron for neuron in wanted if neuron not in found][:room]
        here = [neuron for neuron in here if neuron not in found]
        while len(here) + len(found) + len(loads) > run.slots:
            here.remove(min(here, key=lambda neuron: heat[neuron] // 64))  # the first of the lowest class
        here += found + loads
        assert residency.step(array(wanted)).hits.tolist() == found
        assert residency.resident.tolist() == sorted(here)


def test_lfru_keeps_what_is_used_often_where_lru_does_not() -> None:
    often = [[0, 1]] * 8
    scan = [[neuron] for neuron in range(2, 8)]
    run = Run(8, 3, None, often + scan + [[0, 1]])
    assert run.steps("lru")[-1].hits.tolist() == []
    assert run.steps("lfru")[-1].hits.tolist() == [0, 1]


def test_lfru_counts_for_ever_without_overflow() -> None:
    residency = NeuronResidency(3, 1, make("lfru"))
    for _ in range(3000):
        residency.step(array([0, 1]))
    assert residency.step(array([2])).evicted.tolist() == [0]


def test_atu_keeps_the_last_set_and_whatever_has_room() -> None:
    residency = NeuronResidency(9, 4, make("atu"))
    for wanted in ([0, 1, 2], [2, 3], [5, 6, 3], [7]):
        residency.step(array(wanted))
        assert set(wanted) <= set(residency.resident.tolist())


@given(runs())
def test_hot_never_moves(run: Run) -> None:
    residency = run.residency("hot")
    hot = hottest(run.heat(), run.slots)
    residency.warm(hot)
    for wanted in run.wishes:
        step = residency.step(array(wanted))
        assert step.hits.tolist() == [neuron for neuron in wanted if neuron in hot.tolist()]
        assert step.loads.size == 0
    cold = run.residency("hot")
    for wanted in run.wishes:
        assert cold.step(array(wanted)).evicted.size == 0
    assert set(cold.resident.tolist()) <= set(hot.tolist())


# ---------------------------------------------------------------- the bound


@settings(max_examples=150)
@given(runs(tokens=25))
def test_nothing_beats_belady(run: Run) -> None:
    most = hits(run.steps("belady", capped=False))
    for name in POLICIES:
        assert hits(run.steps(name)) <= most


@settings(max_examples=100, deadline=None)
@given(runs(most=5, tokens=7))
@example(Run(3, 1, None, [[0, 1], [0, 1], [1, 2], [1]]))  # a tie: 0 would hold the slot when 1 is wanted again
def test_belady_is_the_best_of_all(run: Run) -> None:
    """Against every choice of what to load and what to evict, under the rule that what is wanted now stays."""

    @cache
    def best(token: int, here: frozenset[int]) -> int:
        if token == len(run.wishes):
            return 0
        wanted = frozenset(run.wishes[token])
        found, others = here & wanted, sorted((here | wanted) - (here & wanted))
        kept = (frozenset(some) for size in range(run.slots - len(found) + 1) for some in combinations(others, size))
        return len(found) + max(best(token + 1, found | some) for some in kept)

    assert hits(run.steps("belady", capped=False)) == best(0, frozenset())


@settings(max_examples=100)
@given(runs(tokens=25))
def test_belady_keeps_the_soonest(run: Run) -> None:
    residency = run.residency("belady")
    for token, wanted in enumerate(run.wishes):
        before = set(residency.resident.tolist())
        step = residency.step(array(wanted))
        after = set(residency.resident.tolist())
        uses = {neuron: _next_use(run.wishes, token, neuron) for neuron in before | set(wanted)}
        left = sorted(uses[neuron] for neuron in uses if neuron not in step.hits)
        soonest = [use for use in left[: run.slots - step.hits.size] if use < len(run.wishes)]
        stay = sorted(uses[neuron] for neuron in after if neuron not in step.hits and uses[neuron] < len(run.wishes))
        assert stay == soonest


def _next_use(wishes: Wishes, token: int, neuron: int) -> int:
    return next((later for later in range(token + 1, len(wishes)) if neuron in wishes[later]), len(wishes))


def test_belady_refuses_another_future() -> None:
    residency = NeuronResidency(4, 2, make("belady", future=[array([0, 1]), array([2])]))
    residency.step(array([0, 1]))
    with pytest.raises(ValueError, match="step 1"):
        residency.step(array([3]))
    residency.step(array([2]))
    with pytest.raises(ValueError, match="2 steps"):
        residency.step(array([2]))


# ---------------------------------------------------------------- golden table

# hits of 60 tokens that want 32 of 128 neurons each, by policy: (48 slots, 16 slots, 48 slots and 4 fetches a step)
GOLDEN = {
    "atu": (1294, 642, 1053),
    "lru": (1327, 642, 1155),
    "lfru": (1345, 642, 1153),
    "sieve": (1335, 642, 1140),
    "hot": (1251, 549, 1176),
    "belady": (1554, 768, 1429),
}


def fixed(slots: int, max_fetches: int | None) -> Run:
    draw = np.random.default_rng(20240)
    bias, moving = draw.standard_normal(128), draw.standard_normal(128)
    wishes = []
    for _ in range(60):
        moving = 0.6 * moving + 0.8 * draw.standard_normal(128)
        wishes.append(np.argsort(-(0.6 * bias + moving), kind="stable")[:32].tolist())
    return Run(128, slots, max_fetches, wishes)


def test_the_golden_table_has_every_policy() -> None:
    assert GOLDEN.keys() == POLICIES.keys()


@pytest.mark.parametrize("name", POLICIES)
def test_golden_table(name: str) -> None:
    found = tuple(hits(fixed(*shape).steps(name)) for shape in ((48, None), (16, None), (48, 4)))
    assert found == GOLDEN.get(name)
