"""Checkpoints read in place: every layout that transformers writes, and every way one can be broken."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from tiercache.errors import StoreError, TiercacheError, UnsupportedModelError, UsageError
from tiercache.store.checkpoint import Checkpoint, identity_in_memory
from tiercache.store.header import read_checkpoint, read_file
from tiercache.store.reader import Reader, load

MakeCheckpoint = Callable[..., Path]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def contents(source: Checkpoint) -> dict[str, torch.Tensor]:
    """Every parameter, read through the headers' offsets."""
    with Reader() as reader:
        return {name: load(reader, ref).clone() for name, ref in source.tensors.items()}


def same_as_transformers(folder: Path) -> None:
    """Names, dtype and bytes are what `from_pretrained` makes of the folder."""
    source = Checkpoint.open(folder)
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    expected = dict(model.named_parameters())
    found = contents(source)
    assert source.dtype == model.dtype
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor.to(model.dtype), expected[name]), name


@pytest.fixture
def copy(checkpoint: MakeCheckpoint, tmp_path: Path) -> Callable[..., Path]:
    """`copy(name)`: a checkpoint that the test may break."""

    def make(name: str = "llama", **options: Any) -> Path:
        return Path(shutil.copytree(checkpoint(name, **options), tmp_path / "copy"))

    return make


def change_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Rewrite a single-file checkpoint."""
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, {"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def refused(folder: Path, error: type[TiercacheError], *words: str) -> None:
    """Opening says `error`, exactly, and each of the words."""
    with pytest.raises(error) as raised:
        Checkpoint.open(folder)
    assert raised.type is error
    for word in words:
        assert word in str(raised.value)


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_every_architecture(checkpoint: MakeCheckpoint, name: str) -> None:
    same_as_transformers(checkpoint(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["llama-tied-bias", "gpt2"])
def test_every_dtype_sharded(checkpoint: MakeCheckpoint, name: str, dtype: torch.dtype) -> None:
    folder = checkpoint(name, dtype, "60KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    same_as_transformers(folder)
    assert Checkpoint.open(folder).dtype == dtype


def head_of(model: tf.PreTrainedModel) -> str:
    """What this transformers calls the head."""
    return next(name for name, module in model.named_modules() if module is model.get_output_embeddings())


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon", "gpt-neox", "qwen3"])
def test_a_checkpoint_of_the_base_model(checkpoint: MakeCheckpoint, tmp_path: Path, name: str) -> None:
    """Such as the original GPT-2: keys lack the prefix; an untied head is then missing, and that is said."""
    model = tf.AutoModelForCausalLM.from_pretrained(checkpoint(name))
    model.base_model.save_pretrained(tmp_path / "base")
    assert not any(key.startswith(model.base_model_prefix) for key in read_checkpoint(tmp_path / "base"))
    if model.config.tie_word_embeddings:
        same_as_transformers(tmp_path / "base")
    else:
        refused(tmp_path / "base", StoreError, f"lacks the tensor '{head_of(model)}.weight'")


@pytest.mark.parametrize("stored", ["embed_out.weight", "lm_head.weight"])
def test_a_renamed_key(copy: Callable[..., Path], stored: str) -> None:
    """GPT-NeoX's files say embed_out; newer transformers call the module lm_head, and then know both names."""
    folder = copy("gpt-neox")
    head = head_of(tf.AutoModelForCausalLM.from_pretrained(folder))
    if head not in stored and head == "embed_out":
        pytest.skip("this transformers has one name for it")
    assert "embed_out.weight" in read_checkpoint(folder)
    change_tensors(folder, lambda tensors: tensors.update({stored: tensors.pop("embed_out.weight")}))
    assert f"{head}.weight" in Checkpoint.open(folder).tensors
    same_as_transformers(folder)


def test_a_head_stored_beside_the_table_it_is_tied_to(copy: Callable[..., Path]) -> None:
    folder = copy("qwen3")

    def store_head(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    change_tensors(folder, store_head)
    same_as_transformers(folder)


def test_tensors_nobody_needs_are_left_alone(copy: Callable[..., Path]) -> None:
    folder = copy()

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.0.attn.masked_bias"] = torch.ones(4, dtype=torch.int8)

    change_tensors(folder, add)
    same_as_transformers(folder)


@pytest.mark.parametrize("name", ["ein Ordner mit Leerzeichen", "größer", "模型", "a'b\"c"])
def test_any_path_will_do(checkpoint: MakeCheckpoint, tmp_path: Path, name: str) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / name / name)
    same_as_transformers(tmp_path / name / name)
    assert Checkpoint.open(str(tmp_path / name / name)).folder == tmp_path / name / name


def test_the_home_folder_is_meant_by_a_tilde(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "m")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Checkpoint.open("~/m").folder == tmp_path / "m"


