"""Traces and their replay against sets and steps taken by hand."""

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import policy_cost
from policies import arrays
from policies.eviction import POLICIES, make
from policies.hot import hottest
from policies.neurons import NeuronResidency, Step
from profiler.replay import PolicyRow, best, compare, replay
from profiler.trace import Trace

LAYERS, NEURONS = 2, 24
COUNTS = [[10, 4], [8, 0]]


def recorded(tokens: int = 12, seed: int = 0) -> Trace:
    draw = np.random.default_rng(seed)
    trace = Trace(NEURONS, COUNTS)
    bias = draw.standard_normal((LAYERS, NEURONS))
    for _ in range(tokens):
        trace.append(list(np.argsort(-(bias + draw.standard_normal(bias.shape)), axis=1)))
    return trace


def same(one: Trace, other: Trace) -> bool:
    return (
        one.neurons == other.neurons
        and np.array_equal(one.counts, other.counts)
        and all(np.array_equal(*rows) for rows in zip(one.order, other.order, strict=True))
    )


# ---------------------------------------------------------------- Trace


def test_a_trace_is_what_was_appended() -> None:
    trace = Trace(5, [[3, 1], [2, 2]])
    trace.append([[4, 3, 2, 1, 0], [0, 1, 2]])
    for token in range(20):
        trace.append([[token % 5, (token + 1) % 5, (token + 2) % 5], [3, 1]])
    assert trace.tokens == 21
    assert [rows.shape for rows in trace.order] == [(21, 3), (21, 2)]
    assert all(rows.dtype == np.int32 for rows in trace.order)
    assert trace.wanted(0, 0, 0).tolist() == [4, 3, 2]
    assert trace.wanted(0, 1, 0).tolist() == [4]
    assert trace.wanted(0, 0, 20).tolist() == [4, 0, 1]
    assert trace.wanted(1, 1, 7).tolist() == [3, 1]
    assert trace.wanted(0, 0, 0).dtype == np.int64
    assert same(trace, Trace(5, trace.counts, trace.order))


@pytest.mark.parametrize("orders", [[[0, 1, 2]], [[0, 1], [0, 1]], [[0, 1, 5], [0, 1]], [[0, 1, 2], [0, -1]]])
def test_append_refuses_and_records_nothing(orders: list[list[int]]) -> None:
    trace = Trace(5, [[3], [2]])
    with pytest.raises(ValueError, match="order"):
        trace.append(orders)
    assert trace.tokens == 0


@pytest.mark.parametrize(
    ("counts", "order"),
    [
        ([3], None),
        ([[6]], None),
        ([[-1]], None),
        ([[2]], []),
        ([[2]], [[0, 1]]),
        ([[2]], [[[0]]]),
        ([[1], [1]], [[[0]], [[0], [1]]]),
        ([[1]], [[[5]]]),
        ([[1]], [[[0.5]]]),
    ],
)
def test_a_trace_refuses_what_does_not_fit(counts: list, order: list | None) -> None:
    with pytest.raises(ValueError, match=r"counts|order"):
        Trace(5, counts, order)


@settings(max_examples=60)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_unions_and_overlaps_are_those_of_sets(tokens: int, count: int, seed: int) -> None:
    draw = np.random.default_rng(seed)
    order = [np.array([draw.permutation(9) for _ in range(tokens)]) for _ in range(2)]
    trace = Trace(9, [[9, count], [count, count]], order)
    sets = [[set(row[:count].tolist()) for row in rows] for rows in order]
    unions = trace.union_sizes((1, 2, 3, 20), plane=1)
    assert list(unions) == [window for window in (1, 2, 3) if window <= tokens]
    for window, shares in unions.items():
        for layer, wanted in enumerate(sets):
            sizes = [len(set().union(*wanted[at : at + window])) for at in range(tokens - window + 1)]
            assert shares[layer] == pytest.approx(sum(sizes) / len(sizes) / 9)
    overlap, chance = trace.adjacent_overlap(plane=1)
    assert chance.tolist() == [count / 9] * 2
    for layer, wanted in enumerate(sets):
        shares = [len(one & other) / count for one, other in pairwise(wanted)]
        assert overlap[layer] == pytest.approx(sum(shares) / max(1, len(shares)))
        uses = [sum(neuron in row for row in wanted) for neuron in range(9)]
        assert trace.frequencies(plane=1)[layer].tolist() == uses


def test_nothing_wanted_is_no_division_by_nothing() -> None:
    trace = recorded()
    overlap, chance = trace.adjacent_overlap(plane=1)
    assert (overlap[1], chance[1]) == (0, 0)
    empty = Trace(NEURONS, COUNTS)
    assert empty.union_sizes() == {}
    assert replay(empty, COUNTS, "lru").hit_rate == 0
    assert empty.adjacent_overlap()[0].tolist() == [0, 0]


