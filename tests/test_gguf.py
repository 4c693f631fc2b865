"""GGUF files as checkpoints: the logits of the model that they were made of, or a named refusal."""

import os
import shutil
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import gguf_toys
import numpy as np
import pytest
import torch
import transformers as tf
from hypothesis import given, settings
from hypothesis import strategies as st

import tiercache
from benchmarks.real import model as real
from tiercache.compat import gguf_options
from tiercache.errors import StoreError, TiercacheError, UnsupportedModelError, UsageError
from tiercache.formats import gguf as formats_gguf
from tiercache.formats.gguf_header import GgufHeader
from tiercache.generation.generator import TextGenerator
from tiercache.generation.request import GenerationRequest
from tiercache.store.checkpoint import Checkpoint, resolve
from tiercache.store.convert import convert
from tiercache.store.planestore import PlaneStore
from tiercache.store.reader import Reader, load
from tiercache.text import load_tokenizer

IDS = torch.tensor([[3, 7, 94, 1, 33, 50, 8, 8, 2, 61, 5]])  # longer than any window of the toys


PROMPT = [{"role": "user", "content": "What is the capital of France?"}]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found


def offloaded(path: Path, **options: Any) -> torch.Tensor:
    with tiercache.offload(path, context=64, **options) as model:
        return logits(model)


@pytest.mark.parametrize("name", gguf_toys.CONFIGS)
def test_every_architecture_is_the_model_that_the_file_was_made_of(name: str, tmp_path: Path) -> None:
    model = gguf_toys.build(name)
    path = gguf_toys.write(model, tmp_path / f"{name}.gguf")
    assert torch.equal(offloaded(path), logits(model))
    assert Checkpoint.open(path).loss == ""


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "BF16", "F16"])
def test_blocks_are_what_transformers_makes_of_them(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_gguf, "_CHUNK_WEIGHTS", 5 * 64)  # several pieces, the last one short
    path = gguf_toys.write(gguf_toys.build("llama"), tmp_path / "toy.gguf", gguf_toys.encoded(kind))
    resident = tf.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.bfloat16, **gguf_options()
    )
    assert torch.equal(offloaded(path), logits(resident.eval()))
    told = Checkpoint.open(path).loss
    assert kind in told or kind == "BF16"
    assert ("8.5 bits" in told) == (kind == "Q8_0")


def test_planes_are_those_of_the_unpacked_checkpoint(tmp_path: Path) -> None:
    path = gguf_toys.write(gguf_toys.build("llama"), tmp_path / "toy.gguf", gguf_toys.encoded("Q4_0"))
    convert(path, tmp_path / "store", show_progress=False)
    source = Checkpoint.open(path).in_place()
    shutil.copytree(source.folder, tmp_path / "plain", ignore=shutil.ignore_patterns("packed-origin"))
    convert(tmp_path / "plain", tmp_path / "other", show_progress=False)
    for one in sorted((tmp_path / "store").glob("*.bin")):
        assert one.read_bytes() == (tmp_path / "other" / one.name).read_bytes(), one.name
    PlaneStore.open(tmp_path / "store").verify()
    assert torch.equal(
        offloaded(path, precision="int8", store=tmp_path / "store"),
        offloaded(tmp_path / "plain", precision="int8", store=tmp_path / "other"),
    )


def test_a_small_file_drafts_for_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    encode = gguf_toys.encoded("Q8_0")
    path = gguf_toys.write(gguf_toys.build("llama"), tmp_path / "toy.gguf", encode)
    small = gguf_toys.write(gguf_toys.build("llama", seed=1), tmp_path / "small.gguf", encode)
    with tiercache.offload(path, context=64) as model:
        wanted = model.generate(IDS, max_new_tokens=8, do_sample=False)
    capsys.readouterr()
    with tiercache.offload(path, context=64, drafter=small, draft_nodes=4, show_progress=False) as model:
        assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), wanted)
    assert "unpacking" not in capsys.readouterr().err
    assert (resolve(small) / "model.safetensors").is_file()


