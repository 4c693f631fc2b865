"""Tiny GGUF files of random models, written as llama.cpp's converter writes them: names, rows, norms, settings."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as tf
from tokenizers.pre_tokenizers import ByteLevel

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS = {"head_dim": 16, "sliding_window": 6}
_LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LLAMA3 |= {"original_max_position_embeddings": 8192}
_GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}

CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**_SIZES, rope_theta=7e4),
    "llama-3.2": lambda: tf.LlamaConfig(**_SIZES, rope_parameters=_LLAMA3, tie_word_embeddings=True),
    "qwen2": lambda: tf.Qwen2Config(**_SIZES),
    "qwen3": lambda: tf.Qwen3Config(**_SIZES, head_dim=24, tie_word_embeddings=True),
    "gemma2": lambda: tf.Gemma2Config(**_SIZES, **_HEADS, final_logit_softcapping=9.0),
    # as many layers as the 27B model, which scales attention in another way and is told by them alone
    "gemma2-27b": lambda: tf.Gemma2Config(**(_SIZES | {"num_hidden_layers": 46}), **_HEADS, query_pre_attn_scalar=16),
    # seven layers: the sixth of Gemma 3 has no window
    "gemma3": lambda: tf.Gemma3TextConfig(
        **(_SIZES | {"num_hidden_layers": 7}), **_HEADS, rope_parameters=_GEMMA3_ROPES
    ),
    "phi3": lambda: tf.Phi3Config(**_SIZES, sliding_window=5),
    "phi4": lambda: tf.Phi3Config(**_SIZES, sliding_window=None),
    "chat": lambda: tf.LlamaConfig(**(_SIZES | {"vocab_size": 288})),  # more rows than TOKENS
}

_MERGES = ("Ġ t", "h e", "Ġt he")
TOKENS = (
    *("<pad>", "<bos>", "<|endoftext|>"),
    *sorted(ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in _MERGES),
    *("<|im_start|>", "<|im_end|>"),
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

Encode = Callable[[str, torch.Tensor], tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]]


def build(name: str, seed: int = 0) -> tf.PreTrainedModel:
    """A random model of fp32, its norms and biases too."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def plain(_: str, tensor: torch.Tensor) -> tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]:
    """F32."""
    return tensor.numpy(), gguf.GGMLQuantizationType.F32


def encoded(kind: str) -> Encode:
    """Matrices in that encoding."""
    wanted = gguf.GGMLQuantizationType[kind]

    def encode(name: str, tensor: torch.Tensor) -> tuple[np.ndarray[Any, Any], gguf.GGMLQuantizationType]:
        if tensor.dim() < 2:
            return plain(name, tensor)
        return gguf.quantize(tensor.numpy(), wanted), wanted

    return encode


def write(
    model: tf.PreTrainedModel, path: Path, encode: Encode = plain, *, chats: bool = False, **settings: Any
) -> Path:
    """Write `model` as a GGUF file.

    If it `chats`, it has a tokenizer and a chat template. `settings` are further ones of the tokenizer, and of the
    architecture by the end of their keys.
    """
    config = model.config
    kind = {"gemma3_text": "gemma3"}.get(config.model_type, config.model_type)
    writer = gguf.GGUFWriter(path, kind)
    _add_settings(writer, config, kind)
    if chats:
        _add_tokenizer(writer)
    else:
        writer.add_tokenizer_model("none")
        writer.add_vocab_size(config.vocab_size)
    for key, value in settings.items():
        _add(writer, key if key.startswith("tokenizer.") else f"{kind}.{key}", value)
    _add_tensors(writer, model, kind, encode)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
    adders[type(value)](key, value)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Byte-level BPE. As older files do, it leaves the size of the vocabulary to the tensors."""
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(TOKENS)
    writer.add_token_types([control if word.startswith("<") and len(word) > 1 else normal for word in TOKENS])
    writer.add_token_merges(_MERGES)
    writer.add_chat_template(CHATML)


def _add_settings(writer: gguf.GGUFWriter, config: Any, kind: str) -> None:
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head)
    if kind not in ("qwen2", "phi3"):
        writer.add_key_length(head)
        writer.add_value_length(head)
    if kind in ("gemma2", "gemma3", "phi3"):
        writer.add_sliding_window(config.sliding_window or 0)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            writer.add_float32(f"{kind}.{name}", getattr(config, name))
    rope = config.rope_parameters
    if kind == "gemma3":
        writer.add_rope_freq_base(rope["full_attention"]["rope_theta"])
        writer.add_float32("gemma3.rope.freq_base_swa", rope["sliding_attention"]["rope_theta"])
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["full_attention"]["factor"])
    else:
        writer.add_rope_freq_base(rope["rope_theta"])


def _add_tensors(writer: gguf.GGUFWriter, model: tf.PreTrainedModel, kind: str, encode: Encode) -> None:
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    names = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    for name, parameter in model.named_parameters():  # a tied head is left out, as the converter leaves it out
        tensor, config = parameter.detach(), model.config
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        if kind == "llama" and (match := re.search(r"\.(q_proj|k_proj)\.weight$", name)):
            tensor = _rotated_by_neighbours(tensor, heads[match[1]])
        if kind.startswith("gemma") and "norm" in name:
            tensor = tensor + 1
        stem, _, suffix = name.rpartition(".")
        target = f"{names.get_name(stem)}.{suffix}"
        data, encoding = encode(target, tensor.contiguous())
        writer.add_tensor(target, data, raw_dtype=encoding)
    if model.config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", _llama3_factors(model))


def _rotated_by_neighbours(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Row by row: transformers rotates row i of a head with row i + half, llama.cpp rows 2i and 2i + 1."""
    moved = torch.empty_like(tensor)
    head = tensor.shape[0] // heads
    for one in range(heads):
        for row in range(head):
            half, place = divmod(row, head // 2)
            moved[one * head + 2 * place + half] = tensor[one * head + row]
    return moved


def _llama3_factors(model: tf.PreTrainedModel) -> np.ndarray[Any, Any]:
    """What transformers' own frequencies of the scaled rope were divided by."""
    theta, head = model.config.rope_parameters["rope_theta"], model.config.head_dim
    bare = theta ** -(torch.arange(0, head, 2) / head)
    return (bare / model.model.rotary_emb.inv_freq).float().numpy()
