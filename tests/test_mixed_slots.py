"""Slots of single neurons' planes: they change what moves and never what comes out; a replay knows what they did."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import cachetools
import numpy as np
import pytest
import torch
import transformers as tf
from mixed_oracle import Oracle, apart, calibration, mixed, orders

import tiercache
from policies.eviction import BOUND, POLICIES
from policies.neurons import Step
from policies.precision import Recipe, exact_bytes
from profiler import replay
from profiler.trace import Trace
from tiercache.compat import cache_kwargs, cache_out
from tiercache.kernels.contract import SlotRows
from tiercache.model import shortlist
from tiercache.quant.planes import plane_row_bytes, scale_row_bytes

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe("product", 1, 2, (0.2, 0.3, 0.2))
IDS = torch.randint(3, 131, (2, 10), generator=torch.Generator().manual_seed(7))
ALONE, BOTH = IDS[:1], IDS
PLENTY = "64MiB"
# Bytes of slots: none, a few rows, about a third of what a token wants, about all of it, all neurons.
SLOTS = (0, 3_000, 8_000, 20_000, 10_000_000)
NAMES = [name for name in POLICIES if name != BOUND]
Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def store(plane_store: Folders) -> Path:
    return plane_store("llama")


@pytest.fixture(scope="module")
def bare(store: Path) -> dict[int, int]:
    """By the ranking's precision: an HBM budget with which everything stays but single neurons, and no slot is left."""
    found = {}
    for rank in (1, 2):
        with mixed(store, Recipe("product", rank, 2, RECIPE.shares), hbm=PLENTY) as model:
            plan = model.tiercache.plan.hbm
            found[rank] = sum(plan.reserved_bytes.values()) + plan.slab_bytes
    return found


def decode(model: tf.PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits of single-token steps."""
    found, output = [], None
    with torch.no_grad():
        for token in ids.split(1, dim=1):
            output = model(token, **cache_kwargs(model, output and cache_out(output)), use_cache=True)
            found.append(output.logits)
    return torch.cat(found, dim=1)


Moves = list[tuple[int, int, Step]]


@contextmanager
def steps(model: tf.PreTrainedModel) -> Iterator[Moves]:
    """What the engine's residencies did within: (layer, plane, step)."""
    moves: Moves = []

    def listen(layer: int, plane: int, residency: Any) -> None:
        step = residency.step

        def heard(wanted: np.ndarray) -> Step:
            moves.append((layer, plane, step(wanted)))
            return moves[-1][2]

        residency.step = heard

    slots = model.tiercache.mixed.slots
    for layer, residencies in enumerate(slots._residencies):
        for plane, residency in enumerate(residencies):
            listen(layer, plane, residency)
    yield moves
    for residencies in slots._residencies:
        for residency in residencies:
            del residency.step


def same(moves: Moves, others: Moves) -> bool:
    """Whether each layer and plane had the same steps in the same order."""
    names = ("hits", "loads", "slots", "evicted", "refused")
    ordered = [sorted(some, key=lambda move: move[:2]) for some in (moves, others)]
    return len(moves) == len(others) and all(
        one[:2] == other[:2] and all(np.array_equal(getattr(one[2], name), getattr(other[2], name)) for name in names)
        for one, other in zip(*ordered, strict=True)
    )


def where(model: tf.PreTrainedModel) -> list[np.ndarray]:
    """Who lies in which slot."""
    return [one.slot_of.copy() for layer in model.tiercache.mixed.slots._residencies for one in layer]


# The same bits wherever planes lie.


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("ids", [ALONE, BOTH], ids=["one", "batch"])
def test_slots_change_no_bit(ids: torch.Tensor, rank: int, store: Path, bare: dict[int, int]) -> None:
    recipe = Recipe("product", rank, 2, RECIPE.shares)
    with mixed(store, recipe) as model:
        want = decode(model, ids)
    moved = []
    for extra in SLOTS:
        for policy in ("lru", "hot") if extra == 8_000 else ("auto",):
            with mixed(store, recipe, hbm=bare[rank] + extra, policy=policy) as model:
                assert torch.equal(decode(model, ids), want)
                stats = model.tiercache.stats()
                moved.append(stats.neurons.moved_bytes)
                assert stats.neurons.hits + stats.neurons.uploads == stats.neurons.requests
                assert stats.neurons.at_hand == 0
                assert stats.neurons.wanted_bytes == stats.neurons.hit_bytes + moved[-1]
                assert all(tier.peak_bytes <= tier.capacity_bytes for tier in stats.tiers.values())
    assert moved[0] > moved[1] > moved[2] > moved[4] > 0, "more slots, less to bring"
    assert moved[-1] == 0, "every neuron has a slot, and they are filled before the first pass"


def test_tokens_of_one_pass_do_not_take_each_other_s_planes(store: Path, bare: dict[int, int]) -> None:
    """Inward products of all tokens come before the first down product: what the first token reads must stay."""
    with mixed(store, RECIPE) as model, torch.no_grad():
        want = [model(ids).logits for ids in (ALONE[:, :4], BOTH[:, :2], ALONE[:, :3])]
    for policy in NAMES:
        with mixed(store, RECIPE, hbm=bare[1] + 3_000, policy=policy) as model, torch.no_grad():
            got = [model(ids).logits for ids in (ALONE[:, :4], BOTH[:, :2], ALONE[:, :3])]
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True)), policy