# ---------------------------------------------------------------- the file


def test_a_trace_comes_back_from_its_file(tmp_path: Path) -> None:
    for trace in (recorded(), Trace(NEURONS, COUNTS), Trace(3, np.empty((0, 2), dtype=int))):
        trace.save(tmp_path / "run.npz")
        assert same(Trace.load(tmp_path / "run.npz"), trace)
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded().save(tmp_path / "run.npz")
    old = (tmp_path / "run.npz").read_bytes()

    def fails(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(arrays.np, "savez", fails)
    with pytest.raises(OSError, match="disk full"):
        recorded(seed=1).save(tmp_path / "run.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]
    assert (tmp_path / "run.npz").read_bytes() == old


def test_a_damaged_file_is_refused_or_means_the_same(tmp_path: Path) -> None:
    path, trace = tmp_path / "run.npz", recorded(tokens=3)
    trace.save(path)
    whole = path.read_bytes()
    chance = random.Random(5)
    cut = [whole[:size] for size in (0, 1, 100, len(whole) // 2, len(whole) - 1)]
    changed = []
    for place in chance.sample(range(len(whole)), 400):
        byte = whole[place] ^ (1 << chance.randrange(8))
        changed.append(whole[:place] + bytes([byte]) + whole[place + 1 :])
    refused = 0
    for data in cut + changed:
        path.write_bytes(data)
        try:
            found = Trace.load(path)
        except ValueError:
            refused += 1
        else:
            assert same(found, trace)  # a byte that says nothing, such as a date
    assert refused > 100


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.npz"
    good = {"format": "tiercache-trace-1", "neurons": 5, "counts": [[2]], "order_0": [[0, 1]]}
    wrong = [
        {"format": "tiercache-trace-2"},
        {"neurons": 1},
        {"counts": [[3]]},
        {"counts": [2]},
        {"order_0": [[0.5, 1.5]]},
        {"order_0": [[0, 7]]},
        {"order_0": np.array([[None, None]])},
    ]
    for change in wrong:
        np.savez(path, **(good | change))
        with pytest.raises(ValueError, match="record it again"):
            Trace.load(path)
    for name in good:
        np.savez(path, **{key: value for key, value in good.items() if key != name})
        with pytest.raises(ValueError, match="record it again"):
            Trace.load(path)
    np.savez(path, **good)
    assert Trace.load(path).wanted(0, 0, 0).tolist() == [0, 1]
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "missing.npz")


# ---------------------------------------------------------------- replay

SLOTS = [[9, 3], [6, 2]]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("max_fetches", [None, 2])
@pytest.mark.parametrize("warm", [False, True])
def test_a_replay_is_the_steps_by_hand(name: str, max_fetches: int | None, warm: bool) -> None:
    trace = recorded()
    heat = recorded(seed=7).frequencies()
    if name == "hot" and not warm:
        pytest.skip("needs frequencies")
    log: list[tuple[int, int, int, Step]] = []
    outcome = replay(trace, SLOTS, name, max_fetches, hot=heat if warm else None, log=lambda *what: log.append(what))
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert [entry[:3] for entry in log] == [(token, *place) for token in range(12) for place in places]
    for layer, plane in places:
        eviction = make(name, future=list(trace.rows(layer, plane)), hot=heat[layer])
        residency = NeuronResidency(NEURONS, SLOTS[layer][plane], eviction, max_fetches=max_fetches)
        if warm:
            own = eviction.preload()
            residency.warm(own if own.size else hottest(heat[layer], SLOTS[layer][plane]))
        steps = [step for _, *place, step in log if place == [layer, plane]]
        for token, step in enumerate(steps):
            mine = residency.step(trace.wanted(layer, plane, token))
            for part in ("hits", "loads", "slots", "evicted", "refused"):
                assert getattr(mine, part).tolist() == getattr(step, part).tolist()
        counted = (outcome.hits, outcome.loads, outcome.evictions, outcome.refused)
        for array, part in zip(counted, ("hits", "loads", "evicted", "refused"), strict=True):
            assert array[layer, plane] == sum(getattr(step, part).size for step in steps)
    assert np.array_equal(outcome.requests, outcome.hits + outcome.loads + outcome.refused)
    assert outcome.requests.sum() == 12 * 22


def test_planes_without_slots_are_not_asked_and_refuse_all() -> None:
    log: list[tuple[int, int]] = []
    trace = recorded()
    outcome = replay(trace, [[0, 3], [0, 0]], "lru", log=lambda _, layer, plane, __: log.append((layer, plane)))
    assert set(log) == {(0, 1)}
    assert outcome.refused[:, 0].tolist() == [120, 96]
    assert outcome.chance == pytest.approx(3 / NEURONS * 48 / 264)
    assert replay(trace, np.zeros((2, 2), dtype=int), "lru").lift == 0


def test_chance_is_what_a_random_set_hits() -> None:
    draw = np.random.default_rng(3)
    trace = Trace(200, [[60]])
    for _ in range(300):
        trace.append([draw.permutation(200)])
    outcome = replay(trace, [[80]], "hot", hot=draw.random((1, 200)))
    assert outcome.chance == 0.4
    assert outcome.hit_rate == pytest.approx(0.4, abs=0.02)
    assert outcome.lift == pytest.approx(1, abs=0.05)
    assert replay(trace, [[500]], "hot", hot=draw.random((1, 200))).hit_rate == outcome.chance / 0.4


@pytest.mark.parametrize("slots", [[9, 3], [[9], [6]], [[9, 3], [6, -1]]])
def test_replay_refuses_other_shapes(slots: list) -> None:
    with pytest.raises(ValueError, match="2 layers x 2 planes"):
        replay(recorded(), slots, "lru")
    with pytest.raises(ValueError, match=f"2 layers x {NEURONS} neurons"):
        replay(recorded(), SLOTS, "lru", hot=np.ones(NEURONS))


@pytest.mark.parametrize("max_fetches", [None, 0, 2])
def test_compare_has_every_policy_and_its_bound(max_fetches: int | None) -> None:
    trace, heat = recorded(tokens=30), recorded(seed=7).frequencies()
    rows = compare(trace, SLOTS, max_fetches, [100, 10], hot=heat)
    assert [row.policy for row in rows] == list(POLICIES)
    assert {row.belady for row in rows} == {replay(trace, SLOTS, "belady", hot=heat).hit_rate}
    for row in rows:
        assert row.hit_rate <= row.belady
        assert row.lift == pytest.approx(row.hit_rate / row.chance)
        outcome = replay(trace, SLOTS, row.policy, None if row.policy == "belady" else max_fetches, hot=heat)
        assert row.loaded_bytes == int((outcome.loads * [100, 10]).sum())
        missed = outcome.requests - outcome.hits
        assert row.missed_bytes == int((missed * [100, 10]).sum())
    found = best(rows)
    assert found != "belady"
    assert (
        min(row.missed_bytes for row in rows if row.policy != "belady")
        == rows[list(POLICIES).index(found)].missed_bytes
    )
    assert [row.policy for row in compare(trace, SLOTS, max_fetches, [1, 1])] == [
        name for name in POLICIES if name != "hot"
    ]
    with pytest.raises(ValueError, match="2 planes"):
        compare(trace, SLOTS, max_fetches, [1])


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(0, NEURONS), st.none() | st.integers(0, 6), st.booleans())
def test_no_policy_beats_the_bound_from_any_start(seed: int, slots: int, max_fetches: int | None, warm: bool) -> None:
    heat = np.random.default_rng(seed).random((LAYERS, NEURONS)) if warm else None
    for row in compare(recorded(seed=seed), [[slots, slots // 2]] * 2, max_fetches, [2, 1], hot=heat):
        assert row.hit_rate <= row.belady


def test_best_takes_the_fewest_bytes_and_the_first_of_equals() -> None:
    rows = [
        PolicyRow(name, 0.5, 0.5, 1.0, *sizes, 0.9) for name, sizes in {"a": (5, 5), "b": (9, 0), "c": (0, 9)}.items()
    ]
    assert best([*rows, PolicyRow("belady", 0.9, 0.5, 1.8, 0, 1, 0.9)]) == "b"
    with pytest.raises(ValueError, match="compare"):
        best([])


# ---------------------------------------------------------------- what a step costs


def test_the_cost_table_ends_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    policy_cost.main(["--layers", "3", "--neurons", "512", "--tokens", "3"])
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert [cost["policy"] for cost in record["costs"]] == [name for name in POLICIES for _ in range(2)]
    assert all(cost["median_us"] > 0 for cost in record["costs"])
    assert len(table) == 3 + 2 * len(POLICIES)


def test_made_up_wishes_overlap_as_asked() -> None:
    size = policy_cost.Size(layers=2, neurons=8192, tokens=6)
    for overlap in (0.6, 0.8):
        share, chance = policy_cost.synthetic(size, overlap).adjacent_overlap()
        assert share == pytest.approx(overlap, abs=0.02)
        assert chance.tolist() == [0.5, 0.5]
