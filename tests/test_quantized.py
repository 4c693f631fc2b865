"""GPTQ, AWQ and compressed-tensors folders as checkpoints: the logits of the weights that they stand for."""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import quantized_toys as toys
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import tiercache
from tiercache.errors import EnvironmentUnsupportedError, StoreError, TiercacheError, UnsupportedModelError
from tiercache.formats import integers, unpacked
from tiercache.store.checkpoint import Checkpoint, resolve
from tiercache.store.convert import convert
from tiercache.store.reader import Reader, load

IDS = torch.tensor([[3, 7, 94, 1, 33, 50, 8, 8, 2, 61, 5]])
HALF, BRAIN = torch.float16, torch.bfloat16


def gptq_settings(**more: Any) -> dict[str, Any]:
    return {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "sym": True} | more


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True, "version": "gemm"}


def compressed(kind: str, bits: int, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 8} | more
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": {"group_0": group}}


# name: architecture, dtype, settings, how a matrix is packed, and its numbers
CASES: dict[str, tuple[str, torch.dtype, dict[str, Any], Any, dict[str, Any]]] = {
    "gptq": ("qwen2", HALF, gptq_settings(), partial(toys.gptq, bits=4), {"bits": 4, "groups": 4, "symmetric": True}),
    "gptq act-order, asymmetric": (
        *("llama", HALF, gptq_settings(desc_act=True, sym=False), partial(toys.gptq, bits=4)),
        {"bits": 4, "groups": 4, "symmetric": False, "ordered": False},
    ),
    "gptq v2, 8 bits": (
        *("qwen3", BRAIN, gptq_settings(bits=8, checkpoint_format="gptq_v2"), partial(toys.gptq, bits=8, version=2)),
        {"bits": 8, "groups": 8, "symmetric": False, "ordered": False},
    ),
    "gptq without g_idx": (
        *("qwen3", HALF, gptq_settings(group_size=-1), partial(toys.gptq, bits=4, with_order=False)),
        {"bits": 4, "groups": 1, "symmetric": True},
    ),
    "awq": ("qwen3", HALF, AWQ, toys.awq, {"bits": 4, "groups": 8, "symmetric": False}),
    "compressed-tensors": (
        *("llama", BRAIN, compressed("pack-quantized", 4), partial(toys.packed_tensors, bits=4, symmetric=True)),
        {"bits": 4, "groups": 4, "symmetric": True},
    ),
    "compressed-tensors act-order, asymmetric": (
        *("qwen2", BRAIN, compressed("pack-quantized", 4, symmetric=False, actorder="group")),
        partial(toys.packed_tensors, bits=4, symmetric=False, ordered=False),
        {"bits": 4, "groups": 4, "symmetric": False, "ordered": False},
    ),
    "compressed-tensors packed int8": (
        *("llama", HALF, compressed("pack-quantized", 8), partial(toys.packed_tensors, bits=8, symmetric=False)),
        {"bits": 8, "groups": 1, "symmetric": False},
    ),
    "compressed-tensors int8": (
        *("llama", BRAIN, compressed("int-quantized", 8), partial(toys.whole_bytes, symmetric=False)),
        {"bits": 8, "groups": 1, "symmetric": False},
    ),
}


