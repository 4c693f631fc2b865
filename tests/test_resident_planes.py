"""Units cut by plane: exact passes give the same bits as ever, and resident ones do with what stays, moving nothing."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import CONFIGS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiercache
from policies.pinned import place, smallest_bytes
from policies.plan import PlanInputs
from policies.residency import Residency
from tiercache.compat import cache_kwargs, cache_out
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import Budget
from tiercache.engine import machine, memory
from tiercache.engine.budgets import fill_tiers
from tiercache.engine.offload import open_offloaded
from tiercache.errors import DoesNotFitError, EnvironmentUnsupportedError, UsageError
from tiercache.kernels.contract import Kernels
from tiercache.kernels.reference import ReferenceKernels
from tiercache.kernels.select import select
from tiercache.model.linear import is_down
from tiercache.model.trace import MetaTrace, trace_on_meta
from tiercache.quant import planes
from tiercache.quant.hadamard import transform
from tiercache.stats.run import Stats
from tiercache.store.manifest import Manifest, PlaneWeight
from tiercache.store.planestore import PlaneStore
from tiercache.store.reader import Reader, aligned_buffer

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 64
IDS = torch.randint(3, 131, (1, 7), generator=torch.Generator().manual_seed(5))
Folders = Callable[..., Path]


@contextmanager
def offloaded(
    store: Path, precision: str = "int8", *, resident: bool = True, **options: Any
) -> Iterator[tf.PreTrainedModel]:
    """A store's model, within budgets in bytes; `trace` collects (tier, event, unit)."""
    trace = options.pop("trace", [])
    sizes = {"hbm": None, "dram": "64MiB"} | {name: options.pop(name) for name in ("hbm", "dram") if name in options}
    places = {name: None if size is None else Budget.parse(size) for name, size in sizes.items()}
    options = {"cpu_tokens": 0, "context": CONTEXT, "device": "cpu"} | options
    config = OffloadConfig(**places, precision=precision, resident=resident, **options)
    with open_offloaded(store, config, observe=lambda *event: trace.append(event)) as model, torch.no_grad():
        yield model