def test_a_file_in_parts_is_one_model(tmp_path: Path) -> None:
    model = gguf_toys.build("llama")
    whole = gguf_toys.write(model, tmp_path / "whole.gguf")
    parts = [tmp_path / f"toy-0000{number}-of-00002.gguf" for number in (1, 2)]
    read = gguf.GGUFReader(whole)
    for part, tensors in zip(parts, (read.tensors[:4], read.tensors[4:]), strict=True):
        writer = gguf.GGUFWriter(part, "llama")
        for field in read.fields.values():
            if not field.name.startswith(("GGUF.", "general.architecture")) and part == parts[0]:
                writer.add_key_value(field.name, field.contents(), field.types[0])
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(read.tensors))
        for tensor in tensors:
            writer.add_tensor(tensor.name, np.array(tensor.data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert torch.equal(offloaded(parts[1]), logits(model))
    parts[0].rename(tmp_path / "kept")
    with pytest.raises(StoreError, match=r"toy-00001-of-00002\.gguf is missing, one of the 2 parts"):
        resolve(parts[1])
    (tmp_path / "kept").rename(tmp_path / "toy.gguf")
    with pytest.raises(StoreError, match="one of 2 parts with 21 tensors; 1 with 4 are here"):
        resolve(tmp_path / "toy.gguf")


def test_the_description_follows_the_file(tmp_path: Path) -> None:
    model = gguf_toys.build("llama")
    path = gguf_toys.write(model, tmp_path / "toy.gguf")
    folder = resolve(path)
    assert resolve(folder) == folder
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "toy.gguf")
    with pytest.raises(StoreError, match="is gone; name the model's file"):
        Checkpoint.open(folder)
    assert resolve(moved) == folder
    before = Checkpoint.open(folder).identity()
    with moved.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(struct.pack("<f", 0.5))
    with pytest.raises(StoreError, match="is another now"):
        Checkpoint.open(folder)
    assert resolve(moved) != folder
    assert Checkpoint.open(moved).identity() != before
    assert resolve(tmp_path / "elsewhere") == resolve(moved), "the only one in a folder"
    shutil.copy(moved, tmp_path / "elsewhere" / "second.gguf")
    with pytest.raises(UsageError, match="holds 2 GGUF files; name one of them"):
        resolve(tmp_path / "elsewhere")


def test_what_would_change_the_answer_is_refused(tmp_path: Path) -> None:
    model = gguf_toys.build("llama")
    for given_, words in (
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, r"scales its rope \(yarn, by 4.0\)"),
        ({"logit_scale": 0.5}, r"sets llama\.logit_scale"),
        ({"expert_count": 8}, r"mixture of experts \(expert_count=8\)"),
        ({"attention.sliding_window": 6}, "has attention windows"),
    ):
        path = gguf_toys.write(model, tmp_path / "toy.gguf", **given_)
        with pytest.raises(UnsupportedModelError, match=words):
            resolve(path)
    other = gguf.GGUFWriter(tmp_path / "other.gguf", "falcon")
    other.write_header_to_file()
    other.write_kv_data_to_file()
    other.close()
    with pytest.raises(UnsupportedModelError, match="not of 'falcon'; name the original checkpoint"):
        resolve(tmp_path / "other.gguf")


def test_a_rope_that_is_nobodys_is_refused(tmp_path: Path) -> None:
    model = gguf_toys.build("llama-3.2")
    path = gguf_toys.write(model, tmp_path / "toy.gguf")
    ref = GgufHeader.read(path).tensors["rope_freqs.weight"]
    with path.open("r+b") as file:
        file.seek(ref.offset + 4)
        file.write(struct.pack("<f", 3.0))
    with pytest.raises(UnsupportedModelError, match=r"has a rope that is not Llama 3\.1's"):
        resolve(path)


