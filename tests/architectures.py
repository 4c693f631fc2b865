"""Tiny random transformers models, one per architecture that tiercache promises; built on the spot, seeded."""

from collections.abc import Callable
from pathlib import Path

import torch
import transformers as tf

_SMALL = {
    "vocab_size": 131,
    "hidden_size": 56,  # no multiple of 64, on purpose
    "intermediate_size": 104,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_WIDE = _SMALL | {"hidden_size": 72}  # a whole block of the Hadamard transform, and eight numbers behind it
_HEAD = {"head_dim": 16}
_WINDOW = {"sliding_window": 6}
_MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}


def _without(*names: str) -> dict[str, int]:
    return {name: value for name, value in _SMALL.items() if name not in names}


CONFIGS: dict[str, Callable[[], tf.PretrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**_SMALL),
    "llama-tied-bias": lambda: tf.LlamaConfig(**_WIDE, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "mistral": lambda: tf.MistralConfig(**_SMALL, **_WINDOW),
    "qwen2": lambda: tf.Qwen2Config(**_WIDE),
    "qwen3": lambda: tf.Qwen3Config(**_SMALL, **_HEAD, tie_word_embeddings=True),
    "gemma2": lambda: tf.Gemma2Config(**_WIDE, **_HEAD, **_WINDOW, **_MIXED, query_pre_attn_scalar=16),
    "gemma3": lambda: tf.Gemma3TextConfig(**_SMALL, **_HEAD, **_WINDOW, **_MIXED, query_pre_attn_scalar=16),
    "phi3": lambda: tf.Phi3Config(**_WIDE),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=131, n_embd=72, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "opt": lambda: tf.OPTConfig(
        vocab_size=131,
        hidden_size=56,
        ffn_dim=104,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=40,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "falcon": lambda: tf.FalconConfig(
        vocab_size=131,
        hidden_size=56,
        num_hidden_layers=3,
        num_attention_heads=4,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "gpt-neox": lambda: tf.GPTNeoXConfig(**_without("num_key_value_heads")),
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> tf.PreTrainedModel:
    """A random model of that architecture, in `dtype`, ready to run."""
    torch.manual_seed(seed)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases too, so that losing one is seen
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "50GB") -> tf.PreTrainedModel:
    """Build and write as a safetensors checkpoint; returns the resident model."""
    model = build(name, dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return model