def test_units_that_pass_through(store: Path) -> None:
    """An HBM tier too small for the ranking's planes: they stream, and the bits stay."""
    with mixed(store, RECIPE) as model:
        want = decode(model, ALONE)
        plan = model.tiercache.plan
    with mixed(store, RECIPE, hbm=PLENTY) as model:
        reserved = sum(model.tiercache.plan.hbm.reserved_bytes.values())
    assert plan.hbm is None
    with mixed(store, RECIPE, hbm=reserved + 100_000) as model:
        assert torch.equal(decode(model, ALONE), want)
        assert model.tiercache.plan.hbm.neuron_bytes < 10_000
        assert model.tiercache.stats().tiers["hbm"].misses > 0


def test_more_neurons_than_pass_at_once(tmp_path: Path) -> None:
    """Dense passes bring a plane in chunks of whole sums: as exact as from DRAM, bit by bit."""
    config = tf.LlamaConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=1300,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "checkpoint")
    tiercache.convert(tmp_path / "checkpoint", tmp_path / "store")
    recipe = Recipe("product", 1, 2, (0.1, 0.2, 0.1))
    passes = [ALONE[:, :1], ALONE, BOTH]
    options = {"precision": "int8", "dram": "256MiB", "context": 64, "kernels": "unfused"}
    with tiercache.offload(tmp_path / "store", **options) as model, torch.no_grad():
        want = [model(ids).logits for ids in passes]
    with mixed(tmp_path / "store", recipe, kernels="unfused") as model, model.tiercache.every_token(), torch.no_grad():
        every = model(BOTH).logits
    with mixed(tmp_path / "store", recipe, hbm=PLENTY, kernels="unfused") as model, torch.no_grad():
        assert model.tiercache.mixed.slots.at_once == 512
        with model.tiercache.passes("exact"):
            assert all(torch.equal(model(ids).logits, exact) for ids, exact in zip(passes, want, strict=True))
        with model.tiercache.every_token():
            assert (
                apart(model(BOTH).logits, every) < 1e-3
            )  # sums of precisions within chunks, not of chunks within precisions


# Caps.


@pytest.mark.parametrize("fetches", [0, 1, 7])
def test_fetches_are_capped(fetches: int, store: Path, bare: dict[int, int]) -> None:
    with mixed(store, RECIPE) as model:
        want = decode(model, ALONE)
    with mixed(store, RECIPE, hbm=bare[1] + 8_000, max_fetches=fetches) as model:
        cap = fetches * sum(model.tiercache.mixed.slots.plan.widths) * len(model.tiercache.mixed.blocks)
        neurons = model.tiercache.stats().neurons
        for token in range(6):
            before = neurons.moved_bytes
            got = decode(model, ALONE[:, token : token + 1])
            assert neurons.moved_bytes - before <= cap
        assert neurons.at_hand > 0
        assert neurons.hits + neurons.uploads + neurons.at_hand == neurons.requests
        assert (neurons.moved_bytes > 0) == (fetches > 0)
        assert not torch.equal(got, want[:, 5:6])


def test_what_is_at_hand_is_what_the_oracle_lowers(checkpoint: Folders, store: Path, bare: dict[int, int]) -> None:
    """Without slots and fetches every neuron does with the ranking's planes: a recipe of its own."""
    lowered = calibration(store, Recipe("product", 2, 2, (0.0, 0.5, 0.2)))
    oracle = Oracle(checkpoint("llama"), lowered, "int8")
    with mixed(store, Recipe("product", 2, 2, RECIPE.shares), hbm=bare[2], max_fetches=0) as model, torch.no_grad():
        with orders(model) as chosen:
            got = model(ALONE[:, :1]).logits
        assert apart(got, oracle.logits(chosen, ALONE[:, :1]).logits) < 1e-3
        assert model.tiercache.stats().neurons.moved_bytes == 0


# A replay of the recorded wishes.