def make(case: str, folder: Path) -> tf.PreTrainedModel:
    """Write a case's checkpoint; returns the model with the weights that it stands for."""
    name, dtype, asked, pack, made = CASES[case]
    return toys.save(name, folder, dtype, asked, pack, **made)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantised_weights(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(integers, "_CHUNK_WEIGHTS", 9 * 56)  # several pieces, the last one short
    model = make(case, tmp_path / "packed")
    with tiercache.offload(tmp_path / "packed", context=64) as opened:
        assert opened.dtype == model.dtype
        assert torch.equal(logits(opened), logits(model))
    again = tf.AutoModelForCausalLM.from_pretrained(resolve(tmp_path / "packed")).eval()
    assert torch.equal(logits(again), logits(model)), "what was unpacked is a plain checkpoint"
    told = Checkpoint.open(tmp_path / "packed").loss
    assert case.split(" ")[0].upper() in told.upper()
    assert "bits a weight" in told


def test_planes_are_those_of_the_dequantised_weights(tmp_path: Path) -> None:
    make("awq", tmp_path / "packed").save_pretrained(tmp_path / "plain")
    for name in ("packed", "plain"):
        convert(tmp_path / name, tmp_path / f"{name}-store", show_progress=False)
    for one in sorted((tmp_path / "packed-store").glob("*.bin")):
        assert one.read_bytes() == (tmp_path / "plain-store" / one.name).read_bytes(), one.name
    assert "quantization_config" not in (tmp_path / "packed-store" / "config.json").read_text()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "already quantised, by 'bitsandbytes'"),
        ({"quant_method": "mxfp4"}, "already quantised, by 'mxfp4'.*GGUF, gptq, awq, compressed-tensors"),
        ({"quant_method": "exl3"}, "by 'exl3'"),
        ({}, "by None"),
        (gptq_settings(bits=3), "GPTQ of 3 bits"),
        (gptq_settings(checkpoint_format="marlin"), "the layout 'marlin'"),
        (AWQ | {"version": "gemv"}, "AWQ of 4 bits in the layout 'gemv'"),
        (compressed("float-quantized", 8), "compressed-tensors, float-quantized"),
        (compressed("pack-quantized", 4) | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        (compressed("pack-quantized", 4) | {"transform_config": {"config_groups": {"u": 1}}}, "transforms: some"),
    ],
)
def test_other_ways_to_quantise_are_refused_by_name(asked: dict[str, Any], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": asked}))
    with pytest.raises(UnsupportedModelError, match=words):
        resolve(tmp_path)


@pytest.mark.parametrize(
    "asked",
    [
        *("int4", [4], {"quant_method": ["gptq"]}),
        compressed("pack-quantized", 4) | {"config_groups": [1]},
        compressed("pack-quantized", 4) | {"config_groups": {"a": 1}},
        compressed("pack-quantized", 4) | {"config_groups": {"a": {"weights": 4}}},
    ],
)
def test_settings_that_mean_nothing_are_refused(asked: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": asked}))
    with pytest.raises(StoreError, match="quantization_config"):
        resolve(tmp_path)


def test_groups_that_are_not_there_are_refused(tmp_path: Path) -> None:
    make("gptq act-order, asymmetric", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"][5] = 4
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StoreError, match="names groups beyond its 4"):
        Checkpoint.open(tmp_path).in_place()
    assert not list(resolve(tmp_path).glob("*.safetensors*")), "nothing half-written"


def test_groups_that_contradict_the_scales_are_refused(tmp_path: Path) -> None:
    asked, made = gptq_settings(group_size=28), {"bits": 4, "groups": 4, "symmetric": True}  # 14 inputs a group
    toys.save("qwen3", tmp_path / "bare", HALF, asked, partial(toys.gptq, bits=4, with_order=False), **made)
    with pytest.raises(StoreError, match="56 inputs in groups of 28 have 2 scales, 4 are there"):
        Checkpoint.open(tmp_path / "bare")
    make("gptq", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"][:] = 0
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(StoreError, match="has scales for 4 groups, its inputs belong to 1 of them"):
        Checkpoint.open(tmp_path).in_place()


def test_only_the_models_own_files_name_its_import(tmp_path: Path) -> None:
    make("awq", tmp_path)
    before = resolve(tmp_path)
    (tmp_path / "notes.txt").write_text("of nobody's concern")
    (tmp_path / "trainer_state.json").write_text("{}")
    assert resolve(tmp_path) == before
    assert not (before / "notes.txt").exists()
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert resolve(tmp_path) != before
    assert (resolve(tmp_path) / "merges.txt").is_file()


def test_a_disk_without_the_room_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("awq", tmp_path)
    monkeypatch.setattr(unpacked.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 30, 1 << 30, 1000))
    with pytest.raises(EnvironmentUnsupportedError, match=r"its disk lacks .* bytes\).*'int8', 'int4' or 'int3'"):
        Checkpoint.open(tmp_path).in_place()


def test_unpacking_is_said_and_done_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make("awq", tmp_path)
    with tiercache.offload(tmp_path, context=64, show_progress=True):
        pass
    told = capsys.readouterr().err
    assert "weights were quantized to AWQ int4 already" in told
    assert f"into {resolve(tmp_path) / 'model.safetensors'}" in told
    with tiercache.offload(tmp_path, context=64, show_progress=True):
        pass
    assert "unpacking" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for case in ("gptq act-order, asymmetric", "awq", "compressed-tensors act-order, asymmetric"):
        made[case] = tmp_path_factory.mktemp("packed")
        make(case, made[case])
    return made


@settings(max_examples=30)
@given(data=st.data())
def test_parts_of_other_shapes_are_named_errors(
    packed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Of one matrix a part is missing, or cut, or of another dtype."""
    source = packed[data.draw(st.sampled_from(sorted(packed)))]
    folder = tmp_path_factory.getbasetemp() / "mutilated"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(key for key in tensors if ".layers.1.mlp." in key)))
    way = data.draw(st.sampled_from(("missing", "shorter", "narrower", "other dtype", "flat")))
    tensor = tensors.pop(name)
    if way == "shorter":
        tensors[name] = tensor[: len(tensor) // 2].contiguous()
    elif way == "narrower":
        tensors[name] = tensor[..., :1].contiguous()
    elif way == "other dtype":
        tensors[name] = tensor.to(torch.float32 if tensor.dtype == torch.int32 else torch.int32)
    elif way == "flat":
        tensors[name] = tensor.reshape(-1)[:0]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    whole = name.endswith("weight_shape") and way == "other dtype"  # two numbers are still the shape
    assert isinstance(refusal(folder, name), StoreError | UnsupportedModelError) != whole


def refusal(folder: Path, part: str) -> TiercacheError | None:
    """Why the matrix that has this part cannot be read; None where it can."""
    try:
        found = Checkpoint.open(folder)
        with Reader() as reader:
            load(reader, found.tensors[f"{part.rpartition('.')[0]}.weight"])
    except TiercacheError as error:
        return error
    return None
