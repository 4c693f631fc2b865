"""Passes of few tokens multiply in DRAM what does not stay in HBM: the same bits, and nothing is copied."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tiercache
from policies.offload import breakeven_tokens
from tiercache.compat import cache_kwargs, cache_out
from tiercache.engine import machine
from tiercache.engine.on_cpu import OnCpu
from tiercache.errors import UsageError
from tiercache.kernels.select import select
from tiercache.stats.run import Stats
from tiercache.tiers import breakeven
from tiercache.tiers.transfer import CopyTicket

CONTEXT = 64
IDS = torch.randint(3, 131, (1, 9), generator=torch.Generator().manual_seed(3))


def run(store: Path, **options: object) -> tuple[list[torch.Tensor], Stats]:
    """A prefill of nine tokens, four steps, and a second prefill."""
    with tiercache.offload(store, precision="int4", dram="64MiB", context=CONTEXT, **options) as model:
        with torch.no_grad():
            output = model(input_ids=IDS, use_cache=True)
            logits = [output.logits]
            for place in range(4):
                token = IDS[:, place : place + 1]
                output = model(input_ids=token, **cache_kwargs(model, cache_out(output)), use_cache=True)
                logits.append(output.logits)
            logits.append(model(input_ids=IDS).logits)
        return logits, model.tiercache.stats()


def small(store: Path) -> int:
    """An HBM budget in which a few units stay and the others pass."""
    with tiercache.offload(store, precision="int4", dram="64MiB", hbm="64MiB", context=CONTEXT) as model:
        plan = model.tiercache.plan.hbm
        return sum(plan.reserved_bytes.values()) + 75_000


@pytest.mark.parametrize("hbm_spare", [0, 10_000])
def test_the_same_bits_wherever_they_are_multiplied(hbm_spare: int, plane_store: Callable[..., Path]) -> None:
    store = plane_store("llama")
    hbm = small(store) + hbm_spare
    want, _ = run(store)
    moved = {}
    for most, passes in ((0, 0), (1, 4), (8, 4), (9, 6), (512, 6)):
        logits, stats = run(store, hbm=hbm, cpu_tokens=most)
        assert all(torch.equal(one, other) for one, other in zip(logits, want, strict=True)), most
        assert (stats.cpu_tokens, stats.cpu_passes) == (most, passes)
        upper = stats.tiers["hbm"]
        assert upper.misses > 0
        assert upper.peak_bytes <= upper.capacity_bytes
        moved[most] = upper.loaded_bytes
    assert moved[512] == moved[9] < moved[1] < moved[0]


def test_what_passes_is_not_copied_at_all_when_all_is_multiplied_below(plane_store: Callable[..., Path]) -> None:
    store = plane_store("llama")
    hbm = small(store) + 25_000
    _, stats = run(store, hbm=hbm, cpu_tokens=512)
    upper = stats.tiers["hbm"]
    # main memory was asked for what stays in HBM, once, and for all that passes, in each pass
    assert stats.tiers["dram"].needed_bytes == upper.loaded_bytes + upper.miss_bytes
    assert upper.hit_bytes == stats.passes * upper.loaded_bytes > 0


def test_it_is_measured_where_it_is_not_said(plane_store: Callable[..., Path]) -> None:
    store = plane_store("llama")
    logits, stats = run(store, hbm=small(store))
    assert stats.cpu_tokens in {0, *breakeven._TOKENS}
    want, _ = run(store)
    assert all(torch.equal(one, other) for one, other in zip(logits, want, strict=True))


def test_a_card_never_shares_its_products_with_the_cpu_unless_asked_to() -> None:
    """The card sums in fp32 and the CPU in fixed point: which pass is short must not change its logits."""
    card = machine.Machine(torch.device("cuda", 0), {"cpu": select(torch.device("cpu"))})
    for asked, used in ((None, 0), (0, 0), (3, 3)):
        on_cpu = OnCpu.of(asked, card, lossy=False)
        assert on_cpu.tokens(lambda: pytest.fail("nothing is to be measured")) == used
        assert on_cpu.allowed == (used > 0), "no more is reserved than is used"


def test_cuda_is_initialised_before_it_is_asked_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory statistics of a card that nobody has used yet are "invalid device argument"."""
    calls: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "init", lambda: calls.append("init"))
    assert machine.resolve_device("auto") == torch.device("cuda", 0)
    assert machine.resolve_device("cuda:1") == torch.device("cuda", 1)
    assert calls == ["init", "init"]
    assert machine.resolve_device("cpu") == torch.device("cpu")
    assert len(calls) == 2


def test_with_all_in_hbm_nothing_is_measured_or_multiplied_below(plane_store: Callable[..., Path]) -> None:
    _, stats = run(plane_store("llama"), hbm="64MiB")
    assert (stats.cpu_tokens, stats.cpu_passes) == (0, 0)


def test_original_weights_are_always_copied_up(checkpoint: Callable[..., Path]) -> None:
    options = {"dram": "64MiB", "context": CONTEXT, "cpu_tokens": 512}
    with tiercache.offload(checkpoint("llama"), hbm="64MiB", **options) as model:
        reserved = sum(model.tiercache.plan.hbm.reserved_bytes.values())
    with tiercache.offload(checkpoint("llama"), hbm=reserved + 120_000, **options) as model:
        model(input_ids=IDS)
        assert model.tiercache.stats().cpu_tokens == 0


@pytest.mark.parametrize("wrong", [-1, True, "x", 1.5])
def test_a_wrong_number_is_refused(wrong: object, plane_store: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="cpu_tokens"):
        run(plane_store("llama"), cpu_tokens=wrong)


@given(st.floats(0.001, 10), st.dictionaries(st.integers(1, 512), st.floats(0.001, 10), max_size=6))
def test_the_decision(link_s: float, product_s: dict[int, float]) -> None:
    most = breakeven_tokens(link_s, product_s)
    assert most == 0 or most in product_s
    assert all(product_s[tokens] < link_s for tokens in product_s if tokens <= most)
    beyond = sorted(tokens for tokens in product_s if tokens > most)
    assert not beyond or product_s[beyond[0]] >= link_s


def test_the_measurement_gives_its_memory_back() -> None:
    host = torch.device("cpu")
    assert breakeven.measure_breakeven(select(host), 2, host) in {0, *breakeven._TOKENS}


def test_interrupted_while_the_copies_are_given_up(plane_store: Callable[..., Path]) -> None:
    store = plane_store("llama")
    want, _ = run(store)
    options = {"precision": "int4", "dram": "64MiB", "context": CONTEXT, "hbm": small(store), "cpu_tokens": 4}
    with tiercache.offload(store, **options) as model, torch.no_grad():
        cache = cache_out(model(input_ids=IDS, use_cache=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CopyTicket, "cancel", interrupt)
            with pytest.raises(KeyboardInterrupt):  # this pass is to be multiplied below
                model(input_ids=IDS[:, :1], **cache_kwargs(model, cache), use_cache=True)
        for ids, logits in ((IDS, want[0]), (IDS[:, :2], None), (IDS, want[5])):
            got = model(input_ids=ids).logits
            assert logits is None or torch.equal(got, logits)


def interrupt(ticket: CopyTicket) -> None:
    raise KeyboardInterrupt
