"""Mixed mode after something went wrong: an interruption among copies, planes that were left out, odd losses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_oracle import calibration as made_up
from test_mixed_slots import IDS

from policies import precision
from policies.precision import Recipe
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import Budget
from tiercache.engine.offload import open_offloaded
from tiercache.errors import UsageError
from tiercache.store.planestore import PlaneStore

Folders = Callable[..., Path]


def opened(store: Path, hbm: int | None) -> Any:
    budgets = {"hbm": None if hbm is None else Budget.parse(hbm), "dram": Budget.parse("64MiB")}
    known: dict[str, Any] = {"precision": "int8", "mode": "mixed", "bytes_per_token": Budget.parse(1.0), "context": 64}
    config = OffloadConfig(**budgets, **known, policy="auto" if hbm is None else "lru")
    return open_offloaded(store, config, calibration=made_up(store, Recipe("product", 1, 2, (0.2, 0.3, 0.2))))


def decode(model: Any, tokens: list[torch.Tensor]) -> list[torch.Tensor]:
    """The logits of each, without a context."""
    return [model(ids).logits for ids in tokens]


def few_slots(store: Path) -> int:
    """A budget with room for about a third of the neurons that a token wants."""
    with opened(store, 64 << 20) as model:
        plan = model.tiercache.plan.hbm
        return sum(plan.reserved_bytes.values()) + plan.slab_bytes + plan.neuron_bytes // 5


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("nth", [1, 3, 5])
def test_slots_hold_what_they_say_after_an_interruption(
    fault: type[BaseException], nth: int, plane_store: Folders
) -> None:
    store = plane_store("llama")
    tokens = [IDS[:, place : place + 1] for place in range(6)]
    with opened(store, None) as model, torch.no_grad():
        want = decode(model, tokens)
    with opened(store, few_slots(store)) as model, torch.no_grad():
        slots: Any = model.tiercache.mixed.slots
        decode(model, tokens[:3])
        plain, calls = slots._kernels.gather, iter(range(100))

        def breaking(*arguments: Any) -> None:
            if next(calls) == nth:
                raise fault
            plain(*arguments)

        slots._kernels.gather = breaking
        with pytest.raises(fault):
            decode(model, tokens[3:])
        slots._kernels.gather = plain
        got = decode(model, tokens)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_no_pass_is_called_exact_where_planes_were_left_out(plane_store: Folders) -> None:
    with opened(plane_store("llama"), None) as model:
        plan = model.tiercache.mixed.plan
        assert plan.whole
        object.__setattr__(plan, "tops", (3, 2, 3))
        with pytest.raises(UsageError, match="left out"):
            model.tiercache.passes("exact")
        model.tiercache.passes("resident")


def test_nothing_below_the_start_is_taken_even_if_it_loses_less() -> None:
    assert precision.divide([[0.1, 0.5, 0.0]], [[10, 20, 40]], 20, start=1) == [1]
    assert precision.divide([[0.1, 0.5, 0.0]], [[10, 20, 40]], 40, start=1) == [2]


@pytest.mark.parametrize("share", [0.2, 0.3, 0.35, 0.4, 0.45, 0.6])
def test_a_share_finds_its_own_setting(share: float, plane_store: Folders) -> None:
    store = PlaneStore.open(plane_store("llama"))
    made = made_up(store.folder, Recipe("product", 1, 2, (0.1, 0.2, 0.0)))
    object.__setattr__(made.settings[0], "share", share)
    budget = Budget.parse(share)
    config = OffloadConfig(
        hbm=None, dram=Budget.parse("64MiB"), precision="int8", context=64, mode="mixed", bytes_per_token=budget
    )
    with open_offloaded(store.folder, config, calibration=made) as model:
        assert model.tiercache.mixed.plan.setting.share == share


def test_the_replay_of_a_run_from_its_start_is_what_it_did(plane_store: Folders) -> None:
    store = plane_store("llama")
    with opened(store, None) as model, pytest.raises(UsageError, match="nothing to replay"):
        model.tiercache.replay(None)
    with opened(store, few_slots(store)) as model, torch.no_grad():
        attached = model.tiercache
        with attached.recording() as trace:
            decode(model, [IDS[:, place : place + 1] for place in range(8)])
        neurons = attached.stats().neurons
        rows = {row.policy: row for row in attached.replay(trace)}
    assert neurons.policy == "lru"
    assert rows["lru"].hit_rate == neurons.hit_rate
    assert rows["lru"].belady == neurons.belady >= neurons.hit_rate
    assert {"atu", "lfru", "sieve", "hot", "belady"} < rows.keys()