def test_the_model_comes_without_weights_and_with_its_defaults(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 77}))
    model = Checkpoint.open(folder).model()
    assert type(model) is tf.LlamaForCausalLM
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert (model.generation_config.max_new_tokens, model.name_or_path, model.training) == (77, str(folder), False)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_without_a_configured_dtype_the_files_decide(copy: Callable[..., Path], stored: torch.dtype) -> None:
    folder = copy(dtype=stored)
    config = json.loads((folder / "config.json").read_text())
    for key in ("dtype", "torch_dtype"):
        config.pop(key, None)
    (folder / "config.json").write_text(json.dumps(config))
    same_as_transformers(folder)


def test_a_checkpoint_stored_wider_than_it_is_run(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_config(folder, dtype="bfloat16")
    same_as_transformers(folder)
    assert Checkpoint.open(folder).dtype == torch.bfloat16


# ---------------------------------------------------------------- identity


def test_identity_knows_the_weights_and_not_the_files(
    checkpoint: MakeCheckpoint, copy: Callable[..., Path], tmp_path: Path
) -> None:
    original = Checkpoint.open(checkpoint("llama")).identity()
    assert Checkpoint.open(copy("llama")).identity() == original
    assert Checkpoint.open(checkpoint("llama", shard="60KB")).identity() == original
    model = tf.AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    assert identity_in_memory(model) == original
    others = [Checkpoint.open(checkpoint("llama", dtype=torch.bfloat16)).identity()]
    architectures.build("llama", seed=1).save_pretrained(tmp_path / "other")
    others.append(Checkpoint.open(tmp_path / "other").identity())
    assert len({original, *others}) == 3


@pytest.mark.parametrize("name", ["llama-tied-bias", "gpt2", "opt", "falcon"])
def test_identity_is_the_same_in_memory(checkpoint: MakeCheckpoint, name: str) -> None:
    model = tf.AutoModelForCausalLM.from_pretrained(checkpoint(name))
    assert identity_in_memory(model) == Checkpoint.open(checkpoint(name)).identity()


def test_identity_sees_a_change_at_either_end_of_a_tensor(copy: Callable[..., Path]) -> None:
    folder = copy()
    seen = {Checkpoint.open(folder).identity()}
    for place in (0, -1):

        def touch(tensors: dict[str, torch.Tensor], place: int = place) -> None:
            tensors["model.layers.1.mlp.up_proj.weight"].view(-1)[place] += 1

        change_tensors(folder, touch)
        seen.add(Checkpoint.open(folder).identity())
    assert len(seen) == 3


# ---------------------------------------------------------------- what is broken


def test_a_missing_tensor_is_named(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_tensors(folder, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))
    refused(folder, StoreError, "model.layers.2.mlp.up_proj.weight", "incomplete")


def test_a_missing_shard_is_named(copy: Callable[..., Path]) -> None:
    folder = copy(shard="60KB")
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    refused(folder, StoreError, victim.name, "lacks the shard")


def test_a_tensor_that_the_index_invents_is_named(copy: Callable[..., Path]) -> None:
    folder = copy(shard="60KB")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.invented"] = next(iter(index["weight_map"].values()))
    (folder / INDEX).write_text(json.dumps(index))
    refused(folder, StoreError, "'model.invented'", "1 tensors")


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.9999])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_truncated_file_is_named(copy: Callable[..., Path], sharded: bool, kept: float) -> None:
    folder = copy(shard="60KB" if sharded else "50GB")
    victim = sorted(folder.glob("*.safetensors"))[-1]
    os.truncate(victim, int(victim.stat().st_size * kept))
    refused(folder, StoreError, victim.name, "download it again")


def test_a_file_that_is_too_long_is_named(copy: Callable[..., Path]) -> None:
    folder = copy()
    with (folder / SINGLE).open("ab") as file:
        file.write(b"\0")
    refused(folder, StoreError, SINGLE, "its header describes")


GARBAGE = {
    "not JSON": b"{nope",
    "not text": b"\xff\xfe\xfa\xfb",
    "a list": b"[]",
    "a tensor that is a number": b'{"a": 5}',
    "no offsets": b'{"a": {"dtype": "F32", "shape": [1]}}',
    "offsets that are words": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": ["x", "y"]}}',
    "three offsets": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}',
    "offsets backwards": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
    "offsets before the file": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}',
    "a shape that is a word": b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}',
    "a shape of another size": b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    "a negative shape": b'{"a": {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]}}',
    "holes": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    "overlaps": b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
    b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
}


@pytest.mark.parametrize("what", GARBAGE)
def test_a_garbage_header_is_refused(tmp_path: Path, what: str) -> None:
    header = GARBAGE[what]
    path = tmp_path / SINGLE
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8 if what == "holes" else 4))
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        read_file(path)


@pytest.mark.parametrize("length", [0, 1, 1 << 20, 1 << 62, (1 << 64) - 1])
def test_a_garbage_header_length_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / SINGLE).write_bytes(struct.pack("<Q", length) + b"{}" * 50)
    with pytest.raises(StoreError, match=r"model\.safetensors"):
        read_file(tmp_path / SINGLE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{nope",
        "[]",
        "{}",
        *(
            text
            for text in (
                '{"weight_map": 5}',
                '{"weight_map": []}',
                '{"weight_map": {"a": 5}}',
                '{"weight_map": {"a": null}}',
            )
        ),
    ],
)
def test_a_garbage_index_is_refused(copy: Callable[..., Path], text: str) -> None:
    folder = copy(shard="60KB")
    (folder / INDEX).write_text(text)
    refused(folder, StoreError, INDEX)


