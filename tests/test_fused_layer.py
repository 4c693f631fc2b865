"""Fused layers: which architectures have them, what goes module by module all the same, and that both agree."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import CONFIGS
from torch import Tensor

import tiercache
from tiercache.bench import overhead
from tiercache.compat import DynamicCache, cache_kwargs, cache_out
from tiercache.kernels.cpu.backend import CpuKernels
from tiercache.model import fused_layer
from tiercache.model.growing_cache import GrowingCache

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(3, 131, (1, 9), generator=torch.Generator().manual_seed(5))
FUSED = {"llama", "llama-tied-bias", "mistral", "qwen2", "qwen3"}
Folders = Callable[..., Path]


@contextmanager
def opened(place: Path, **options: Any) -> Iterator[Any]:
    chosen = {"precision": "int8", "dram": "64MiB", "context": 64, "device": "cpu"} | options
    with tiercache.offload(place, **chosen) as model, torch.no_grad():
        yield model


def counts(model: Any) -> tuple[int, int]:
    """Calls of layers so far: fused, and not."""
    stats = model.tiercache.stats()
    return stats.fused_layers, stats.unfused_layers


def steps(model: Any) -> list[Tensor]:
    """Logits of a prefill, of three tokens one by one, and of four at once."""
    output = model(IDS, use_cache=True)
    found = [output.logits]
    for ids in (*IDS[:, :3].split(1, dim=1), IDS[:, :4]):
        output = model(ids, **cache_kwargs(model, cache_out(output)), use_cache=True)
        found.append(output.logits)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_runs_fused_or_not_and_the_statistics_say_which(name: str, plane_store: Folders) -> None:
    with opened(plane_store(name), kernels="unfused") as model:
        wanted = steps(model)
        assert counts(model) == (0, 0)
    with opened(plane_store(name)) as model:
        found = steps(model)
        assert counts(model) == ((5 * 3, 0) if name in FUSED else (0, 0))
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 2e-3 * b.abs().max()


@pytest.mark.parametrize("budget", [{}, {"hbm": "64MiB"}, {"dram": None}, {"hbm": None}], ids=str)
def test_no_budget_changes_a_bit(budget: dict[str, Any], plane_store: Folders) -> None:
    store = plane_store("qwen3")
    with opened(store) as model:
        wanted = steps(model)
    sizes = {name: size or str(least(store, name)) for name, size in budget.items()}
    with opened(store, cpu_tokens=0, **sizes) as model:
        found = steps(model)
        assert counts(model) == (15, 0)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_halves_of_weights_that_pass_through_are_made_once_for_each_place() -> None:
    """Making one takes as long as a small layer; a ring comes back to all of its slots in turn."""
    places, made = [torch.zeros(1) for _ in range(20)], []

    class Ring:
        passes, resident = 0, False

        def staying(self, _: object) -> None:
            return None

        def counted(self, _: object) -> tuple[int, ...]:
            return ()

        def hit(self, _: object) -> None: ...

        def take(self, _: str) -> list[Tensor]:
            return [places[self.passes % len(places)]]

        def give_back(self, _: str) -> None: ...

    def new(slots: Any, stays: bool) -> Any:
        made.append(stays)
        return slots[0][0]

    ring = Ring()
    half: Any = fused_layer._Slotted(ring, ["one"], new)
    for ring.passes in range(60):
        assert half.begin(torch.device("cpu")) is places[ring.passes % len(places)]
        half.end()
    assert made == [False] * len(places)


def least(store: Path, tier: str) -> int:
    """The smallest budget that is not refused."""
    size = 4096
    while True:
        try:
            with opened(store, cpu_tokens=0, **{tier: str(size)}):
                return size
        except tiercache.errors.DoesNotFitError as error:
            size += error.missing_bytes


def test_what_kernels_do_not_do_goes_module_by_module(plane_store: Folders) -> None:
    seen: list[Any] = []
    with opened(plane_store("llama")) as model:
        attention = model.model.layers[1].self_attn
        one = model(IDS).logits
        assert counts(model) == (3, 0)
        two = model(IDS.repeat(2, 1)).logits  # two sequences
        assert counts(model) == (3, 3)
        hook = attention.o_proj.register_forward_hook(lambda *given: seen.append(given[-1]))
        hooked = model(IDS).logits
        hook.remove()
        assert counts(model) == (5, 4)
        assert len(seen) == 1
        with torch.autocast("cpu", torch.bfloat16):
            model(IDS)
        assert counts(model) == (5, 7)
        assert torch.equal(model(IDS).logits, one)
        assert counts(model) == (8, 7)
    for other in (two[:1], two[1:], hooked):
        assert (other - one).abs().max() < 2e-3 * one.abs().max()


@pytest.mark.parametrize("dram", ["64MiB", None])
def test_weights_on_another_device_are_left_to_the_modules(
    dram: str | None, plane_store: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in passes of a card whose CPU multiplies what does not stay in HBM; no unit is asked for or counted twice."""
    store = plane_store("llama")
    dram = dram or str(least(store, "dram"))
    with opened(store, kernels="unfused", dram=dram) as model:
        wanted, apart = steps(model), model.tiercache.stats().tiers["dram"]
    monkeypatch.setattr(fused_layer, "_on", lambda device, slots: False)
    with opened(store, dram=dram) as model:
        found, here = steps(model), model.tiercache.stats().tiers["dram"]
        assert counts(model) == (0, 15)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert (here.hits + here.misses, here.needed_bytes) == (apart.hits + apart.misses, apart.needed_bytes)