@pytest.fixture(scope="module", autouse=True)
def traced_once() -> Iterator[None]:
    """Half of what opening a toy takes; the same whatever the budgets."""
    known: dict[str, MetaTrace] = {}

    def trace_once(model: tf.PreTrainedModel, *arguments: Any) -> MetaTrace:
        key = f"{model.config.to_json_string()} {model.dtype} {arguments}"
        return known[key] if key in known else known.setdefault(key, trace_on_meta(model, *arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "trace_on_meta", trace_once)
        yield


def missing(asked: PlanInputs, hbm: int | None, dram: int) -> int:
    """Bytes that are missing of a budget, as the planner says."""
    with pytest.raises(DoesNotFitError) as refusal:
        fill_tiers(asked, hbm_bytes=hbm, dram_bytes=dram)
    return refusal.value.missing_bytes


@dataclass(frozen=True)
class Least:
    """The smallest budgets that the planner takes for what a model asks."""

    asked: PlanInputs

    def streaming(self, spare: int) -> dict[str, int]:
        """Main memory alone, with so much above the least."""
        return {"dram": 1 + missing(self.asked, None, 1) + spare}

    def two(self, spare: int, below: int = 10_000) -> dict[str, int]:
        """An HBM region with so much above the least, and what is below it likewise."""
        hbm = 1 + missing(self.asked, 1, 64 << 20) + spare
        return {"hbm": hbm, "dram": 1 + missing(self.asked, hbm, 1) + below}


@pytest.fixture(scope="module")
def least(plane_store: Folders) -> Callable[..., Least]:
    """`least(name, precision)` of a tiny model."""

    @cache
    def get(name: str, precision: str = "int8") -> Least:
        with offloaded(plane_store(name), precision) as model:
            return Least(model.tiercache._asked.needs)

    return get


def slots_of(manifest: Manifest) -> list[Tensor]:
    """Every unit, read."""
    found = []
    with Reader() as reader:
        for unit in manifest.units:
            slot = aligned_buffer(unit.slot_bytes)
            reader.read(unit.pieces, slot).wait()
            found.append(torch.from_numpy(slot))
    return found


def counts(model: tf.PreTrainedModel, manifest: Manifest) -> dict[str, int]:
    """Of each matrix, how many planes a resident pass may use: those that stay, but not all."""
    plan = model.tiercache.plan
    stays = set((plan.hbm or plan.dram).placement.pinned)
    found = {}
    for module, weight in manifest.weights.items():
        number = 0
        while number < len(weight.units) - 1 and weight.units[number] in stays:
            number += 1
        found[module] = number
    return found


class Oracle:
    """The model resident in memory, each matrix at its own number of planes: no tiers, no cut, no hooks."""

    def __init__(self, checkpoint: Path, store: Path) -> None:
        self.model = tf.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        manifest = PlaneStore.open(store).manifest("int8")
        self._weights, self._slots = manifest.weights, slots_of(manifest)

    def logits(self, planes_of: dict[str, int]) -> Tensor:
        """Of `IDS`."""
        for name, weight in self._weights.items():
            module = self.model.get_submodule(name)
            assert isinstance(weight, PlaneWeight)
            precision = next(precision for precision, number in planes.PRECISIONS.items() if number == planes_of[name])
            slot, down = self._slots[weight.unit], is_down(module, weight)
            parts = [weight.part(slot, part).at(precision) for part in weight.own]
            module.forward = partial(_multiply, module, parts, weight.output_factors(slot) if down else None)
        with torch.no_grad():
            return self.model(IDS).logits


@pytest.fixture(scope="module")
def oracle(checkpoint: Folders, plane_store: Folders) -> Callable[[str], Oracle]:
    """`oracle(name)` of a tiny model."""
    return cache(lambda name: Oracle(checkpoint(name), plane_store(name)))


def _multiply(module: nn.Module, parts: Sequence[planes.Planes], factors: Tensor | None, x: Tensor) -> Tensor:
    """`factors` of the outputs of a down matrix; None for other matrices."""
    kernels: Kernels = select(torch.device("cpu"))
    tokens = x.reshape(-1, x.shape[-1])
    if factors is not None:
        sums = torch.zeros(len(tokens), parts[0].columns)
        kernels.matmul_transposed(tokens, parts[0], sums)
        result = transform(sums) * factors
    else:
        outs = [torch.zeros(len(tokens), part.rows) for part in parts]
        for part, out in zip(parts, outs, strict=True):
            kernels.matmul(kernels.quantize_activations(transform(tokens), part.group), part, out)
        result = torch.cat(outs, dim=1)
    return (result if module.bias is None else result + module.bias).view(*x.shape[:-1], -1)


@dataclass
class Seen:
    """What a model gave: exact logits of a prefill, of three steps and of a prefill; resident logits of prefills."""

    exact: list[Tensor]
    drafts: list[Tensor]
    stats: Stats


def draft(model: tf.PreTrainedModel) -> Tensor:
    with model.tiercache.passes("resident"):
        return model(IDS).logits


def run(model: tf.PreTrainedModel, drafts: Sequence[int] = ()) -> Seen:
    """Exact passes, with so many resident ones before each."""
    seen, cache = Seen([], [], model.tiercache.stats()), None
    before = iter((*drafts, 0, 0, 0, 0, 0))
    for ids in (IDS, *IDS[:, :3].split(1, dim=1), IDS):
        seen.drafts += [draft(model) for _ in range(next(before))]
        output = model(ids, **cache_kwargs(model, cache if ids.shape[1] == 1 else None), use_cache=True)
        cache = cache_out(output)
        seen.exact.append(output.logits)
    model.tiercache.stats()
    return seen


def equal(got: Sequence[Tensor], want: Sequence[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


@pytest.mark.parametrize(("precision", "kernels"), [("int8", "unfused"), ("int4", "auto")])
@pytest.mark.parametrize("name", CONFIGS)
def test_exact_passes_are_exact_and_resident_ones_do_with_what_stays(
    name: str, precision: str, kernels: Any, oracle: Callable[[str], Oracle], plane_store: Folders
) -> None:
    store = plane_store(name)
    manifest = PlaneStore.open(store).manifest(precision, cut=True)
    with offloaded(store, precision, resident=False, kernels=kernels) as model:
        want, needed = run(model).exact, model.tiercache.pass_bytes()["needed"]
    streamed, mixes = 0, set()
    kinds: list[dict[str, Any]] = [{"hbm": "64MiB", "dram": "8MiB"}]
    for kind in kinds:
        with offloaded(store, precision, kernels=kernels, **kind) as model:
            seen, each, mix = run(model, (1, 0, 2, 1)), model.tiercache.pass_bytes(), counts(model, manifest)
            if len(kinds) == 1:
                smallest = Least(model.tiercache._asked.needs)
                kinds += [smallest.streaming(80_000), smallest.two(80_000)]
            mixes.add(tuple(sorted(set(mix.values()))))
            assert equal(seen.exact, want), kind
            lowest = oracle(name).logits(mix)
            assert equal(seen.drafts, [seen.drafts[0]] * 4), kind
            if kernels == "unfused":
                assert equal(seen.drafts, [lowest] * 4), kind
            else:  # the same weights, in the order of sums of whole layers; another plane would be off by far more
                assert (seen.drafts[0] - lowest).abs().max() < 1e-3 * lowest.abs().max(), kind
            top = seen.stats.tiers.get("hbm", seen.stats.tiers["dram"])
            assert each["needed"] == needed
            assert top.needed_bytes == 5 * needed
            streamed += seen.stats.tiers["dram"].misses
            for tier in seen.stats.tiers.values():
                assert tier.peak_bytes <= tier.capacity_bytes
    assert streamed > 20
    assert mixes == ({(2,), (1, 2)} if precision == "int8" else {(1, 2)})  # the head has three planes, so two


@pytest.mark.parametrize("kind", [{}, {"hbm": "64MiB"}], ids=str)
@pytest.mark.parametrize(("precision", "lower"), [("int8", "int4"), ("int4", "int3")])
def test_with_everything_near_drafting_is_the_rung_below(
    precision: str, lower: str, kind: dict, plane_store: Folders
) -> None:
    with offloaded(plane_store("llama"), lower, resident=False) as model:
        want = model.model(IDS).last_hidden_state  # the head is at int8 there
        sizes = {"lower": model.tiercache.pass_bytes()["needed"]}
    with offloaded(plane_store("llama"), precision, **kind) as model:
        with model.tiercache.passes("resident"):
            assert torch.equal(model.model(IDS).last_hidden_state, want)
        head = model.lm_head
        codes = planes.num_groups(head.in_features, 64) * 64 * head.out_features
        assert model.tiercache.pass_bytes()["resident"] == sizes["lower"] - codes // 2


def test_resident_passes_are_counted_apart(plane_store: Folders) -> None:
    with offloaded(plane_store("llama")) as model:
        model(IDS)
        before = model.tiercache.stats().to_dict()
        for _ in range(3):
            draft(model)
        after, read = model.tiercache.stats().to_dict(), model.tiercache.pass_bytes()["resident"]
    changed = {name for name in after if after[name] != before[name]} - {"peak_rss_bytes"}
    assert changed == {"draft_passes", "draft_tokens", "resident_bytes", "fused_layers"}
    assert (after["draft_passes"], after["draft_tokens"], after["resident_bytes"]) == (3, 21, 3 * read)
    assert before["draft_passes"] == before["resident_bytes"] == 0


def test_the_clock_of_steps_runs_on_through_drafts(plane_store: Folders) -> None:
    with offloaded(plane_store("llama")) as model:
        stats = run(model, (0, 2, 2, 2)).stats
    assert (stats.passes, stats.decode_tokens, stats.draft_passes) == (5, 2, 6)
    assert stats.prefill_tokens == 14


def of(tier: str, trace: Sequence[tuple[str, str, int]]) -> list[tuple[str, int]]:
    return [(event, key) for where, event, key in trace if where == tier]


@pytest.mark.parametrize("tier", ["dram", "hbm"])
@settings(max_examples=4)
@given(st.lists(st.integers(0, 2), max_size=5))
def test_resident_passes_change_no_decision(
    tier: str, plane_store: Folders, least: Callable[..., Least], drafts: list[int]
) -> None:
    store = plane_store("qwen3")
    kind = least("qwen3").streaming(66_000) if tier == "dram" else least("qwen3").two(66_000)
    traces: list[list[tuple[str, str, int]]] = [[], []]
    seen = []
    for trace, before in zip(traces, ((), drafts), strict=True):
        with offloaded(store, trace=trace, **kind) as model:
            seen.append(run(model, before))
            sizes, plan = model.tiercache._asked.needs.sizes, model.tiercache.plan
    assert of(tier, traces[0]) == of(tier, traces[1])
    assert equal(seen[1].exact, seen[0].exact)
    share = plan.hbm if tier == "hbm" else plan.dram
    assert {"hit", "miss", "load", "evict"} <= {event for event, _ in of(tier, traces[1])}
    fresh = Residency(share.order, sizes, share.placement)
    assert replayed(of(tier, traces[1]), fresh) == of(tier, traces[1])


def replayed(trace: Sequence[tuple[str, int]], residency: Residency) -> list[tuple[str, int]]:
    """What a fresh `Residency` decides when it is asked the same."""
    said = [("load", load.key) for load in residency.pinned]

    def load_all() -> None:
        while (load := residency.next_load()) is not None:
            said.append(("load", load.key))

    for event, key in trace:
        if event in ("hit", "miss"):
            said.append(("hit" if residency.acquire(key).hit else "miss", key))
            load_all()
            residency.hold(key)
        elif event == "evict":
            residency.release(key)
            said.append(("evict", key))
            load_all()
    return said


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_missing_bytes_are_right(
    name: str, precision: str, plane_store: Folders, least: Callable[..., Least]
) -> None:
    store, smallest = plane_store(name), least(name, precision)
    short = r"\(1 bytes\).* first plane.* another drafter"
    for tier, sizes in (
        ("dram", smallest.streaming(-1)),
        ("hbm", smallest.two(0) | {"hbm": smallest.two(0)["hbm"] - 1}),
    ):
        with (
            pytest.raises(DoesNotFitError, match=rf"{tier}=.*{short}") as refusal,
            offloaded(store, precision, **sizes),
        ):
            pass
        assert refusal.value.missing_bytes == 1
    with (
        pytest.raises(DoesNotFitError, match=r"dram=.*\(1 bytes\)"),
        offloaded(store, precision, **smallest.two(0, -1)),
    ):
        pass
    with offloaded(store, precision, resident=False) as model:
        want = run(model).exact
    for sizes in (smallest.streaming(0), smallest.two(0, 0)):
        with offloaded(store, precision, **sizes) as model:
            assert equal(run(model, (1, 1)).exact, want)
            plan, units = model.tiercache.plan, model.tiercache._asked.needs
            assert units.levels[0] <= set((plan.hbm or plan.dram).placement.pinned)
            assert not set().union(*units.levels) <= set((plan.hbm or plan.dram).placement.pinned)


def test_every_plan_has_a_ring_for_the_planes_of_a_matrix(least: Callable[..., Least]) -> None:
    smallest, asked = least("llama"), least("llama").asked
    for spare in range(0, 300_000, 3500):
        for sizes in (smallest.streaming(spare), smallest.two(spare, spare // 3)):
            plan = fill_tiers(asked, hbm_bytes=sizes.get("hbm"), dram_bytes=sizes["dram"])
            for tier in filter(None, (plan.hbm, plan.dram)):
                passes = set(tier.order) - set(tier.placement.pinned)
                for matrix in asked.together:
                    passing = [asked.sizes[key] for key in matrix if key in passes]
                    assert sum(passing) + max(passing[1:], default=0) <= tier.placement.ring_bytes
                assert tier.slab_bytes + sum(tier.reserved_bytes.values()) <= tier.capacity_bytes


class BoomError(Exception):
    pass


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
@pytest.mark.parametrize("tier", ["dram", "hbm"])
def test_a_pass_that_is_cut_off_leaves_all_usable(
    tier: str, error: type, plane_store: Folders, least: Callable[..., Least]
) -> None:
    store = plane_store("llama")
    with offloaded(store, resident=False) as model:
        want = run(model).exact

    def boom(*_: object) -> None:
        raise error

    sizes = least("llama").streaming(66_000) if tier == "dram" else least("llama").two(66_000)
    with offloaded(store, **sizes) as model:
        lowest = draft(model)
        for resident in (True, False, True):
            handle = model.model.layers[1].mlp.up_proj.register_forward_pre_hook(boom)
            with pytest.raises(error), model.tiercache.passes("resident" if resident else "exact"):
                model(IDS)
            handle.remove()
            if not resident:
                assert torch.equal(draft(model), lowest)
            assert equal(run(model, (0, 1)).exact, want)
            assert torch.equal(draft(model), lowest)


@pytest.mark.parametrize("most", [1, 9])
def test_planes_of_one_matrix_are_multiplied_where_they_lie(
    most: int, plane_store: Folders, least: Callable[..., Least]
) -> None:
    store = plane_store("llama")
    with offloaded(store, resident=False) as model:
        want = run(model).exact
    loaded = []
    for tokens in (0, most):
        with offloaded(store, **least("llama").two(66_000), cpu_tokens=tokens) as model:
            lowest = draft(model)
            seen = run(model, (1, 1, 1, 1))
            assert equal(seen.exact, want)
            assert equal(seen.drafts, [lowest] * 4)
            assert seen.stats.cpu_passes == {0: 0, 1: 3, 9: 5}[tokens]
            loaded.append(seen.stats.tiers["hbm"].loaded_bytes)
    assert loaded[1] < loaded[0]


def test_without_kernels_planes_are_decoded(plane_store: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> Kernels:
        raise EnvironmentUnsupportedError("no compiler")

    with offloaded(plane_store("gpt2"), resident=False, kernels="decode") as model:
        want = run(model).exact
    with offloaded(plane_store("gpt2"), "int4", resident=False, kernels="decode") as model:
        low = model.transformer(IDS).last_hidden_state
    monkeypatch.setattr(machine, "select", refuse)
    with ExitStack() as stack:
        opened = offloaded(plane_store("gpt2"))
        with pytest.warns(UserWarning, match="decoded"):
            model = stack.enter_context(opened)
        assert equal(run(model, (1, 1)).exact, want)
        with model.tiercache.passes("resident"):
            assert torch.equal(model.transformer(IDS).last_hidden_state, low)


@pytest.mark.parametrize("compress", ["off", "on"])
def test_a_cut_manifest_has_every_plane_once(compress: str, plane_store: Folders) -> None:
    store = PlaneStore.open(plane_store("phi3", 128, compress))
    for precision, number in planes.PRECISIONS.items():
        whole, cut = store.manifest(precision), store.manifest(precision, cut=True)
        here, there = slots_of(whole), slots_of(cut)
        assert sum(unit.nbytes for unit in whole.units) == sum(unit.nbytes for unit in cut.units)
        assert sum(unit.slot_bytes for unit in whole.units) == sum(unit.slot_bytes for unit in cut.units)
        assert len({unit.name for unit in cut.units}) == len(cut.units)
        for module, weight in cut.weights.items():
            other = whole.weights[module]
            assert isinstance(weight, PlaneWeight) and isinstance(other, PlaneWeight)  # noqa: PT018
            assert len(weight.units) == (3 if module == "lm_head" else number)
            assert other.units == (other.unit,)
            slots = [there[key] for key in weight.units]
            for some in range(1, len(slots) + 1):
                name = next(name for name, planes_held in planes.PRECISIONS.items() if planes_held == some)
                for part in weight.own:
                    got = weight.part(slots[0], part, slots[1:some])
                    want = other.part(here[other.unit], part).at(name)
                    assert planes.decode(got, torch.float32).equal(planes.decode(want, torch.float32))
        assert cut.units[cut.embedding[1].unit] == whole.units[whole.embedding[1].unit]


WRONG = [
    ({"precision": "source"}, "source"),
    ({"precision": "int3"}, "int3"),
    ({"precision": "int8", "kernels": "decode"}, "decode"),
    ({"precision": "int8", "mode": "mixed", "bytes_per_token": Budget(fraction=0.5)}, "mixed"),
]


@pytest.mark.parametrize(("options", "word"), WRONG, ids=str)
def test_what_cannot_be_meant_is_refused(options: dict, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        OffloadConfig(hbm=None, dram=Budget(), resident=True, **options)


def test_kinds_of_passes(plane_store: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    with offloaded(plane_store("llama")) as model:
        want, lowest = model(IDS).logits, draft(model)
        with model.tiercache.passes("resident"):
            with model.tiercache.passes("exact"):
                assert torch.equal(model(IDS).logits, want)
            assert torch.equal(model(IDS).logits, lowest)
        for kind in ("mixed", "lazy"):
            with pytest.raises(UsageError, match=kind):
                model.tiercache.passes(kind)
    with offloaded(plane_store("llama"), resident=False) as model:
        assert "resident" not in model.tiercache.pass_bytes()
        with pytest.raises(UsageError, match="exactly"):
            model.tiercache.passes("resident")
    monkeypatch.setattr(machine, "resolve_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(machine, "capability_of", lambda _: (8, 6))
    monkeypatch.setattr(machine, "kernels_for", lambda *_: {"cuda": ReferenceKernels(torch.device("cpu"))})
    with pytest.raises(UsageError, match="cpu_tokens=4"), offloaded(plane_store("llama"), cpu_tokens=4):
        pass
    for drafter in ("resident", "auto"):
        options: dict[str, Any] = {"precision": "int8", "drafter": drafter, "cpu_tokens": 4}
        with (
            pytest.raises(UsageError, match="drafter='ngram'"),
            tiercache.offload(plane_store("llama"), **options),
        ):
            pass


def test_pico(pico_store: Path) -> None:
    with offloaded(pico_store) as model:
        tight = Least(model.tiercache._asked.needs).streaming(200_000)
    ids = torch.randint(3, 2000, (1, 24), generator=torch.Generator().manual_seed(0))
    logits = {}
    for name, options in {"whole": {"resident": False}, "cut": {}, "tight": tight}.items():
        with offloaded(pico_store, **options) as model:
            logits[name] = model(ids).logits
            if options.get("resident", True):
                with model.tiercache.passes("resident"):
                    logits[f"{name}, resident"] = model(ids).logits
                assert torch.equal(model(ids).logits, logits["whole"])
                sizes = model.tiercache.pass_bytes()
                assert sizes["resident"] < 0.55 * sizes["needed"]
                assert (sizes["ssd"] > 0) == (name == "tight")
    apart = {
        name: float(nn.functional.kl_div(other[0].float().log_softmax(-1), p, reduction="batchmean", log_target=True))
        for p in (logits["whole"][0].float().log_softmax(-1),)
        for name, other in logits.items()
    }
    assert apart["cut"] == apart["tight"] == 0
    assert 0 < apart["cut, resident"] < 0.05  # int4, its head too
    assert apart["cut, resident"] < apart["tight, resident"] < 1


# ---------------------------------------------------------------- place, with levels and keys that are held together


@dataclass(frozen=True)
class Matrices:
    """Sizes of the planes of some matrices, the lowest plane first."""

    sizes: list[list[int]]

    @property
    def groups(self) -> list[tuple[int, ...]]:
        return [tuple(10 * at + plane for plane in range(len(row))) for at, row in enumerate(self.sizes)]

    @property
    def by_key(self) -> dict[int, int]:
        rows = zip(self.groups, self.sizes, strict=True)
        return {key: size for keys, row in rows for key, size in zip(keys, row, strict=True)}

    @property
    def levels(self) -> list[set[int]]:
        return [{keys[plane] for keys in self.groups if plane < len(keys)} for plane in range(3)]


matrices = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3), min_size=1, max_size=8).map(Matrices)


@given(matrices, st.integers(0, 300), st.integers(0, 40), st.booleans())
def test_what_is_held_together_always_finds_room(of: Matrices, spare: int, ahead: int, first: bool) -> None:
    sizes, groups = of.by_key, of.groups
    always, levels = (of.levels[0], of.levels) if first else ((), ())
    capacity = smallest_bytes(list(sizes), sizes, always, groups) + spare
    placement = place(list(sizes), sizes, capacity, ahead, always, prefer=levels, together=groups)
    assert set(always) <= set(placement.pinned)
    assert placement.pinned_bytes + placement.ring_bytes <= capacity
    residency = Residency(list(sizes), sizes, placement)

    def prefetch() -> None:
        while residency.next_load() is not None:
            pass

    prefetch()
    for group in groups * 4:
        for key in group:
            assert residency.acquire(key).dropped == ()
            prefetch()
            residency.hold(key)
        for key in group:
            residency.release(key)
            prefetch()


@given(matrices, st.integers(0, 300), st.integers(0, 40))
def test_one_byte_less_is_refused(of: Matrices, spare: int, ahead: int) -> None:
    sizes = of.by_key
    smallest = smallest_bytes(list(sizes), sizes, of.levels[0], of.groups)
    passing = [row[1:] for row in of.sizes]
    assert smallest == sum(row[0] for row in of.sizes) + max(sum(row) + max(row[1:], default=0) for row in passing)
    with pytest.raises(ValueError, match="smallest"):
        place(list(sizes), sizes, smallest - 1, ahead, of.levels[0], prefer=of.levels, together=of.groups)


@pytest.mark.parametrize("layers", [32, 80])
def test_lower_planes_come_first_and_are_spread(layers: int) -> None:
    of = Matrices([[1, 1, 2]] * layers)
    sizes = of.by_key
    before = 0
    for capacity in range(layers + 5, 4 * layers):
        pinned = set(place(list(sizes), sizes, capacity, 0, of.levels[0], prefer=of.levels, together=of.groups).pinned)
        second, third = (sorted(key // 10 for key in pinned & level) for level in of.levels[1:])
        assert of.levels[0] <= pinned
        assert not third or len(second) == layers
        assert len(second) >= min(layers, capacity - layers - 6)
        for some in filter(None, (second, third)):
            gaps = [later - earlier for earlier, later in pairwise([*some, some[0] + layers])]
            assert max(gaps) <= 2 * layers / len(some) + 2
        assert len(second) + 2 * len(third) >= before - 2
        before = len(second) + 2 * len(third)