def test_a_shape_of_another_model_is_named(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_config(folder, intermediate_size=112)
    refused(folder, StoreError, "mlp.", "[104, 56]", "[112, 56]", "config.json")


def test_a_folder_without_a_configuration(copy: Callable[..., Path]) -> None:
    folder = copy()
    (folder / "config.json").unlink()
    refused(folder, StoreError, "config.json", str(folder))


@pytest.mark.parametrize("text", ["", "{nope", "[]", "{}", '{"model_type": "no-such-model"}'])
def test_a_garbage_configuration_is_refused(copy: Callable[..., Path], text: str) -> None:
    folder = copy()
    (folder / "config.json").write_text(text)
    with pytest.raises((StoreError, UnsupportedModelError), match=r"config\.json|model type"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    "values",
    [{"hidden_size": "abc"}, {"layer_types": ["x"]}, {"num_attention_heads": 0}, {"hidden_act": "x"}, {"dtype": "x"}],
)
def test_a_configuration_of_impossible_values_is_refused(copy: Callable[..., Path], values: dict[str, Any]) -> None:
    folder = copy()
    change_config(folder, **values)
    with pytest.raises((StoreError, UnsupportedModelError), match=r"config\.json"):
        Checkpoint.open(folder)


def test_a_model_that_brings_its_own_code_is_refused(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_config(folder, model_type="own", auto_map={"AutoConfig": "code.Config"})
    (folder / "code.py").write_text("raise SystemExit('this must never run')")
    refused(folder, UnsupportedModelError)


def test_a_folder_without_safetensors(copy: Callable[..., Path]) -> None:
    """Only what PyTorch pickles."""
    folder = copy()
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()
    refused(folder, StoreError, "no model.safetensors", "save_pretrained")


@pytest.mark.parametrize(
    ("dtype", "name"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8"), (torch.float64, "F64")]
)
def test_weights_in_other_formats_are_refused(copy: Callable[..., Path], dtype: torch.dtype, name: str) -> None:
    folder = copy()

    def convert(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(dtype)

    change_tensors(folder, convert)
    refused(folder, UnsupportedModelError, "model.layers.1.mlp.up_proj.weight", name, "F32, F16, BF16")


def test_a_quantised_checkpoint_is_refused(copy: Callable[..., Path]) -> None:
    folder = copy()
    change_config(folder, quantization_config={"quant_method": "fp8"})
    refused(folder, UnsupportedModelError, "already quantised", str(folder))


EXPERTS = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
EXPERTS |= {"num_key_value_heads": 2, "vocab_size": 50}


@pytest.mark.parametrize(
    "config",
    [
        tf.MixtralConfig(**EXPERTS, num_local_experts=4),
        tf.Qwen3MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2),
        tf.Qwen2MoeConfig(**EXPERTS, num_experts=4, moe_intermediate_size=16),
        tf.DeepseekV3Config(**EXPERTS, n_routed_experts=8),
        tf.GptOssConfig(**EXPERTS, num_local_experts=4),
        tf.OlmoeConfig(**EXPERTS, num_experts=4),
    ],
    ids=lambda config: config.model_type,
)
def test_a_mixture_of_experts_is_refused(tmp_path: Path, config: tf.PretrainedConfig) -> None:
    config.save_pretrained(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    refused(tmp_path, UnsupportedModelError, config.model_type, "mixture of experts")


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    tf.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=50).save_pretrained(tmp_path)
    save_file({"a": torch.ones(1)}, tmp_path / SINGLE)
    refused(tmp_path, UnsupportedModelError, "t5")


@pytest.mark.parametrize("named", ["org/there-is-no-such-model", "a name/with spaces", "org/x y"])
def test_a_hub_id_that_is_not_there(named: str) -> None:
    """Offline, as all tests are."""
    with pytest.raises(UsageError, match="could not be had from the Hub") as raised:
        Checkpoint.open(named)
    assert repr(named) in str(raised.value)


@pytest.mark.parametrize("named", ["/no/such/folder", "./nowhere", "nowhere", "a/b/c", "~/nowhere"])
def test_a_path_that_is_not_there(named: str) -> None:
    with pytest.raises(UsageError, match="neither a folder nor a Hub id"):
        Checkpoint.open(named)


def test_a_file_is_no_checkpoint(copy: Callable[..., Path]) -> None:
    with pytest.raises(UsageError, match="neither a folder nor a Hub id"):
        Checkpoint.open(copy() / SINGLE)


def test_nothing_is_no_checkpoint(copy: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy())
    with pytest.raises(UsageError):
        Checkpoint.open("")
