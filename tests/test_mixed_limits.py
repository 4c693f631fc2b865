"""Mixed mode's edges: budgets hold, bad input is refused with a way out, and nothing stays behind."""

import ctypes
import dataclasses
import gc
import json
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from architectures import build
from mixed_oracle import CONTEXT, calibrate, calibration, mixed
from test_cli import call, data, save_model, save_tokenizer
from test_lifetime import BoomError, same, snapshot, surroundings

import tiercache
from policies.precision import Recipe
from tiercache import errors
from tiercache.bench.shapes import Shape, make_store
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import Budget
from tiercache.stats.run import peak_rss_bytes
from tiercache.store.calibration import Calibration

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe("product", 1, 2, (0.2, 0.3, 0.2))
IDS = torch.arange(3, 12)[None]
PLENTY = "64MiB"
Folders = Callable[..., Path]


@pytest.fixture(scope="module")
def calibrated(plane_store: Folders, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a made-up calibration beside it."""
    folder = tmp_path_factory.mktemp("calibrated") / "store"
    shutil.copytree(plane_store("llama"), folder)
    calibrate(folder, RECIPE)
    return folder


# Bad input.

BAD: list[tuple[dict[str, Any], str]] = [
    ({"precision": "source"}, "int8"),
    ({"kernels": "decode"}, "decode"),
    ({"bytes_per_token": None}, "needs bytes_per_token"),
    ({"bytes_per_token": "auto"}, "auto"),
    ({"bytes_per_token": 1.5}, "1.5"),
    ({"bytes_per_token": 0}, "0 bytes"),
    ({"bytes_per_token": -0.5}, "-0.5"),
    ({"bytes_per_token": "12 bananas"}, "bananas"),
    ({"bytes_per_token": 0.25}, "begin at 1 of"),
    ({"bytes_per_token": None, "max_loss": 0.01}, "least measured loss is 0.25"),
    ({"max_loss": 0.0}, "max_loss"),
    ({"max_loss": float("nan")}, "max_loss"),
    ({"max_loss": "much"}, "max_loss"),
    ({"policy": "random"}, "auto, or one of atu, lru"),
    ({"policy": "belady"}, "belady"),
    ({"policy": "random", "hbm": PLENTY}, "random"),
    ({"policy": None}, "None"),
    ({"max_fetches": -1}, "max_fetches"),
    ({"max_fetches": 1.5}, "max_fetches"),
    ({"max_fetches": True}, "max_fetches"),
    ({"max_fetches": "3"}, "max_fetches"),
    ({"policy": "lru"}, "HBM tier"),
    ({"max_fetches": 3}, "HBM tier"),
    ({"link_gbps": 0}, "link_gbps"),
    ({"link_gbps": -3.0, "hbm": PLENTY}, "link_gbps"),
    ({"link_gbps": "fast"}, "link_gbps"),
    ({"mode": "exact"}, "mode='mixed'"),
    ({"mode": "mix"}, "exact, mixed"),
    ({"byte_per_token": 0.5}, "byte_per_token"),
]


@pytest.mark.parametrize(("options", "word"), BAD, ids=str)
def test_bad_options(options: dict[str, Any], word: str, calibrated: Path) -> None:
    known = {"precision": "int8", "mode": "mixed", "bytes_per_token": 1.0, "dram": "64MiB", "context": CONTEXT}
    before = surroundings()
    with pytest.raises(errors.UsageError, match=word), tiercache.offload(calibrated, **{**known, **options}):
        pass
    assert surroundings() == before


def test_the_old_name_of_max_fetches_still_works(calibrated: Path) -> None:
    known = {"precision": "int8", "mode": "mixed", "bytes_per_token": 1.0, "dram": "64MiB", "context": CONTEXT}
    with pytest.warns(DeprecationWarning, match="max_fetches") as told, pytest.raises(errors.UsageError, match="-1"):
        tiercache.offload(calibrated, **known, uploads=-1).__enter__()
    assert told[0].filename == __file__
    with pytest.raises(errors.UsageError, match="uploads"):
        tiercache.offload(calibrated, **known, uploads=1, max_fetches=1).__enter__()


def test_a_model_that_is_not_made_of_neurons(plane_store: Folders, calibrated: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="tiercache calibrate"), open_mixed(plane_store("qwen2")):
        pass
    with pytest.raises(errors.UsageError, match="exactly"), open_exact(calibrated) as model:
        model.tiercache.passes("exact")
    with open_exact(calibrated) as model:
        for use in (model.tiercache.every_token, model.tiercache.recording):
            with pytest.raises(errors.UsageError, match="mode='mixed'"):
                use()
        assert model.tiercache.stats().to_dict()["neurons"] is None


def open_mixed(store: Path, **options: Any) -> Any:
    known = {"precision": "int8", "mode": "mixed", "bytes_per_token": 1.0, "dram": "64MiB", "context": CONTEXT}
    return tiercache.offload(store, **{**known, **options})


def open_exact(store: Path) -> Any:
    return tiercache.offload(store, precision="int8", dram="64MiB", context=CONTEXT)


def test_blocks_of_unlike_sizes_are_refused(monkeypatch: pytest.MonkeyPatch, calibrated: Path) -> None:
    from tiercache.store.planestore import PlaneStore

    blocks = PlaneStore.blocks
    unlike = lambda store: (dataclasses.replace(blocks(store)[0], rows=8), *blocks(store)[1:])  # noqa: E731
    for found in (unlike, lambda store: ()):
        monkeypatch.setattr(PlaneStore, "blocks", found)
        with pytest.raises(errors.UnsupportedModelError, match="mode='exact'"), open_mixed(calibrated):
            pass


def test_the_command_line(tmp_path: Path) -> None:
    save_model(tmp_path / "checkpoint")
    save_tokenizer(tmp_path / "checkpoint")
    store = tmp_path / "store"
    assert call("convert", tmp_path / "checkpoint", store, "--compress", "off").exit_code == 0
    run = ("run", store, "--prompt", "def f", "--max-new-tokens", 4, "--dram", "64MiB")
    refused = call(*run, "--mode", "mixed", "--bytes-per-token", "1.0")
    assert (refused.exit_code, "tiercache calibrate" in refused.stderr) == (errors.UsageError.exit_code, True)
    calibrate(store, RECIPE)
    result = call(*run, "--mode", "mixed", "--bytes-per-token", "1.0", "--json")
    assert result.exit_code == 0, result.stderr
    found = data(result)
    assert found["stats"]["lossy"] is True
    assert found["stats"]["neurons"]["tokens"] == 3, "a prompt of five tokens is dense, and so is its first answer"
    plain = call(*run, "--mode", "mixed", "--max-loss", "0.5", "--hbm", "64MiB", "--policy", "lru", "--link-gbps", "5")
    for words in ("mixed mode is lossy", "on made-up that lost", "KL 0.25", "policy lru", "emulated, 5 GB/s", "notice"):
        assert words in plain.stderr
    for wrong in (
        ("--mode", "mixed"),
        ("--mode", "mixed", "--bytes-per-token", "0.1"),
        ("--mode", "mixed", "--bytes-per-token", "1.0", "--policy", "random"),
        ("--mode", "mixed", "--bytes-per-token", "1.0", "--precision", "source"),
        ("--mode", "mixed", "--bytes-per-token", "1.0", "--link-gbps", "0"),
        ("--bytes-per-token", "1.0"),
    ):
        refused = call(*run, *wrong)
        assert refused.exit_code == errors.UsageError.exit_code, (wrong, refused.stderr)
        assert "Traceback" not in refused.stderr


# Budgets.


def ranked(store: Path, rank: int, least_missed: int) -> Calibration:
    """A calibration in which one block's planes are missed least."""
    made = calibration(store, Recipe("product", rank, 2, RECIPE.shares))
    made.losses[least_missed] = [1e-6, 1e-7, 1e-8]
    return made


@pytest.mark.parametrize("least_missed", [0, 2])
@pytest.mark.parametrize("rank", [1, 2])
def test_a_small_dram_leaves_planes_out(rank: int, least_missed: int, plane_store: Folders) -> None:
    store = plane_store("gpt2")
    made = calibration(store, Recipe("product", rank, 1, RECIPE.shares))
    made.losses[least_missed] = [1e-6] * 3  # nothing is gained there, so it keeps what it must
    with mixed(store, made, hbm=PLENTY) as model:
        plan = model.tiercache.plan.dram
        reserved, pinned = sum(plan.reserved_bytes.values()), plan.placement.pinned_bytes
        whole = [model(IDS[:, :1]).logits, model(IDS).logits]
        assert model.tiercache.mixed.plan.measured
        assert model.tiercache.stats().neurons.calibrated_kl == 0.25
        assert "at least" not in model.tiercache.mixed.loss_line
    seen = set()
    for share in (0.7, 0.5, 0.35):
        with mixed(store, made, hbm=PLENTY, dram=reserved + int(share * pinned)) as model:
            run = model.tiercache.mixed
            seen.add(run.plan.tops)
            assert run.plan.tops[least_missed] == rank == min(run.plan.tops) < max(run.plan.tops)
            assert not run.plan.measured
            assert model.tiercache.stats().neurons.calibrated_kl is None
            assert "planes of some layers do not fit" in model.tiercache.mixed.loss_line
            got = [model(IDS[:, :1]).logits, model(IDS).logits]
            assert not any(torch.equal(one, other) for one, other in zip(got, whole, strict=True))
            with model.tiercache.recording(), torch.no_grad():
                model(IDS[:, :3])
            for name, tier in model.tiercache.stats().tiers.items():
                assert tier.peak_bytes <= tier.capacity_bytes, name
    assert len(seen) > 1
    with pytest.raises(errors.DoesNotFitError), mixed(store, made, hbm=PLENTY, dram=reserved + 1000):
        pass


def test_without_hbm_a_small_dram_streams_less_than_exact(plane_store: Folders) -> None:
    store = plane_store("llama")
    made = ranked(store, 1, 1)
    made = dataclasses.replace(made, settings=(dataclasses.replace(made.settings[0], share=0.5),))
    with mixed(store, made) as model:
        plan = model.tiercache.plan.dram
        reserved, whole = sum(plan.reserved_bytes.values()), plan.placement.pinned_bytes
        assert model.tiercache.pass_bytes()["ssd"] == 0
    with tiercache.offload(store, precision="int8", dram="64MiB", context=CONTEXT) as model:
        exact_reserved = sum(model.tiercache.plan.dram.reserved_bytes.values())
    with tiercache.offload(store, precision="int8", dram=exact_reserved + whole // 2, context=CONTEXT) as model:
        exact = model.tiercache.pass_bytes()
    with mixed(store, made, dram=reserved + whole // 2) as model:
        sizes, run = model.tiercache.pass_bytes(), model.tiercache.mixed
        assert sizes["ssd"] < exact["ssd"]
        assert sizes["needed"] < exact["needed"]
        assert not run.plan.measured
        first = model(IDS[:, :1]).logits
        tier = model.tiercache.stats().tiers["dram"]
        before = tier.loaded_bytes
        for _ in range(4):
            assert torch.equal(model(IDS[:, :1]).logits, first)
        assert tier.loaded_bytes - before <= 5 * sizes["ssd"]
        assert tier.peak_bytes <= tier.capacity_bytes


def test_a_recipe_whose_ranking_fits_is_taken(plane_store: Folders) -> None:
    """Of two settings the better one ranks with planes that would pass through: then the other."""
    store = plane_store("llama")
    one, two = (calibration(store, Recipe("product", rank, 2, RECIPE.shares)).settings[0] for rank in (1, 2))
    both = dataclasses.replace(calibration(store, RECIPE), settings=(dataclasses.replace(one, kl=0.5), two))
    with mixed(store, both, hbm=PLENTY) as model:
        assert model.tiercache.mixed.plan.setting.rank == 2
        plan = model.tiercache.plan.hbm
    with mixed(store, both, hbm=sum(plan.reserved_bytes.values()) + plan.slab_bytes - 1000) as model:
        assert model.tiercache.mixed.plan.setting.rank == 1
    only = dataclasses.replace(both, settings=(two,))
    with mixed(store, only, hbm=sum(plan.reserved_bytes.values()) + plan.slab_bytes - 1000) as model:
        assert model.tiercache.mixed.plan.setting.rank == 2, "there is no other"


LARGE = Shape(768, 3072, 6, 12, 4, 2000)


def grown(folder: Path, small: Path, options: dict[str, Any]) -> dict[str, Any]:
    """In a fresh process: by how much it grows, after a smaller model of the same shapes has warmed everything up."""

    def passes(place: Path, **budgets: Any) -> Any:
        with mixed(place, RECIPE, **budgets) as model, torch.inference_mode():
            model.generate(
                torch.arange(1, 100)[None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
            )
            with model.tiercache.every_token():
                model(torch.arange(1, 100)[None], logits_to_keep=1)
            return model.tiercache.stats().to_dict()["tiers"]

    passes(small, context=128, logits=1, hbm=options["hbm"] and "90MiB")
    gc.collect()  # what the smaller model leaves would be taken again, and not be seen to grow
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_rss_bytes()
    tiers = passes(folder, **options)
    return {"grown": peak_rss_bytes() - before, "tiers": tiers}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A store, and one of a single layer of the same shapes."""
    folder = tmp_path_factory.mktemp("stores")
    small = dataclasses.replace(LARGE, layers=1)
    return make_store(LARGE, folder / "large", 0), make_store(small, folder / "small", 0)


@pytest.mark.parametrize("hbm", [None, 48 << 20])
def test_the_process_grows_by_no_more_than_its_budgets(
    hbm: int | None, in_child: Callable[..., Any], folders: tuple[Path, Path]
) -> None:
    dram = (72 if hbm is None else 52) << 20
    options = {"hbm": hbm, "dram": dram, "context": 128, "logits": 1}
    measured = in_child(grown, *folders, options)
    for tier in measured["tiers"].values():
        assert tier["peak_bytes"] <= tier["capacity_bytes"]
    budget = dram + (hbm or 0)
    assert measured["grown"] <= budget * 1.03, measured
    assert measured["grown"] >= budget * 0.5, "the budget was hardly used, so nothing was tested"


# Lifetime.


def end_well(model: tf.PreTrainedModel) -> None:
    model.generate(IDS, max_new_tokens=3, do_sample=False)


def hooked(model: tf.PreTrainedModel, module: str, effect: Callable[..., None]) -> None:
    handle = model.get_submodule(module).register_forward_pre_hook(effect)
    try:
        with model.tiercache.passes("mixed"), model.tiercache.recording():
            model(input_ids=IDS[:, :2])
    finally:
        handle.remove()


def end_with_exception(model: tf.PreTrainedModel) -> None:
    def boom(*_: object) -> None:
        raise BoomError

    hooked(model, "model.layers.1.mlp.down_proj", boom)


def end_with_ctrl_c(model: tf.PreTrainedModel) -> None:
    hooked(model, "model.layers.1.mlp.up_proj", lambda *_: os.kill(os.getpid(), signal.SIGINT))


ENDINGS: dict[Callable[..., None], Any] = {
    end_well: None,
    end_with_exception: BoomError,
    end_with_ctrl_c: KeyboardInterrupt,
}


@pytest.fixture(scope="module")
def given_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of the model that `build` makes."""
    folder = tmp_path_factory.mktemp("given") / "store"
    with tiercache.offload(build("llama-tied-bias"), precision="int8", store=folder, dram="64MiB", context=CONTEXT):
        pass
    return folder


@pytest.mark.parametrize("hbm", [None, PLENTY, "1250KB"])
@pytest.mark.parametrize("ending", ENDINGS, ids=lambda ending: ending.__name__)
def test_a_given_model_is_restored(ending: Callable[..., None], hbm: str | None, given_store: Path) -> None:
    model = build("llama-tied-bias")
    model.config.pad_token_id = None
    made = calibration(given_store, RECIPE)
    want = model(input_ids=IDS).logits
    before, around = snapshot(model), surroundings()
    blocks = []
    with mixed(model, made, hbm=hbm, store=given_store) as offloaded:
        assert offloaded is model
        blocks = [weakref.ref(block) for block in offloaded.tiercache.mixed.blocks]
        first = offloaded(input_ids=IDS[:, :1]).logits
        offloaded.tie_weights()
        assert torch.equal(offloaded(input_ids=IDS[:, :1]).logits, first)
        if ENDINGS[ending] is None:
            ending(offloaded)
        else:
            with pytest.raises(ENDINGS[ending]):
                ending(offloaded)
        assert offloaded.tiercache.mixed.choosing.trace is None
        assert torch.equal(offloaded(input_ids=IDS[:, :1]).logits, first), "the pass after an interrupted one"
    assert same(snapshot(model), before)
    assert surroundings() == around
    assert not any(block() for block in blocks)
    assert torch.equal(model(input_ids=IDS).logits, want)


def test_leaving_by_an_exception(calibrated: Path) -> None:
    around = surroundings()
    with pytest.raises(BoomError), open_mixed(calibrated, hbm=PLENTY) as model:
        end_with_exception(model)
    assert surroundings() == around
    with pytest.raises(errors.ClosedError):
        model(input_ids=IDS)


def test_streaming_and_padded_batches(calibrated: Path) -> None:
    class Heard(tf.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.tokens: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.tokens.append(-1)

    found = []
    ids, mask = torch.tensor([[0, 0, 5, 9], [7, 8, 11, 90]]), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for hbm in (None, PLENTY, "1250KB"):
        with open_mixed(calibrated, hbm=hbm) as model:
            heard = Heard()
            made = model.generate(IDS, streamer=heard, **greedy)
            assert heard.tokens == [*made[0].tolist(), -1]
            both = model.generate(ids, attention_mask=mask, **greedy)
            found.append((made, both))
            assert model.tiercache.stats().neurons.tokens == 5 + 2 * 5
            assert json.loads(model.tiercache.stats().to_json())["neurons"]["tokens"] == 15
    for made, both in found[1:]:
        assert torch.equal(made, found[0][0])
        assert torch.equal(both, found[0][1])


def test_the_stand_in_calibration_is_not_written(plane_store: Folders) -> None:
    store = plane_store("qwen3")
    before = {path.name for path in store.iterdir()}
    with mixed(store, Recipe("gate", 1, 1, (0.1, 0.0, 0.0))) as model:
        assert np.isfinite(model(IDS).logits.detach().numpy()).all()
    assert {path.name for path in store.iterdir()} == before
    assert OffloadConfig(hbm=None, dram=Budget()).mode == "exact"