def test_heads_that_kernels_do_not_take_are_left_to_the_modules(
    plane_store: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CpuKernels, "takes_heads", lambda *heads: False)
    with opened(plane_store("llama")) as model:
        found = steps(model)
        assert counts(model) == (0, 0)
    with opened(plane_store("llama"), kernels="unfused") as model:
        assert all(torch.equal(a, b) for a, b in zip(found, steps(model), strict=True))


def test_hidden_states_are_those_of_the_layers(plane_store: Folders) -> None:
    with opened(plane_store("llama"), kernels="unfused") as model:
        wanted = model(IDS, output_hidden_states=True).hidden_states
    with opened(plane_store("llama")) as model:
        found = model(IDS, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) == 4
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).abs().max() < 2e-3 * b.abs().max()


def test_a_tree_has_the_bits_of_its_paths_in_bf16(checkpoint: Folders, tmp_path: Path) -> None:
    """Drafted decoding then equals plain decoding also where rounding makes ties."""
    store = tmp_path / "store"
    tiercache.convert(checkpoint("llama", torch.bfloat16), store, show_progress=False)
    prompt = IDS.repeat(1, 2)
    with opened(store, precision="int8") as model:
        plain = model.generate(prompt, max_new_tokens=40, do_sample=False)
    with opened(store, precision="int8", drafter="ngram", draft_nodes=8) as model:
        drafted = model.generate(prompt, max_new_tokens=40, do_sample=False)
        assert model.tiercache.stats().drafting.rounds < 40
    assert torch.equal(plain, drafted)


def append(grows: GrowingCache, cache: DynamicCache, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """As a fused layer does."""
    room = grows.room(cache, 0, keys.shape[2])
    if room is None:
        return cache.update(keys, values, 0)
    views = room.views(keys.shape[2])
    for view, new in zip(views, (keys, values), strict=True):
        view[:, :, -new.shape[2] :] = new
    room.keep(cache.layers[0], views)
    return views


def test_a_growing_cache_holds_what_transformers_does_and_never_changes_what_it_gave() -> None:
    grows, plain = GrowingCache(64), DynamicCache()
    mine, kept = DynamicCache(), []
    generator = torch.Generator().manual_seed(3)
    for step in range(60):
        new = torch.randn(2, 1, 2, 1 + step % 3 % 2, 8, generator=generator)
        if step % 7 == 3:  # a crop of one token
            for cache in (plain, mine):
                layer = cache.layers[0]
                layer.keys, layer.values = layer.keys[:, :, :-1], layer.values[:, :, :-1]
        inference = torch.inference_mode() if step % 5 == 0 else torch.no_grad()
        with inference:
            wanted = plain.update(*new, 0)
            found = append(grows, mine, *new)
        kept.append((found, [part.clone() for part in found]))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert mine.get_seq_length() == plain.get_seq_length()
    for views, copies in kept:
        assert all(torch.equal(a, b) for a, b in zip(views, copies, strict=True))
    slots = mine.layers[0].keys.untyped_storage().nbytes() // (2 * 8 * 4)
    assert mine.get_seq_length() <= slots <= mine.get_seq_length() + 16


def test_caches_that_share_what_they_hold_stay_apart() -> None:
    grows, one, other = GrowingCache(64), DynamicCache(), DynamicCache()
    first = torch.ones(1, 1, 4, 8)
    for cache in (one, other):
        append(grows, cache, first, first)
    append(grows, one, 2 * first, 2 * first)
    other.layers[0].keys, other.layers[0].values = one.layers[0].keys, one.layers[0].values
    a, _ = append(grows, one, 3 * first, 3 * first)
    b, _ = append(grows, other, 4 * first, 4 * first)
    assert a[0, 0, :, 0].tolist() == [1] * 4 + [2] * 4 + [3] * 4
    assert b[0, 0, :, 0].tolist() == [1] * 4 + [2] * 4 + [4] * 4


def test_an_interrupt_while_a_pass_is_kept_leaves_no_token_behind() -> None:
    grows, cache, part = GrowingCache(64), DynamicCache(), torch.ones(1, 1, 4, 8)
    for factor in (1, 2):
        append(grows, cache, factor * part, factor * part)
    room = grows.room(cache, 0, 4)
    assert room is not None
    room._newest = room.views(4)  # interrupted before the cache's layer holds them
    keys, _ = append(grows, cache, 4 * part, 4 * part)
    assert keys[0, 0, :, 0].tolist() == [1] * 4 + [2] * 4 + [4] * 4


def test_overhead_adds_up(tmp_path: Path) -> None:
    found = overhead.bench(overhead.Options(shape="tiny", folder=tmp_path, dram="256MiB", show_progress=False))
    assert set(found["passes"]) == {"plain", "verifying 8", "verifying 64", "drafting", "generate"}
    assert found["fused_layers"] > 0
    assert found["unfused_layers"] == 0
    for each in found["passes"].values():
        assert set(each["us"]) <= {*overhead.CAUSES, "sampling loop"}
        assert {"layers", "head", "attention half", "norm, feed-forward, residual", "KV cache"} <= set(each["us"])
        assert each["pass_ms"] == pytest.approx(sum(each["us"].values()) / 1e3)
    text = overhead.report(found)
    assert "sampling loop" in text
    assert "us a layer (4)" in text


def test_a_watch_tells_causes_apart() -> None:
    watch = overhead.Stopwatch()
    inner = watch.watched(lambda: sum(range(20000)), "inner")
    with watch.cause("outer"):
        inner()
        inner()
    assert set(watch.seconds) == {"inner", "outer"}
    assert watch.seconds["outer"] < watch.seconds["inner"]
