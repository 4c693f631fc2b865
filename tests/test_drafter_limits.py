"""Drafting stays within the budgets: what it takes is planned, and a process grows by no more than was planned."""

import ctypes
import dataclasses
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer  # noqa: F401 - imported by whoever drafts, which is not what is measured

import tiercache
from policies import room
from policies.budgeter import Budgeter
from policies.drafting import RoundPlan
from policies.plan import Plan
from tiercache.bench.shapes import Shape, make_store
from tiercache.config.drafting import DraftConfig
from tiercache.draft.ngram.union import Ngrams
from tiercache.stats.run import peak_rss_bytes

LARGE = Shape(768, 3072, 6, 12, 4, 2000)
CONTEXT = 144


def opened(folder: Path, nodes: int, **options: Any) -> Any:
    known: dict[str, Any] = {"precision": "int8", "hbm": None, "device": "cpu", "cpu_tokens": 0, "context": CONTEXT}
    known |= {"drafter": "auto", "draft_nodes": nodes, "logits": nodes + 1, "show_progress": False}
    return tiercache.offload(folder, **{**known, **options})


def write(model: Any) -> Any:
    ids = torch.randint(0, LARGE.vocabulary, (1, 99), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return model.tiercache.stats()


def in_turn(budgeter: Budgeter, room: int | None = None) -> RoundPlan:
    """The largest trees, of each drafter in its turn; what is fast for so small a model would never be large."""
    limits = budgeter._limits
    drafter = (budgeter._round + 1) % len(budgeter._histories)
    return RoundPlan(drafter, limits["max_nodes"], limits["max_depth"], limits["width"], 0.0, 0.0)


def grown(folder: Path, small: Path, nodes: int, options: dict[str, Any]) -> dict[str, Any]:
    """In a fresh process: by how much it grows, after a smaller model of the same shapes has warmed everything up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Budgeter, "decide", in_turn)
        patch.setattr(room, "pays", lambda *_: True)
        patch.setattr(Plan, "still", False)
        with opened(small, nodes) as model:
            write(model)
        del model
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # start the kernel's peak anew
        before = peak_rss_bytes()
        with opened(folder, nodes, **options) as model:
            stats = write(model)
        return {"grown": peak_rss_bytes() - before, **stats.to_dict()}


@pytest.mark.parametrize(
    ("nodes", "hbm", "dram"), [(64, None, 92 << 20), (512, None, 150 << 20), (512, 140 << 20, 36 << 20)]
)
def test_the_process_grows_by_no_more_than_its_budgets(
    nodes: int, hbm: int | None, dram: int, in_child: Callable[..., Any], folders: tuple[Path, Path]
) -> None:
    measured = in_child(grown, *folders, nodes, {"hbm": hbm, "dram": dram})
    for tier in measured["tiers"].values():
        assert tier["peak_bytes"] <= tier["capacity_bytes"]
    assert measured["tiers"]["dram"]["misses"] > 0
    drafting = measured["drafting"]
    assert min(drafting["arm_rounds"]) > 0
    assert measured["draft_passes"] > 0
    assert drafting["nodes"] > nodes, "no large tree was ever verified"
    budget = dram + (hbm or 0)
    assert measured["grown"] <= budget * 1.03, measured
    assert measured["grown"] >= budget * 0.5, "the budget was hardly used, so nothing was tested"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store, and one of a single layer of the same shapes."""
    folder = tmp_path_factory.mktemp("stores")
    small = dataclasses.replace(LARGE, layers=1)
    return make_store(LARGE, folder / "large", 0), make_store(small, folder / "small", 0)


def test_what_drafting_takes_is_planned(folders: tuple[Path, Path]) -> None:
    tables = Ngrams(LARGE.vocabulary, "toy").requirements.host_bytes
    plans = {}
    for drafter in (None, "ngram", "resident", "auto"):
        for nodes in (64, 256) if drafter else (64,):
            options = {"draft_nodes": nodes} if drafter else {}
            known: dict[str, Any] = {
                "precision": "int8",
                "context": CONTEXT,
                "logits": 257,
                "cpu_tokens": 0,
                "device": "cpu",
            }
            with tiercache.offload(
                folders[1], hbm="128MiB", dram="64MiB", drafter=drafter, **known, **options
            ) as model:
                plans[drafter, nodes] = model.tiercache.plan
    plain = plans.pop((None, 64))
    assert "drafter and trees" not in plain.hbm.reserved_bytes
    assert "tables of the drafter" not in plain.dram.reserved_bytes
    for (drafter, nodes), plan in plans.items():
        assert plan.dram.reserved_bytes["tables of the drafter"] == (0 if drafter == "resident" else tables)
        slots = DraftConfig(drafter=drafter, nodes=nodes).slots
        mask = 5 * (nodes + 1) * (CONTEXT + slots)
        assert mask < plan.hbm.reserved_bytes["drafter and trees"] < mask + (4 << 20)
        for name, reserved in plain.hbm.reserved_bytes.items():  # a KV cache and passes that have room for the tree
            assert plan.hbm.reserved_bytes[name] >= reserved
        cache = plain.hbm.reserved_bytes["KV cache"]
        assert plan.hbm.reserved_bytes["KV cache"] >= cache * (CONTEXT + slots) // CONTEXT
