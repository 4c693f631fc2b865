"""What a GGUF file says of its model, as a transformers configuration.

transformers translates the settings that it knows and passes over the others, some of which change what the model
computes: scaled ropes, windows, the scale of attention. Those are added here. A setting that nobody knows is refused,
for a model that is run without it would write plausible, wrong text.
"""

import math
import re
from typing import Any

import numpy as np
import transformers

from tiercache.compat import gguf_config
from tiercache.errors import StoreError, UnsupportedModelError
from tiercache.formats.gguf_header import GgufHeader, Words
from tiercache.progress import note

ARCHITECTURES = ("gemma2", "gemma3", "llama", "phi3", "qwen2", "qwen3")
"""Those whose tensors and settings were compared with transformers' own checkpoints; Mistral's files say "llama"."""

ROPE_FACTORS = "rope_freqs.weight"
"""Not a weight: Llama 3.1's rope, as the factor of each frequency."""

_COUNTS = {
    *("context_length", "block_count", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.sliding_window", "attention.sliding_window_pattern", "rope.dimension_count"),
}
_KNOWN = {
    *_COUNTS,
    *("attention.layer_norm_rms_epsilon", "attn_logit_softcapping", "final_logit_softcapping"),
    *("expert_count", "expert_used_count", "rope.freq_base", "rope.freq_base_swa"),
    *("rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned"),
}
_NO_WINDOW = ("phi3", "attention.sliding_window")  # llama.cpp writes 0 for Phi-4, which has none
_LARGEST = 1 << 24  # of any count: more is damage, and would take memory before a tensor contradicts it
_HYBRID_PERIOD = {"gemma2": 2, "gemma3": 6}  # which layers look at everything: one in so many, in transformers too
# The 27B models scale attention by the heads' share of the hidden size, which llama.cpp tells by the number of layers.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
_WAY_OUT = "name the original checkpoint instead"


def architecture(header: GgufHeader) -> str:
    """The name of the file's architecture.

    Raises:
        StoreError: it names none.
        UnsupportedModelError: another than those that are known, or a mixture of experts.
    """
    file, found = header.files[0], header.metadata.get("general.architecture")
    if not isinstance(found, str):
        raise StoreError(f"{file} names no architecture, so it is no language model or damaged; download it again")
    experts = header.metadata.get(f"{found}.expert_count", 0)
    if experts:
        raise UnsupportedModelError(
            f"{file}: {found} is a mixture of experts (expert_count={experts}), which tiercache does not run yet; use "
            "a dense model of the same family"
        )
    if found not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file}: tiercache reads GGUF files of {', '.join(ARCHITECTURES)}, not of {found!r}; {_WAY_OUT}"
        )
    return found


def read_config(header: GgufHeader) -> transformers.PretrainedConfig:
    """The configuration of the file's model, its dtype left open.

    Raises:
        StoreError: settings and tensors contradict one another.
        UnsupportedModelError: the model needs something that is not known here.
    """
    kind, file = architecture(header), header.files[0]
    own = {
        name.removeprefix(f"{kind}."): value for name, value in header.metadata.items() if name.startswith(f"{kind}.")
    }
    if unknown := sorted(own.keys() - _KNOWN):
        raise UnsupportedModelError(f"{file} sets {kind}.{unknown[0]}, which tiercache does not know; {_WAY_OUT}")
    _check_counts(header, kind, own)
    try:
        # Older files do not name the size of their vocabulary, and their tokens may be fewer than the embedding's rows.
        rows = header.tensors["token_embd.weight"].shape[0]
        config = gguf_config(kind, header.metadata | {f"{kind}.vocab_size": rows})
    except Exception as error:  # transformers reads values in many places and ways
        raise StoreError(f"{file} holds settings that make no model ({error}); download it again") from error
    config.tie_word_embeddings = "output.weight" not in header.tensors  # transformers looks at the first part alone
    _complete_attention(config, kind, own, header)
    _complete_rope(config, kind, own, header)
    return config


