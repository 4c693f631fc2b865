"""A throttled link stands in for a slower one: nothing arrives before its bytes could have crossed, and it is said."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mixed_oracle import mixed

import tiercache
from policies.precision import Recipe
from tiercache.commands import summary
from tiercache.errors import UsageError
from tiercache.tiers.link import Link

IDS = torch.tensor([[5, 17, 23, 99]])
RECIPE = Recipe("product", 1, 2, (0.2, 0.3, 0.2))
Folders = Callable[..., Path]


@pytest.mark.parametrize("gbps", [0, -1, 0.0, float("nan"), float("-inf")])
def test_rates_that_are_none(gbps: float) -> None:
    with pytest.raises(UsageError, match="link_gbps"):
        Link(gbps)


def test_without_a_rate_nothing_waits() -> None:
    began = time.perf_counter()
    Link().carry(1 << 50, began)
    Link(1e-9).carry(0, began)
    assert time.perf_counter() - began < 0.5


def test_bytes_take_their_time() -> None:
    link, began = Link(0.001), time.perf_counter()  # 1e6 bytes a second
    link.carry(50_000, began)
    assert time.perf_counter() - began >= 0.05
    link.carry(30_000, began)  # sent at the same time: it queues
    assert time.perf_counter() - began >= 0.08


def test_an_idle_link_saves_nothing_up() -> None:
    link = Link(0.001)
    link.carry(1_000, time.perf_counter())
    time.sleep(0.1)
    began = time.perf_counter()
    link.carry(50_000, began)
    assert time.perf_counter() - began >= 0.05


def test_time_that_a_copy_took_itself_counts() -> None:
    link, began = Link(0.001), time.perf_counter() - 1.0
    link.carry(1_000, began)
    assert time.perf_counter() - began < 1.5, "the bytes had crossed long before"


def test_threads_share_one_link() -> None:
    link, began = Link(0.001), time.perf_counter()
    threads = [threading.Thread(target=link.carry, args=(20_000, began)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.perf_counter() - began >= 0.08


def test_exact_streaming_waits_for_it(plane_store: Folders) -> None:
    store, rate = plane_store("llama"), 0.002
    options = {"precision": "int8", "dram": "64MiB", "context": 64, "cpu_tokens": 0}
    with tiercache.offload(store, hbm="64MiB", **options) as model:
        plan = model.tiercache.plan.hbm
        budget = sum(plan.reserved_bytes.values()) + plan.slab_bytes // 2
        want = model(IDS).logits
        assert model.tiercache.stats().link == "measured"
    with tiercache.offload(store, hbm=budget, link_gbps=rate, **options) as model:
        model(IDS)  # what is prefetched before the first pass is behind us
        tier = model.tiercache.stats().tiers["hbm"]
        before, began = tier.loaded_bytes, time.perf_counter()
        for _ in range(3):
            assert torch.equal(model(IDS).logits, want)
        took, ahead = time.perf_counter() - began, plan.slab_bytes // 2
        crossed = tier.loaded_bytes - before - ahead  # some may have been on their way before, or still are
        assert crossed > 50_000
        assert took >= crossed / rate / 1e9
        stats = model.tiercache.stats()
        assert stats.link == "emulated, 0.002 GB/s"
        assert "the link was emulated" in summary.of_run(stats.to_dict(), 3)


def test_uploads_of_neurons_wait_for_it(plane_store: Folders) -> None:
    store, rate = plane_store("llama"), 0.001
    with mixed(store, RECIPE, hbm="64MiB") as model:
        plan = model.tiercache.plan.hbm
        bare = sum(plan.reserved_bytes.values()) + plan.slab_bytes
    with mixed(store, RECIPE, hbm=bare, link_gbps=rate) as model, torch.no_grad():
        neurons = model.tiercache.stats().neurons
        for ids in (IDS[:, :1], IDS[:, :2]):  # single neurons
            before, began = neurons.moved_bytes, time.perf_counter()
            model(ids)
            moved = neurons.moved_bytes - before
            assert moved > 8_000
            assert time.perf_counter() - began >= moved / rate / 1e9
        before, began = neurons.dense_bytes, time.perf_counter()
        with model.tiercache.passes("exact"):  # whole planes
            model(IDS)
        moved = neurons.dense_bytes - before
        assert moved >= 3 * 104 * (24 + 96)
        assert time.perf_counter() - began >= moved / rate / 1e9
        before = neurons.moved_bytes
        with model.tiercache.passes("resident"):
            model(IDS[:, :1])
        assert neurons.moved_bytes == before
        assert model.tiercache.stats().link == "emulated, 0.001 GB/s"
