"""The one file that knows transformers' moving parts: names that changed between its releases, and its private ones.

Everything else imports them from here. Where this transformers lacks a part, an error names it; nothing is done
silently in another way.

transformers 5.24 renamed the argument and the output that carry the KV cache from `past_key_values` (`cache_params` in
recurrent models) to `cache`; the old names go in 5.40.
"""

import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache as once
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from tiercache.errors import EnvironmentUnsupportedError

OLDEST, NEWEST = (5, 5), (5, 24)
"""The oldest minor release that is supported, and the newest that the tests passed with."""

try:
    from transformers.activations import ACT2FN
    from transformers.cache_utils import (
        CacheLayerMixin,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
        LinearAttentionCacheLayerMixin,
    )
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming
    from transformers.generation import logits_process
    from transformers.generation.streamers import BaseStreamer
    from transformers.generation.utils import GenerateDecoderOnlyOutput
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
    from transformers.modeling_utils import AttentionInterface
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise EnvironmentUnsupportedError(
        f"transformers {transformers.__version__} lacks a part that tiercache needs ({error}); install one of "
        f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    ) from error

__all__ = [
    "ACT2FN",
    "AttentionInterface",
    "AttentionMaskInterface",
    "BaseStreamer",
    "CacheLayerMixin",
    "Conv1D",
    "DynamicCache",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "GenerateDecoderOnlyOutput",
    "LinearAttentionCacheLayerMixin",
    "WeightRenaming",
    "attention_by",
    "attention_of",
    "CACHE_NAMES",
    "cache_argument",
    "cache_in",
    "cache_kwargs",
    "cache_out",
    "check_version",
    "generation_output",
    "get_model_conversion_mapping",
    "gguf_config",
    "gguf_names",
    "gguf_options",
    "is_stateful",
    "logits_process",
    "other_loops",
    "sampling_class",
    "sdpa_attention_forward",
    "sdpa_mask",
    "supports_attention_functions",
]

CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""Every name that the KV cache has had as an argument, the newest first."""

_LOOPS = ("_sample", "_beam_search", "_assisted_decoding")  # the decoding loops that `generate` looks up on the class


def gguf_options() -> dict[str, Any]:
    """What `from_pretrained(gguf_file=...)` needs to make plain weights; newer transformers keep the file's blocks."""
    kind = getattr(transformers, "GgufConfig", None)
    return {} if kind is None else {"quantization_config": kind(dequantize=True)}


def gguf_config(architecture: str, metadata: Mapping[str, Any]) -> transformers.PretrainedConfig:
    """The configuration that transformers makes of a GGUF file's metadata; raises whatever it finds wrong with them.

    Its own `AutoConfig.from_pretrained(gguf_file=...)` reads every word of the vocabulary for that: seconds.
    """
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING  # of no use without a GGUF file

    made = {"model_type": {"gemma3": "gemma3_text"}.get(architecture, architecture)}
    for prefix in (architecture, "tokenizer"):
        mapping: Mapping[str, str | None] = GGUF_CONFIG_MAPPING[prefix]  # type: ignore[assignment]
        for name, ours in mapping.items():
            if ours is not None and f"{prefix}.{name}" in metadata:
                made[ours] = metadata[f"{prefix}.{name}"]
    config: transformers.PretrainedConfig = transformers.AutoConfig.for_model(**made)
    return config


def gguf_names(
    model: transformers.PreTrainedModel, architecture: str
) -> tuple[dict[str, str], Callable[[str, Any], Any]]:
    """The parameter that each name of a GGUF file stands for, and what undoes llama.cpp's changes to a tensor.

    The second takes GGUF's name and an array, and returns the array as the checkpoint had it.
    """
    # Importing it takes a second, and only a GGUF file needs it.
    from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map

    kind: Any = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
    processor = kind(config=model.config.to_dict())
    # transformers asks each module again for what its parent has answered: minutes for a large model. Whole names do.
    asked = SimpleNamespace(config=model.config, state_dict=model.state_dict, named_children=tuple)
    names: dict[str, str] = get_gguf_hf_weights_map(asked, processor)
    return names, lambda name, values: processor.process(weights=values, name=name).weights


def check_version(version: str = transformers.__version__) -> None:
    """Warn, once for each process, of a transformers newer than any that was tested.

    Raises:
        EnvironmentUnsupportedError: it is older than the oldest that is supported.
    """
    found = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if found < OLDEST:
        raise EnvironmentUnsupportedError(
            f"transformers {version} is older than {OLDEST[0]}.{OLDEST[1]}, the oldest that tiercache runs with; "
            f"pip install 'transformers>={OLDEST[0]}.{OLDEST[1]}'"
        )
    if found > NEWEST:
        _warn_of_newer(version)