def end_tokens(header: GgufHeader, config: transformers.PretrainedConfig) -> list[int]:
    """The tokens that end a turn or a text: those that the file names, and those whose words mean that.

    llama.cpp takes both as well: many files name the end of a text alone, which no answer in a chat comes to.
    """
    named = [header.metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    words = header.metadata.get("tokenizer.ggml.tokens")
    found = {token for token in named if type(token) is int} | set(words.ends if isinstance(words, Words) else ())
    if beyond := sorted(token for token in found if not 0 <= token < config.vocab_size):
        note(
            f"{header.files[0].name} names token {beyond[0]} as the end of a text or turn, its vocabulary has "
            f"{config.vocab_size}; that is passed over"
        )
    return sorted(found - set(beyond))


def _check_counts(header: GgufHeader, kind: str, own: dict[str, Any]) -> None:
    """Refuse counts that the tensors contradict, before anything is made of them."""
    file = header.files[0]
    for name in _COUNTS & own.keys():
        least = 0 if (kind, name) == _NO_WINDOW else 1
        if type(own[name]) is not int or not least <= own[name] <= _LARGEST:
            raise UnsupportedModelError(
                f"{file}: {name} is {own[name]!r}, and one count for all layers is what tiercache reads; {_WAY_OUT}"
            )
    layers = {int(match[1]) for name in header.tensors if (match := re.match(r"blk\.(\d{1,6})\.", name))}
    table = header.tensors.get("token_embd.weight")
    if table is None or len(table.shape) != 2:
        raise StoreError(f"{file} holds no token embedding; download it again")
    promised = own.get("block_count"), own.get("embedding_length")
    if (promised[0], promised[1]) != (max(layers, default=-1) + 1, table.shape[1]) or len(layers) != promised[0]:
        raise StoreError(
            f"{file} promises {promised[0]} layers of {promised[1]} channels, its tensors have {len(layers)} of "
            f"{table.shape[1]}; download it again"
        )
    if own.get("attention.head_count", 0) > table.shape[1]:
        raise StoreError(f"{file} promises more attention heads than channels; download it again")


def _complete_attention(
    config: transformers.PretrainedConfig, kind: str, own: dict[str, Any], header: GgufHeader
) -> None:
    """Head sizes, windows and scales that transformers passes over."""
    file = header.files[0]
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if name in own:
            setattr(config, name, own[name])
    if kind == "qwen3" and "attention.key_length" in own:
        config.head_dim = own["attention.key_length"]
    if kind == "phi3" and "attention.sliding_window" in own:
        config.sliding_window = own["attention.sliding_window"] or None
    if own["block_count"] == _LAYERS_OF_27B.get(kind):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for name in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if own.get(name, head) != head:
            raise UnsupportedModelError(
                f"{file}: {name} is {own[name]}, not the heads' {head}, which tiercache does not read; {_WAY_OUT}"
            )
    period = own.get("attention.sliding_window_pattern")
    windowed = kind in ("phi3", *_HYBRID_PERIOD)
    if period != (None if period is None else _HYBRID_PERIOD.get(kind)) or (
        "attention.sliding_window" in own and not windowed
    ):
        raise UnsupportedModelError(f"{file} has attention windows that {kind} of transformers has not; {_WAY_OUT}")


def _complete_rope(config: transformers.PretrainedConfig, kind: str, own: dict[str, Any], header: GgufHeader) -> None:
    """Scaled ropes: Gemma 3's linear one and Llama 3.1's; others are refused."""
    file = header.files[0]
    scaling, factor = own.get("rope.scaling.type", "none"), own.get("rope.scaling.factor", 1.0)
    if kind == "gemma3":  # one rope for layers that look at everything, another for those with a window
        ropes = {name: dict(rope) for name, rope in config.rope_parameters.items()}
        if "rope.freq_base_swa" in own:
            ropes["sliding_attention"]["rope_theta"] = own["rope.freq_base_swa"]
        if scaling == "linear":
            ropes["full_attention"] |= {"rope_type": "linear", "factor": factor}
            scaling = "none"
        config.rope_parameters = ropes
    if scaling != "none":
        raise UnsupportedModelError(
            f"{file} scales its rope ({scaling}, by {factor}), which tiercache does not read of {kind}; {_WAY_OUT}"
        )
    if ROPE_FACTORS in header.tensors:
        _complete_llama3(config, kind, header)


def _complete_llama3(config: transformers.PretrainedConfig, kind: str, header: GgufHeader) -> None:
    """Find the parameters of Llama 3.1's rope, of which the file has the outcome; refuse what is another's."""
    file, ref = header.files[0], header.tensors[ROPE_FACTORS]
    if ref.dtype != "F32" or kind != "llama" or ref.shape != (config.head_dim // 2,):
        raise UnsupportedModelError(f"{file} has a rope that is not Llama 3.1's; {_WAY_OUT}")
    with ref.path.open("rb") as opened:
        opened.seek(ref.offset)
        found = np.frombuffer(opened.read(ref.nbytes), "<f4")
    rope: dict[str, Any] = {"rope_theta": config.rope_parameters["rope_theta"], "rope_type": "llama3"}
    rope |= {"factor": float(found.max()), "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192  # all of Llama 3.1, 3.2 and 3.3, whose files do not say
    if not np.allclose(found, _llama3_factors(rope, config.head_dim), rtol=1e-4):
        raise UnsupportedModelError(f"{file} has a rope that is not Llama 3.1's; {_WAY_OUT}")
    config.rope_parameters = rope


def _llama3_factors(rope: dict[str, Any], head: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """What Llama 3.1's rope divides each frequency by."""
    lengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head, 2) / head)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = (rope["original_max_position_embeddings"] / lengths - low) / (high - low)
    factors: np.ndarray[Any, np.dtype[np.float64]] = 1 / (
        np.clip(share, 0, 1) * (1 - 1 / rope["factor"]) + 1 / rope["factor"]
    )
    return factors