@pytest.mark.parametrize("max_fetches", [None, 0, 5])
@pytest.mark.parametrize("policy", NAMES)
def test_replay_is_execution(policy: str, max_fetches: int | None, store: Path, bare: dict[int, int]) -> None:
    made = calibration(store, RECIPE)
    with mixed(store, made, hbm=bare[1] + 9_000, policy=policy, max_fetches=max_fetches) as model:
        with steps(model) as moves, model.tiercache.recording() as trace:
            decode(model, BOTH)  # two sequences: every pass chooses for two tokens
            decode(model, ALONE)
        neurons, slots = model.tiercache.stats().neurons, model.tiercache.mixed.slots.plan.slots
    assert trace.tokens == 30 == neurons.tokens
    again: Moves = []

    def log(token: int, layer: int, plane: int, step: Step) -> None:
        again.append((layer, plane, step))

    outcome = replay.replay(trace, slots, policy, max_fetches, hot=made.frequency, log=log)
    assert same(moves, again)
    assert (int(outcome.hits.sum()), int(outcome.requests.sum())) == (neurons.hits, neurons.requests)
    assert neurons.hit_rate == outcome.hit_rate
    assert neurons.chance == pytest.approx(outcome.chance)
    assert neurons.belady >= neurons.hit_rate
    if policy == "hot":
        assert not outcome.evictions.any()
    elif max_fetches != 0:
        assert outcome.evictions.all()
    without_start = replay.replay(trace, slots, policy, max_fetches, hot=made.frequency[:, ::-1])
    assert without_start.hits.tolist() != outcome.hits.tolist(), "a replay from another start would be noticed"


def cachetools_hits(trace: Trace, layer: int, plane: int, slots: int, start: np.ndarray) -> int:
    """Hits of a least recently used cache that is asked for a token's neurons: those it has, then the others."""
    cache: cachetools.LRUCache = cachetools.LRUCache(slots)
    for neuron in start[:slots][::-1]:
        cache[int(neuron)] = True
    hits = 0
    for token in range(trace.tokens):
        wanted = trace.wanted(layer, plane, token).tolist()
        found = [neuron for neuron in wanted if neuron in cache]
        hits += sum(cache[neuron] for neuron in found)
        loads = [neuron for neuron in wanted if neuron not in found][: slots - len(found)]
        for neuron in loads:
            cache[neuron] = True
    return hits


@pytest.mark.parametrize("extra", [3_000, 9_000, 20_000])
def test_lru_is_cachetools(extra: int, store: Path, bare: dict[int, int]) -> None:
    made = calibration(store, RECIPE)
    with mixed(store, made, hbm=bare[1] + extra, policy="lru") as model:
        with steps(model) as moves, model.tiercache.recording() as trace:
            decode(model, BOTH)
        slots = model.tiercache.mixed.slots.plan.slots
    for layer, planes in enumerate(slots):
        start = np.argsort(-made.frequency[layer], kind="stable")
        for plane, room in enumerate(planes):
            hits = sum(step.hits.size for place, which, step in moves if (place, which) == (layer, plane))
            assert hits == cachetools_hits(trace, layer, plane, room, start)
            assert 0 < hits < trace.counts[layer, plane] * trace.tokens


def test_a_recording_without_slots_and_of_a_pass_cut_off(store: Path, bare: dict[int, int]) -> None:
    found = []
    for hbm in (None, bare[1] + 9_000):
        with mixed(store, RECIPE, hbm=hbm) as model, torch.no_grad():
            handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda *_: 1 / 0)
            with model.tiercache.recording() as trace:
                with pytest.raises(ZeroDivisionError):
                    model(BOTH[:, :1])
                handle.remove()
                decode(model, BOTH[:, :3])
            assert trace.tokens == 6
            assert trace.counts.tolist() == [[52, 21]] * 3
            found.append(trace)
    for one, other in zip(*(trace.order for trace in found), strict=True):
        assert np.array_equal(one, other)


# Passes with what is there.


@pytest.mark.parametrize("extra", [0, 8_000, 10_000_000])
def test_resident_passes_move_nothing(extra: int, checkpoint: Folders, store: Path, bare: dict[int, int]) -> None:
    with mixed(store, RECIPE) as model:
        want = decode(model, ALONE)
        with model.tiercache.passes("exact"):
            exact = decode(model, ALONE)
    with mixed(store, RECIPE, hbm=bare[1] + extra) as model:
        decode(model, BOTH[:, :3])
        neurons, before = model.tiercache.stats().neurons, where(model)
        moved, requests = neurons.moved_bytes, neurons.requests
        with model.tiercache.passes("resident"), torch.no_grad():
            got = decode(model, ALONE)
            with orders(model) as chosen:
                several = model(ALONE).logits
        assert (neurons.moved_bytes, neurons.requests) == (moved, requests)
        assert all(np.array_equal(one, other) for one, other in zip(before, where(model), strict=True))
        assert torch.equal(got, want) == (extra == SLOTS[-1]), "the same only where all wanted planes are in slots"
        if extra == SLOTS[-1]:
            oracle = Oracle(checkpoint("llama"), calibration(store, RECIPE), "int8")
            assert apart(several, oracle.logits(chosen, ALONE).logits) < 1e-3
        with model.tiercache.passes("exact"):
            assert torch.equal(decode(model, ALONE), exact)
        assert torch.equal(decode(model, ALONE), want)


