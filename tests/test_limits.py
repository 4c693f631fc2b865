"""Budgets hold, and what does not fit is refused before anything is loaded."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from architectures import save
from fake_cuda import recording

import tiercache
from tiercache import errors
from tiercache.bench.shapes import Shape, make_checkpoint, make_store
from tiercache.compat import cache_out
from tiercache.store.reader import Reader

CONTEXT = 64
IDS = torch.arange(3, 12)[None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("checkpoint")
    save("llama", place)
    return place


def least_dram(folder: Path, **options: object) -> int:
    """The smallest budget that the planner accepts, found by asking for one byte and believing the answer."""
    with pytest.raises(errors.DoesNotFitError) as refusal, tiercache.offload(folder, dram="1B", **options):
        pass
    return 1 + refusal.value.missing_bytes


def test_the_missing_number_is_right(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    least = least_dram(folder, context=CONTEXT)

    def read(*_: object) -> None:
        pytest.fail("something was loaded before the refusal")

    with monkeypatch.context() as patch:
        patch.setattr(Reader, "read", read)
        with pytest.raises(errors.DoesNotFitError, match="1 bytes") as refusal:
            tiercache.offload(folder, dram=least - 1, context=CONTEXT).__enter__()
        assert refusal.value.missing_bytes == 1
        assert refusal.value.exit_code == 3
    with tiercache.offload(folder, dram=least, context=CONTEXT) as model:
        model(input_ids=IDS)


def test_hbm_too_small(folder: Path) -> None:
    with pytest.raises(errors.DoesNotFitError, match="hbm"), tiercache.offload(folder, hbm="1B", dram="8MiB"):
        pass


def test_hbm_is_held_against_what_the_card_has_free(folder: Path) -> None:
    free, total = 8 << 20, 16 << 20
    with recording() as _, pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda at=None: (free, total))
        options = {"dram": "64MiB", "context": CONTEXT, "logits": 16, "device": "cpu"}
        for hbm, missing in ((free + 1, 1), (0.75, 4 << 20)):  # a share is of all of it
            with (
                pytest.raises(errors.DoesNotFitError, match=r"8\.0 MiB free of 16\.0 MiB") as refusal,
                tiercache.offload(folder, hbm=hbm, **options),
            ):
                pass
            assert (refusal.value.missing_bytes, refusal.value.tier) == (missing, "hbm")
        for hbm, taken in ((free, free), (0.25, 4 << 20), ("auto", free * 9 // 10)):
            with tiercache.offload(folder, hbm=hbm, **options) as model:
                assert model.tiercache.plan.hbm.capacity_bytes == taken


def test_more_than_the_machine_has(folder: Path, tmp_path: Path) -> None:
    huge = Shape(8192, 28672, 40, 64, 8)
    make_store(Shape(64, 128, 1, 2, 2, 99), tmp_path / "small", 0)
    # a checkpoint that claims to be huge: sparse files, so that only the plan can notice
    config = huge.config()
    model_folder = tmp_path / "sparse"
    _sparse_checkpoint(config, model_folder)
    with pytest.raises(errors.DoesNotFitError, match="free"), tiercache.offload(model_folder, dram="60GiB", context=64):
        pass


def _sparse_checkpoint(config: tf.PretrainedConfig, folder: Path) -> None:
    from tiercache.model import meta_model

    folder.mkdir()
    header, end = {}, 0
    for name, parameter in meta_model.build(config, torch.bfloat16).named_parameters():
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [end, end + parameter.nbytes]}
        end += parameter.nbytes
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    config.save_pretrained(folder)


def test_context_is_a_limit(folder: Path) -> None:
    with tiercache.offload(folder, dram="8MiB", context=12) as model:
        assert model.generate(IDS, max_new_tokens=4, eos_token_id=None, pad_token_id=0).shape[1] == 13
        with pytest.raises(errors.ContextExceededError, match=r"context=\d+ or more"):
            model.generate(IDS, max_new_tokens=5, eos_token_id=None, pad_token_id=0)
        with pytest.raises(errors.ContextExceededError):
            model(input_ids=IDS.repeat(2, 1))
        model(input_ids=IDS)


def test_context_is_a_limit_for_the_inner_model_and_for_positions(folder: Path) -> None:
    with tiercache.offload(folder, dram="8MiB", context=12) as model:
        with pytest.raises(errors.ContextExceededError):
            model.model(input_ids=torch.arange(3, 20)[None])
        cache = cache_out(model.model(input_ids=IDS, use_cache=True))
        with pytest.raises(errors.ContextExceededError):
            model(IDS, None, None, cache)
        model(IDS[:, :2], None, None, cache)


def test_a_changed_configuration_is_noticed(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    options = {"precision": "int8", "store": tmp_path / "store", "dram": "8MiB", "context": 64}
    with tiercache.offload(copy, **options) as model:
        model(input_ids=IDS)
    config = json.loads((copy / "config.json").read_text())
    config["rms_norm_eps"] = 0.5
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(errors.StoreError, match="changed"), tiercache.offload(copy, **options):
        pass


def test_logits_are_a_limit(folder: Path) -> None:
    with tiercache.offload(folder, dram="8MiB", context=64, logits=4) as model:
        with pytest.raises(errors.ContextExceededError, match="logits=9"):
            model(input_ids=IDS)
        model(input_ids=IDS, logits_to_keep=4)
        model.generate(IDS, max_new_tokens=2, pad_token_id=0)


def test_gradients_are_refused(folder: Path) -> None:
    with tiercache.offload(folder, dram="8MiB", context=64) as model:
        embeds = torch.randn(1, 4, 56, requires_grad=True)
        with pytest.raises(errors.UsageError, match="no_grad"):
            model(inputs_embeds=embeds)
        with torch.no_grad():
            model(inputs_embeds=embeds)


def test_tokens_outside_the_vocabulary(folder: Path) -> None:
    with tiercache.offload(folder, dram=least_dram(folder, context=64) + 9000, context=64) as model:
        with pytest.raises(IndexError, match="131"):
            model(input_ids=torch.tensor([[5, 131]]))
        model(input_ids=IDS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_silent_fallback_to_the_cpu(folder: Path) -> None:
    with pytest.raises(errors.EnvironmentUnsupportedError, match="cuda"), tiercache.offload(folder, device="cuda"):
        pass


BAD = [
    ({"precision": "int5"}, "int5"),
    ({"hbm": "12 bananas"}, "bananas"),
    ({"dram": 1.5}, "fraction"),
    ({"dram": -3}, "above zero"),
    ({"device": "tpu"}, "tpu"),
    ({"context": 0}, "context"),
    ({"checks": True}, "checksums"),
]


@pytest.mark.parametrize(("options", "word"), BAD, ids=lambda value: str(value))
def test_bad_options(options: dict, word: str, folder: Path) -> None:
    with pytest.raises(errors.UsageError, match=word), tiercache.offload(folder, **options):
        pass


def test_bad_models(tmp_path: Path) -> None:
    for bad in (3, tmp_path / "nothing", torch.nn.Linear(2, 2)):
        with pytest.raises(errors.UsageError), tiercache.offload(bad):
            pass


def test_a_store_of_another_model(folder: Path, tmp_path: Path) -> None:
    save("qwen2", tmp_path / "other")
    tiercache.convert(tmp_path / "other", tmp_path / "store")
    with (
        pytest.raises(errors.StoreError, match="another"),
        tiercache.offload(folder, precision="int8", store=tmp_path / "store"),
    ):
        pass
    with pytest.raises(errors.UsageError, match="int8"), tiercache.offload(tmp_path / "store"):
        pass


def test_checks_find_a_flipped_byte(folder: Path, tmp_path: Path) -> None:
    tiercache.convert(folder, tmp_path / "store")
    options = {"precision": "int4", "checks": True, "dram": "8MiB", "context": 64}
    with tiercache.offload(tmp_path / "store", **options) as model:
        model(input_ids=IDS)
    target = tmp_path / "store" / "plane-1.bin"
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    with pytest.raises(errors.StoreError, match="corrupt"), tiercache.offload(tmp_path / "store", **options):
        pass


def test_a_file_cut_short_while_running(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    least = least_dram(copy, context=CONTEXT)
    with tiercache.offload(copy, dram=least + 30_000, context=CONTEXT) as model:
        model(input_ids=IDS)
        with (copy / "model.safetensors").open("r+b") as file:
            file.truncate(8192)

        def passes() -> None:
            for _ in range(3):
                model(input_ids=IDS)

        with pytest.raises(errors.StoreError, match="early"):
            passes()


MEASURE = """
import ctypes, json, pathlib, sys, torch
import tiercache
from tiercache.stats.run import peak_rss_bytes
torch.set_num_threads(1)
path, warm, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
def passes(model, ids):
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
# What imports or compiles itself on first use is not the library's: torch's matrix kernels alone take some 40 MB, for
# each new shape anew, and a compiler of our kernels brings its modules. So one layer of the same shapes runs first.
ids = torch.arange(1, options["context"] - 8)[None]
with tiercache.offload(warm, context=options["context"], precision=options["precision"]) as model:
    passes(model, ids)