def test_a_tensor_that_no_parameter_takes_is_refused(tmp_path: Path) -> None:
    model = gguf_toys.build("qwen2")

    path = gguf_toys.write(model, tmp_path / "toy.gguf")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight"))
    with pytest.raises(
        UnsupportedModelError, match=r"'blk\.1\.ffn_xx\.weight', which qwen2 of transformers has no place"
    ):
        Checkpoint.open(path)


def test_a_header_is_hashed_in_pieces(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "toy.gguf", "llama")
    writer.add_array("words", ["x" * (8 << 20)] * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    source = formats_gguf.GgufSource(tmp_path / "toy.gguf")
    tracemalloc.start()
    try:
        assert source.digest
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_an_alignment_that_cannot_be_meant_is_refused(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "toy.gguf", "llama")
    writer.add_uint64("general.alignment", 1 << 40)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(StoreError, match=f"an alignment of {1 << 40} bytes cannot be meant"):
        resolve(tmp_path / "toy.gguf")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a tokenizer and a chat template, whose model says <|im_end|> whatever it is asked."""
    model = gguf_toys.build("chat")
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] += 30
        model.get_output_embeddings().weight[gguf_toys.TOKENS.index("<|im_end|>"), 0] = 30
    return gguf_toys.write(model, tmp_path_factory.mktemp("chat") / "chat.gguf", chats=True)


def test_tokenizer_and_template_are_the_files(chatty: Path) -> None:
    tokenizer = load_tokenizer(resolve(chatty))
    assert tokenizer.chat_template == gguf_toys.CHATML
    vocabulary = tokenizer.get_vocab()
    assert [vocabulary[word] for word in gguf_toys.TOKENS] == list(range(len(gguf_toys.TOKENS)))
    text = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, tokenize=False)
    assert text == f"<|im_start|>user\n{PROMPT[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
    words = [gguf_toys.TOKENS[token] for token in tokenizer(text)["input_ids"]]
    assert words[:2] == ["<|im_start|>", "u"]
    assert "Ġthe" in words
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_an_answer_stops_where_a_turn_ends(chatty: Path) -> None:
    with tiercache.offload(chatty, context=64) as model:
        generator = TextGenerator(model, load_tokenizer(resolve(chatty)))
        answer = generator.generate(GenerationRequest(ids=(3, 4, 5), max_new_tokens=8))
    assert answer.finish_reason == "stop"
    assert answer.tokens == (gguf_toys.TOKENS.index("<|im_end|>"),)


def test_every_token_that_a_file_names_ends_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = {"tokenizer.ggml.eot_token_id": 40, "tokenizer.ggml.eom_token_id": 96}
    path = gguf_toys.write(gguf_toys.build("llama"), tmp_path / "toy.gguf", **named)
    found = tf.GenerationConfig.from_pretrained(resolve(path))
    assert found.eos_token_id == [2, 40]
    assert (found.bos_token_id, found.pad_token_id) == (1, 0)
    assert "names token 96 as the end of a text or turn, its vocabulary has 96" in capsys.readouterr().err


def test_a_tokenizer_that_failed_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = gguf_toys.write(gguf_toys.build("chat", seed=1), tmp_path / "toy.gguf", chats=True)

    def fail(*_: object, **__: object) -> None:
        raise ImportError("`sentencepiece` is not here")

    with monkeypatch.context() as patched:
        patched.setattr(tf.PreTrainedTokenizerFast, "from_pretrained", fail)
        folder = resolve(path)
    told = capsys.readouterr().err
    assert f"into {folder}, or install" in told
    assert "pip install sentencepiece" in told
    with pytest.raises(StoreError, match="no tokenizer"):
        load_tokenizer(folder)
    assert resolve(path) == folder
    assert load_tokenizer(folder).chat_template == gguf_toys.CHATML
    assert not list(folder.parent.glob(".describe-*"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("toy") / "toy.gguf"
    return gguf_toys.write(gguf_toys.build("llama"), path, gguf_toys.encoded("Q8_0")).read_bytes()


def refusal(path: Path) -> TiercacheError | None:
    """Why a file cannot be read; None where every tensor of it can."""
    try:
        source = Checkpoint.open(path)
        with Reader() as reader:
            for ref in source.tensors.values():
                load(reader, ref)
    except TiercacheError as error:
        return error
    return None


@settings(max_examples=60)
@given(place=st.floats(0, 1), value=st.integers(0, 255), count=st.sampled_from((1, 4, 8)))
def test_flipped_bytes_are_named_errors(
    toy: bytes, tmp_path_factory: pytest.TempPathFactory, place: float, value: int, count: int
) -> None:
    at = int(place * 2000)  # the header, and a little behind it
    path = tmp_path_factory.getbasetemp() / "flipped.gguf"
    path.write_bytes(toy[:at] + bytes([value]) * count + toy[at + count :])
    assert isinstance(refusal(path), StoreError | UnsupportedModelError | None)


@settings(max_examples=25)
@given(share=st.floats(0, 1))
def test_a_file_that_was_cut_is_a_named_error(
    toy: bytes, tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.gguf"
    path.write_bytes(toy[: int(share * (len(toy) - 1))])
    with pytest.raises(StoreError, match=r"cut\.gguf"):
        Checkpoint.open(path)


def answer(path: Path, **options: Any) -> str:
    """What the model says, by the chat template of its file."""
    tokenizer = load_tokenizer(resolve(path))
    ids = tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with tiercache.offload(path, context=128, show_progress=False, **options) as model:
        made = model.generate(**ids, max_new_tokens=10, do_sample=False)
    return str(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.mark.real
def test_the_real_file_is_transformers_own_reading_of_it(real_model: real.RealModel, tmp_path: Path) -> None:
    resident = tf.AutoModelForCausalLM.from_pretrained(real_model.checkpoint).eval()
    assert torch.equal(offloaded(real_model.gguf), logits(resident))
    described = resolve(real_model.gguf)
    ours, theirs = (load_tokenizer(folder) for folder in (described, real_model.checkpoint))
    assert ours.chat_template == theirs.chat_template
    assert ours.get_vocab() == theirs.get_vocab()
    differs = {"architectures", "_name_or_path"}
    configs = [tf.AutoConfig.from_pretrained(folder).to_dict() for folder in (described, real_model.checkpoint)]
    for name in configs[0].keys() - differs:
        assert configs[0][name] == configs[1][name], name
    sizes = [convert(path, tmp_path / "store", dry_run=True) for path in (real_model.gguf, real_model.checkpoint)]
    assert sizes[0].calibration == sizes[1].calibration
    assert sizes[0].calibration is not None, "the file's tokenizer reads the calibration text"
    assert sizes[0].loss.startswith("weights were quantized to Q4_1 and Q8_0 already (5.7 bits a weight)")


CONVERT = """
import resource, sys
from tiercache.store.checkpoint import Checkpoint
from tiercache.store.convert import convert
Checkpoint.open(sys.argv[1])  # imports included
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(sys.argv[1], sys.argv[2], plain=True, compress="off", show_progress=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10)
"""


def converted(source: Path, store: Path) -> int:
    """Convert in a fresh process; the memory in bytes that it took beyond opening."""
    command = [sys.executable, "-c", CONVERT, str(source), str(store)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.real
def test_the_real_file_converts_in_the_same_memory_and_names_paris(real_model: real.RealModel, tmp_path: Path) -> None:
    packed = converted(real_model.gguf, tmp_path / "store")
    plain = converted(real_model.checkpoint, tmp_path / "plain")
    assert packed < plain + (48 << 20), "pieces of a tensor, beside the tensors that are read anyway"
    for one in sorted((tmp_path / "store").glob("*.bin")):
        assert one.read_bytes() == (tmp_path / "plain" / one.name).read_bytes(), one.name
    assert "Paris" in answer(real_model.gguf)
    assert "Paris" in answer(real_model.gguf, precision="int8", store=tmp_path / "store")
