"""One forward pass on the meta device: in which order modules are used, and what memory a pass takes.

Runs the model's own code on tensors without data, so that nothing about an architecture has to be known here: the
KV cache, sliding windows, attention masks and activations are counted as the model makes them.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiercache.compat import cache_argument, cache_kwargs, cache_out
from tiercache.errors import UnsupportedModelError
from tiercache.model.card_attention import Capability, call_of, counting, fused


@dataclass(frozen=True)
class MetaTrace:
    """What a pass does and takes.

    Attributes:
        calls: names of the watched modules in the order of their calls.
        kv_bytes: the KV cache after a prefill of `tokens`.
        prefill_bytes: the most that a prefill of `tokens` holds at once, its KV cache included.
        decode_bytes: the most that one more token holds at once, the KV cache included.
        tokens: of the traced prompt.
    """

    calls: tuple[str, ...]
    kv_bytes: int
    prefill_bytes: int
    decode_bytes: int
    tokens: int

    @property
    def workspace_bytes(self) -> int:
        """What the largest pass takes beside the KV cache."""
        return max(self.prefill_bytes, self.decode_bytes) - self.kv_bytes


def trace_on_meta(
    model: transformers.PreTrainedModel,
    watched: Sequence[str],
    tokens: int,
    logits: int,
    cache: transformers.Cache | None = None,
    capability: Capability | None = None,
) -> MetaTrace:
    """Prefill `tokens` and decode one more on a copy of `model` without data.

    Args:
        model: on the meta device; it is not changed.
        watched: module names whose calls are recorded.
        tokens: length of the prompt; its last token is decoded.
        logits: rows of logits that the prefill returns.
        cache: the KV cache to fill, still empty; None for the model's own.
        capability: of the card whose attention is counted; None for the CPU's, which is fused.

    Raises:
        UnsupportedModelError: the model's forward cannot run without data, or keeps no KV cache.
    """
    stand_in = copy.deepcopy(model)
    nn.Module.to(stand_in, "meta")
    calls: list[str] = []
    for name in watched:
        stand_in.get_submodule(name).register_forward_pre_hook(_recorder(calls, name))
    try:
        attention = counting(capability, model.dtype) or _FusedAttention()
        kept, prefill_bytes = _pass(stand_in, max(tokens - 1, 1), cache, min(logits, max(tokens - 1, 1)), attention)
        order = tuple(calls)
        kept, decode_bytes = _pass(stand_in, 1, kept, 1, attention)
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:  # ValueError: a cache of states alone
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot run without data ({str(error).splitlines()[0]}), so its memory "
            "cannot be planned; use an architecture from the README's list"
        ) from error
    return MetaTrace(order, cache_bytes(kept), prefill_bytes, decode_bytes, tokens)


def _recorder(calls: list[str], name: str) -> Callable[[nn.Module, Any], None]:
    return lambda module, arguments: calls.append(name)


def _pass(model: nn.Module, tokens: int, cache: Any, logits: int, attention: TorchFunctionMode) -> tuple[Any, int]:
    """One pass; returns its cache and the peak of bytes held at once, `cache` included."""
    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    held = cache.get_seq_length() if cache is not None else 0
    mask = torch.ones(1, held + tokens, dtype=torch.long, device="meta")
    counter = _LiveBytes(model, _cached(cache))
    if cache_argument(model) is None:
        raise _no_cache(model)
    with torch.no_grad(), attention, counter:
        given = cache_kwargs(model, cache)
        output = model(input_ids=ids, attention_mask=mask, **given, use_cache=True, logits_to_keep=logits)
    kept = cache_out(output)
    if kept is None:
        raise _no_cache(model)
    return kept, counter.peak


def _no_cache(model: nn.Module) -> UnsupportedModelError:
    return UnsupportedModelError(f"{type(model).__name__} keeps no KV cache; use a decoder-only model")


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a transformers cache holds."""
    return sum(tensor.nbytes for tensor in _cached(cache))


def _cached(cache: Any) -> list[torch.Tensor]:
    layers = getattr(cache, "layers", ())
    parts = (part for layer in layers for part in (getattr(layer, "keys", None), getattr(layer, "values", None)))
    return [part for part in parts if isinstance(part, torch.Tensor)]


class _FusedAttention(TorchFunctionMode):
    """Fused attention takes its output and no more, which its decomposition on meta would not show."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return fused(call_of(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


class _Results:
    """Runs operations on tensors without data; what one made of such arguments before is made again without it.

    torch works out the shape of many results in Python, which takes a while; a model's layers do the same.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], tuple[Any, ...] | None] = {}  # size, stride and dtype; None: run it

    def __call__(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """What `func` returns."""
        if _makes_one_tensor(func) and (asked := _described((args, kwargs))) is not None:
            key = func, asked
            if key not in self._known:
                result = func(*args, **kwargs)
                self._known[key] = _remade(result, tree_leaves((args, kwargs)))
                return result
            if (known := self._known[key]) is not None:
                size, stride, dtype = known
                return torch.empty_strided(size, stride, dtype=dtype, device="meta")
        return func(*args, **kwargs)


@cache
def _makes_one_tensor(func: Any) -> bool:
    """Whether an operation returns a tensor of its own, and changes none."""
    returns = func._schema.returns
    return (
        len(returns) == 1
        and isinstance(returns[0].type, torch.TensorType)
        and returns[0].alias_info is None
        and not func._schema.is_mutable
    )


def _described(argument: Any) -> Any:
    """Whatever of an argument decides what comes of it, to be looked up by; None where that is not known."""
    if isinstance(argument, torch.Tensor):
        return (argument.shape, argument.stride(), argument.dtype) if argument.is_meta else None
    if isinstance(argument, tuple | list):
        parts = tuple(map(_described, argument))
        return None if None in parts else parts
    if isinstance(argument, dict):
        return _described((*argument, *argument.values()))
    return type(argument), argument  # 1, 1.0 and True are equal


def _remade(result: Any, given: Sequence[Any]) -> tuple[Any, ...] | None:
    """What a result is made anew from; None where its memory is not its own, or more than it needs."""
    storage = result.untyped_storage()
    shared = any(isinstance(part, torch.Tensor) and part.untyped_storage()._cdata == storage._cdata for part in given)
    needed = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device="meta")
    if shared or not result.is_meta or storage.nbytes() != needed.untyped_storage().nbytes():
        return None
    return result.shape, result.stride(), result.dtype


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that some tensor made within it still uses; the model's own left out."""

    def __init__(self, model: nn.Module, held: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._users: dict[int, int] = {}
        self._own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
        self._results = _Results()
        for tensor in held:
            self._enter(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False  # "is the mask all ones?" is all that a forward may ask; a padded batch takes more memory
        result = self._results(func, args, kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                self._enter(tensor)
        self.peak = max(self.peak, self.live)
        return result

    def _enter(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key in self._own:
            return
        if key not in self._users:
            self._users[key] = 0
            self.live += nbytes
        self._users[key] += 1
        weakref.finalize(tensor, self._leave, key, nbytes)

    def _leave(self, key: int, nbytes: int) -> None:
        self._users[key] -= 1
        if self._users[key] == 0:
            del self._users[key]
            self.live -= nbytes