del model
ctypes.CDLL(None).malloc_trim(0)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # start the kernel's peak anew
before = peak_rss_bytes()
with tiercache.offload(path, **options) as model:
    passes(model, ids)
    stats = model.tiercache.stats()
print(json.dumps({"grown": peak_rss_bytes() - before, "misses": stats.tiers["dram"].misses,
                  "reported": stats.peak_rss_bytes, "before": before,
                  "tiers": {name: [tier.peak_bytes, tier.capacity_bytes] for name, tier in stats.tiers.items()}}))
"""


@pytest.mark.parametrize("precision", ["source", "int4"])
@pytest.mark.parametrize("tiers", [1, 2])
def test_the_process_grows_by_no_more_than_its_budgets(precision: str, tiers: int, tmp_path: Path) -> None:
    shape = Shape(1024, 2816, 12, 16, 4, 8000)  # 300 MB in bf16
    path, warm = tmp_path / "model", tmp_path / "one-layer"
    for folder, each in ((path, shape), (warm, replace(shape, layers=1))):
        (make_checkpoint if precision == "source" else make_store)(each, folder, 0)
    dram = (120 << 20) if precision == "source" else (100 << 20)
    hbm = None
    if tiers == 2:
        hbm, dram = (90 << 20, dram) if precision == "source" else (96 << 20, 24 << 20)
    options = {"dram": dram, "hbm": hbm, "precision": precision, "context": 256, "logits": 1}
    command = [sys.executable, "-W", "error", "-c", MEASURE, str(path), str(warm), json.dumps(options)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    measured = json.loads(child.stdout.splitlines()[-1])
    assert measured["misses"] > 0
    for peak, capacity in measured["tiers"].values():
        assert peak <= capacity
    budget = dram + (hbm or 0)
    assert measured["grown"] <= budget * 1.03, measured
    assert measured["grown"] >= budget * 0.5, "the budget was hardly used, so nothing was tested"
