"""Writes a Llama checkpoint of safetensors as the GGUF file that llama.cpp maps, about one tensor in memory.

It knows both formats and runs nothing. The rows of q and k are permuted as llama.cpp's rope wants them, so
that both sides compute the same function. The vocabulary is left out (model "none": ids in, logits out), and
scaled ropes are refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import torch
from safetensors import safe_open

from tiercache.errors import UnsupportedModelError

FileType = Literal["f16", "bf16", "q4_0"]

# In the order in which a pass reads them, which is the order in the file: a scan then reads ahead.
LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ROWS_AT_ONCE = 4096  # of a tensor that is being quantised in 32 bits


def write_gguf(checkpoint: Path, out_file: Path, file_type: FileType) -> None:
    """Write the checkpoint as one GGUF file.

    Norms stay in 32 bits, as llama.cpp computes them; with q4_0 every matrix is q4_0, head and embedding too.
    """
    config = _read_config(checkpoint)
    writer = gguf.GGUFWriter(out_file, "llama")
    _add_metadata(writer, config, gguf.LlamaFileType[f"MOSTLY_{file_type.upper()}"])
    sources = list(_sources(checkpoint, config, gguf.GGMLQuantizationType[file_type.upper()]))
    for source in sources:
        block, block_bytes = gguf.GGML_QUANT_SIZES[source.encoding]
        num_bytes = math.prod(source.shape) // block * block_bytes
        writer.add_tensor_info(source.target, source.shape, np.dtype(np.float32), num_bytes, source.encoding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for source in sources:
        writer.write_tensor_data(_encode(source.read(), source.encoding))
    writer.close()


def write_random_q4_0(config: dict[str, Any], out_file: Path, seed: int) -> None:
    """A GGUF file of the shape of `config` (a Llama's, as `config.json` has it) with random q4_0 matrices.

    Blocks repeat one seeded pool: right about bytes and arithmetic, and written at the disk's speed.
    """
    kinds = gguf.GGMLQuantizationType
    block, block_bytes = gguf.GGML_QUANT_SIZES[kinds.Q4_0]
    pool = np.random.default_rng(seed).integers(0, 256, (1 << 18, block_bytes), np.uint8)
    pool[:, :2] = np.full(1, 0.004, np.float16).view(np.uint8)  # a block's scale; weights within +-0.032
    writer = gguf.GGUFWriter(out_file, "llama")
    _add_metadata(writer, _completed(config), gguf.LlamaFileType.MOSTLY_Q4_0)
    shapes = _random_shapes(config)
    for name, shape in shapes.items():
        matrix = len(shape) == 2
        nbytes = math.prod(shape) // block * block_bytes if matrix else 4 * shape[0]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), nbytes, kinds.Q4_0 if matrix else kinds.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for shape in shapes.values():
        blocks = math.prod(shape) // block
        writer.write_tensor_data(np.resize(pool, (blocks, block_bytes)) if len(shape) == 2 else np.ones(shape, "f4"))
    writer.close()


def _random_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of an untied Llama by GGUF's names, in the order in which a pass reads them."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    rows = {"attn_k": (kv, hidden), "attn_v": (kv, hidden), "ffn_gate": (ffn, hidden), "ffn_up": (ffn, hidden)}
    rows |= {"ffn_down": (hidden, ffn)}
    shapes: dict[str, tuple[int, ...]] = {}
    for target in _targets({**config, "tie_word_embeddings": False}).values():
        kind = target.split(".")[-2]
        if kind in ("token_embd", "output"):
            shapes[target] = (config["vocab_size"], hidden)
        else:
            shapes[target] = (hidden,) if kind.endswith("norm") else rows.get(kind, (hidden, hidden))
    return shapes


@dataclass(frozen=True)
class _Source:
    """One tensor of the checkpoint, and what becomes of it."""

    file: Path
    name: str
    shape: tuple[int, ...]
    target: str
    encoding: gguf.GGMLQuantizationType
    rope_heads: int  # of a matrix whose rows llama.cpp wants permuted, else 0

    def read(self) -> torch.Tensor:
        with safe_open(self.file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(self.name)
        if not self.rope_heads:
            return tensor
        # transformers rotates the halves of a head, llama.cpp its neighbouring rows
        halves = tensor.view(self.rope_heads, 2, -1, tensor.shape[-1])  # [head, half, rotation, in]
        return halves.transpose(1, 2).reshape(tensor.shape)


def _sources(checkpoint: Path, config: dict[str, Any], encoding: gguf.GGMLQuantizationType) -> Iterator[_Source]:
    """Every tensor of the file to write, in its order."""
    files = _files_of_tensors(checkpoint)
    rope_heads = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config["num_key_value_heads"],
    }
    targets = _targets(config)
    if unknown := sorted(name for name in files.keys() - targets.keys() if not name.endswith("rotary_emb.inv_freq")):
        raise UnsupportedModelError(f"{checkpoint} has {unknown[0]}, which a plain Llama has not. Use another model.")
    for name, target in targets.items():
        with safe_open(files[name], framework="pt") as file:
            shape = tuple(file.get_slice(name).get_shape())
        kind = type(encoding).F32 if len(shape) == 1 else encoding
        heads = next((heads for part, heads in rope_heads.items() if part in name), 0)
        yield _Source(files[name], name, shape, target, kind, heads)


def _targets(config: dict[str, Any]) -> dict[str, str]:
    """GGUF's names by the checkpoint's, in the order in which a pass reads them."""
    targets = {"model.embed_tokens.weight": "token_embd.weight"}
    for layer in range(config["num_hidden_layers"]):
        for name, target in LAYER_TENSORS.items():
            targets[f"model.layers.{layer}.{name}.weight"] = f"blk.{layer}.{target}.weight"
    targets["model.norm.weight"] = "output_norm.weight"
    if not config["tie_word_embeddings"]:
        targets["lm_head.weight"] = "output.weight"
    return targets


def _files_of_tensors(checkpoint: Path) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for path in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    return files


def _encode(tensor: torch.Tensor, encoding: gguf.GGMLQuantizationType) -> np.ndarray[Any, Any]:
    """The bytes of a tensor, as an array."""
    kinds = gguf.GGMLQuantizationType
    if encoding == kinds.BF16:  # numpy has no such type: its bits
        return tensor.to(torch.bfloat16).view(torch.int16).numpy()
    if encoding in (kinds.F16, kinds.F32):
        return tensor.to(torch.float16 if encoding == kinds.F16 else torch.float32).numpy()
    parts = [gguf.quantize(part.float().numpy(), encoding) for part in torch.split(tensor, ROWS_AT_ONCE)]
    return np.concatenate(parts)


def _read_config(checkpoint: Path) -> dict[str, Any]:
    """The checkpoint's config.json, as transformers 4 or 5 wrote it, checked and with defaults filled in."""
    config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text())
    return _completed(config, str(checkpoint))


def _completed(config: dict[str, Any], name: str = "the model") -> dict[str, Any]:
    """The configuration with what may be left out filled in; others than plain Llamas are refused."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if config["model_type"] != "llama" or kind != "default":
        raise UnsupportedModelError(
            f"{name} is a {config['model_type']} with {kind} rope; only a llama with default rope is "
            "written to GGUF here. Use another model."
        )
    config = dict(config)
    config.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
    config.setdefault("tie_word_embeddings", False)
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    return config


def _add_metadata(writer: gguf.GGUFWriter, config: dict[str, Any], file_type: int) -> None:
    writer.add_file_type(file_type)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