@once
def _warn_of_newer(version: str) -> None:
    warnings.warn(
        f"transformers {version} is newer than {NEWEST[0]}.{NEWEST[1]}, the newest that tiercache was tested with; "
        f"should something fail, pip install 'transformers<{NEWEST[0]}.{NEWEST[1] + 1}'",
        stacklevel=2,
    )


def cache_argument(model: torch.nn.Module) -> str | None:
    """The name under which `model.forward` takes a KV cache; None where it takes none."""
    return _cache_argument(type(model).forward)


@once
def _cache_argument(forward: Callable[..., Any]) -> str | None:
    accepts = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in accepts), None)


def cache_kwargs(model: torch.nn.Module, cache: transformers.Cache | None) -> dict[str, Any]:
    """A KV cache as the argument of `model.forward` that takes it.

    Raises:
        EnvironmentUnsupportedError: it takes none, under no name that is known.
    """
    name = cache_argument(model)
    if name is None:
        raise _lacks(f"argument for a KV cache in {type(model).__name__}.forward ({', '.join(CACHE_NAMES)})")
    return {name: cache}


def cache_in(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> transformers.Cache | None:
    """The KV cache among the arguments of a forward, under whichever of its names; None without one."""
    for name in CACHE_NAMES:
        if isinstance(named.get(name), transformers.Cache):
            cache: transformers.Cache = named[name]
            return cache
    return next((value for value in arguments if isinstance(value, transformers.Cache)), None)


def cache_out(output: Any) -> transformers.Cache | None:
    """The KV cache that a forward or a `generate` with return_dict_in_generate=True gives back; None without one."""
    found = (vars(output).get(name) for name in CACHE_NAMES)  # a look-up by an old name warns
    return next((cache for cache in found if isinstance(cache, transformers.Cache)), None)


def generation_output(cache: transformers.Cache | None, **parts: Any) -> Any:
    """What `generate` returns with return_dict_in_generate=True."""
    accepts = inspect.signature(GenerateDecoderOnlyOutput).parameters
    name = next((name for name in CACHE_NAMES if name in accepts), None)
    if name is None:
        raise _lacks("place for a KV cache in GenerateDecoderOnlyOutput")
    made: Callable[..., Any] = GenerateDecoderOnlyOutput
    return made(**parts, **({} if cache is None else {name: cache}))


def sampling_defaults() -> dict[str, Any]:
    """What `generate` takes for temperature, top_p and top_k where neither the call nor the checkpoint says."""
    found = transformers.GenerationConfig._get_default_generation_params()
    return {name: found[name] for name in ("temperature", "top_p", "top_k")}


def sampling_class(model: transformers.PreTrainedModel, loops: Mapping[str, Callable[..., Any]]) -> type:
    """A subclass of the model's class, of the same name, whose methods are `loops`: `generate`, and what it looks up.

    `generate` looks its decoding loops up on the class, so a model that is given this class decodes by them.

    Raises:
        EnvironmentUnsupportedError: this transformers has no such loop.
    """
    kind = type(model)
    for name in loops:
        if not callable(getattr(kind, name, None)):
            raise _lacks(f"decoding loop {kind.__name__}.{name}")
    return type(kind.__name__, (kind,), {**loops, "__module__": kind.__module__, "__doc__": kind.__doc__})


def other_loops(model: transformers.PreTrainedModel) -> tuple[str, ...]:
    """Names of the decoding loops of the model's class beside sampling: beam search, an assistant model."""
    return tuple(name for name in _LOOPS[1:] if callable(getattr(type(model), name, None)))


def attention_of(config: transformers.PretrainedConfig) -> str:
    """The name of the attention function that a language model runs: "sdpa", "eager", ..."""
    own: dict[str, Any] = object.__getattribute__(config, "__dict__")  # theirs takes microseconds, and layers ask
    found = own.get("_attn_implementation_internal") or getattr(config, "_attn_implementation", None)
    if not isinstance(found, str):
        raise _lacks("name of the attention function in a configuration")
    return found


@contextmanager
def attention_by(config: transformers.PretrainedConfig, name: str) -> Iterator[None]:
    """Within, a language model attends by the function registered under `name`."""
    before = attention_of(config)
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def supports_attention_functions(model: transformers.PreTrainedModel) -> bool:
    """Whether the model attends by transformers' registered functions, so that one may be put in."""
    return bool(getattr(model, "_supports_attention_backend", False))


def is_stateful(model: transformers.PreTrainedModel) -> bool:
    """Whether transformers says that the model carries a state which is not one of single tokens."""
    return bool(getattr(model, "_is_stateful", False))


def _lacks(what: str) -> EnvironmentUnsupportedError:
    return EnvironmentUnsupportedError(
        f"transformers {transformers.__version__} has no {what}, which tiercache needs; install one of "
        f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"
    )