# Bytes.


def touched(model: tf.PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts, product by product, the bytes of the neurons' rows that the kernels are given."""
    blocks = model.tiercache.mixed.blocks
    kernels, counted = blocks[0]._matmuls.kernels, [0]
    rows_of = blocks[0].planes.block.neurons

    def add(weights: Any, rows: Any) -> None:
        for weight in weights:
            count = rows_of if rows is None else rows.count if isinstance(rows, SlotRows) else len(rows)
            planes = sum(plane.shape[1] for plane in weight.planes)
            counted[0] += count * (planes + weight.scales[0].numel() * 2)

    matmuls, down = kernels.matmuls, kernels.matmul_transposed

    def counting_products(x: Any, weights: Any, outs: Any, rows: Any = None) -> None:
        add(weights, rows)
        matmuls(x, weights, outs, rows)

    def counting_down(x: Any, weight: Any, out: Any, rows: Any = None) -> None:
        add([weight], rows)
        down(x, weight, out, rows)

    for block in blocks:
        own = type("Counting", (), {"__getattr__": lambda _, name: getattr(kernels, name)})()
        own.matmuls, own.matmul_transposed = counting_products, counting_down
        monkeypatch.setattr(block._matmuls, "kernels", own)
    return counted


@pytest.mark.parametrize("hbm", [None, PLENTY])
@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        Recipe("product", 2, 2, RECIPE.shares),
        Recipe("gate", 1, 1, (0.1, 0, 0.3)),
        Recipe("up", 2, 1, (0, 1, 0)),
    ],
    ids=lambda recipe: f"{recipe.scorer}{recipe.rank}",
)
def test_read_bytes_are_what_the_products_touch(
    recipe: Recipe, hbm: str | None, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mixed(store, recipe, hbm=hbm) as model:
        counted = touched(model, monkeypatch)
        decode(model, ALONE[:, :3])
        decode(model, BOTH[:, :2])
        neurons, run = model.tiercache.stats().neurons, model.tiercache.mixed
        each = sum(recipe.read_bytes(104, block.sizes) for block in run.blocks)
        assert neurons.read_bytes == counted[0] == 7 * each == neurons.tokens * run.read_bytes
        assert each < sum(exact_bytes(104, block.sizes) for block in run.blocks)
        needed = model.tiercache.pass_bytes()["needed"]
        with tiercache.offload(store, precision="int8", dram="256MiB", context=64) as exact:
            whole = exact.tiercache.pass_bytes()["needed"]
            head = exact.tiercache.payload[exact.tiercache._asked.needs.order[-1]]
        columns, group, rows = run.head.columns, run.head.group, run.head.rows
        first, second, third = (plane_row_bytes(columns, group, plane) for plane in range(3))
        scales = scale_row_bytes(columns, group)
        saved = (rows - -(-rows // 24)) * (second + third) - -(-rows // 24) * (first + scales)
        assert head - shortlist.read_bytes(run.head) == saved
        assert whole - needed == sum(exact_bytes(104, block.sizes) for block in run.blocks) - each + saved


def test_slot_memory_is_what_was_planned(store: Path, bare: dict[int, int]) -> None:
    sizes = []
    for extra in SLOTS:
        with mixed(store, RECIPE, hbm=bare[1] + extra) as model:
            plan, slots = model.tiercache.plan.hbm, model.tiercache.mixed.slots
            passing = sum(count * width for count, width in zip(slots.plan.passing, slots.plan.widths, strict=True))
            assert plan.neuron_bytes <= extra
            assert slots.plan.nbytes - passing <= plan.neuron_bytes
            assert sum(slab.nbytes for slab in slots.slabs) == slots.plan.nbytes
            assert passing <= plan.reserved_bytes["neurons in passing"]
            spent = plan.slab_bytes + plan.neuron_bytes + sum(plan.reserved_bytes.values())
            assert spent <= plan.capacity_bytes
            sizes.append(slots.plan.nbytes)
    assert all(one < other for one, other in pairwise(sizes))
    assert list(accumulate(sizes, max)) == sizes
