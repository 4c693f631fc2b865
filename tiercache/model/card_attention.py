"""Attention on a card: which of torch's kernels takes it, and a slice of the queries at a time where none is fused.

torch (2.11, sdp_utils.cpp) has three kernels. Flash wants capability 8.0, 16 bits and no mask. The memory-efficient one
takes fp32 and fp16 on every card and bf16 from 8.0, but no heads of keys that several heads of queries share. What
neither takes goes by way of scores [heads, queries, slots] in fp32, twice: 32 GiB for 8,192 tokens of 64 heads. So
calls whose scores would pass `SCORE_BYTES` are rewritten: shared heads are repeated where that makes the
memory-efficient kernel possible, and queries are cut into slices where it does not. A slice reads the same keys with
the same weights, so its rows equal those of the whole call up to the rounding of their sums.

Knows tensors and capabilities; nothing of models or budgets.
"""

import functools
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Capability = tuple[int, int]

SCORE_BYTES = 128 << 20
"""Of scores at once: a percent of a small card, and at 64 heads of 4,096 slots still 64 queries."""

_FLASH_FROM = _BF16_FROM = (8, 0)
_HEAD_DIM_OF_FLASH = 256
_HEAD_DIM_MULTIPLE = 8  # of the memory-efficient kernel at 16 bits; other head dimensions count as scores
_SCORES = 2 * 4  # bytes: fp32, before the softmax and after it
_DROPOUT_AT = 4  # its place among the arguments
_HALVES = (torch.float16, torch.bfloat16)
_attention = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True)
class Call:
    """A call of `scaled_dot_product_attention`; fields are its arguments, without dropout."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    @property
    def score_bytes(self) -> int:
        """What scores take where no kernel is fused."""
        return self.query.shape[:-1].numel() * self.key.shape[-2] * _SCORES


class CardAttention:
    """The attention of a card of some capability, measured or told.

    Args:
        capability: CUDA's.
        score_bytes: of scores at once.
    """

    def __init__(self, capability: Capability, score_bytes: int = SCORE_BYTES) -> None:
        self._capability, self._score_bytes = capability, score_bytes

    def kernel(self, call: Call) -> str:
        """The kernel of torch that takes a call: "flash", "efficient", or "scores"."""
        query, value, dtype = call.query, call.value, call.query.dtype
        shares, dims = query.shape[-3] != call.key.shape[-3], (query.shape[-1], value.shape[-1])
        flashes = self._capability >= _FLASH_FROM and dtype in _HALVES and call.attn_mask is None
        if flashes and dims[0] == dims[1] <= _HEAD_DIM_OF_FLASH:
            return "flash"
        takes = dtype in (torch.float32, torch.float16) or self._capability >= _BF16_FROM
        return "efficient" if takes and not shares and not any(dim % _HEAD_DIM_MULTIPLE for dim in dims) else "scores"

    def attend(self, call: Call) -> Tensor:
        """The attention, its scores never above the bound (one query may pass it)."""
        if self.kernel(call) != "scores" or call.score_bytes <= self._score_bytes:
            return self._run(call)
        call = _repeated(call)
        if self.kernel(call) != "scores":
            return self._run(call)
        tokens = call.query.shape[-2]
        step = max(1, self._score_bytes * tokens // call.score_bytes)
        out = call.query.new_empty((*call.query.shape[:-1], call.value.shape[-1]))
        for start in range(0, tokens, step):
            some = slice(start, min(tokens, start + step))
            out[..., some, :] = self._run(_sliced(call, some))
        return out

    def _run(self, call: Call) -> Tensor:
        found: Tensor = _attention(**vars(call))
        return found


class _CountedAttention(CardAttention):
    """The same on tensors without data, taking what it would take on the card."""

    def _run(self, call: Call) -> Tensor:
        if self.kernel(call) != "scores":
            return fused(call)
        mask, causal = call.attn_mask, call.is_causal
        given = {"scale": call.scale, "enable_gqa": call.enable_gqa}
        made = torch.ops.aten._scaled_dot_product_attention_math
        found: Tensor = made(call.query, call.key, call.value, mask, 0.0, causal, **given)[0]
        return found


class Rewriting(TorchFunctionMode):
    """Calls of `scaled_dot_product_attention` within go to `attention`; without one they are fused.

    Args:
        attention: of the card.
    """

    def __init__(self, attention: CardAttention) -> None:
        super().__init__()
        self._attention = attention

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        dropout = given.get("dropout_p", args[_DROPOUT_AT] if len(args) > _DROPOUT_AT else 0.0)
        if func is not _attention or dropout:  # who trains does so as torch does it
            return func(*args, **given)
        return self._attention.attend(call_of(*args, **given))


def counting(capability: Capability | None, dtype: torch.dtype) -> TorchFunctionMode | None:
    """Within it attention takes, on tensors without data, what it would on such a card; None where the CPU computes.

    `dtype` is the model's. Where no call is rewritten when it runs, none is when it is counted.
    """
    if capability is None:
        return None
    return Rewriting(_CountedAttention(capability, SCORE_BYTES if wanted(capability, dtype) else sys.maxsize))


class SlicedForward:
    """Lets a module's forward run with its attention rewritten; `close` puts the module's own back.

    Args:
        module: the inner model, whose forward calls all layers.
        attention: of the card.
    """

    def __init__(self, module: nn.Module, attention: CardAttention) -> None:
        forward, self._values, self._before = module.forward, module.__dict__, module.__dict__.get("forward")

        @functools.wraps(forward)
        def rewritten(*arguments: Any, **named: Any) -> Any:
            given = named.get("input_ids", arguments[0] if arguments else None)
            if isinstance(given, Tensor) and given.shape[-1] == 1:  # one query: nothing to cut
                return forward(*arguments, **named)
            with Rewriting(attention):
                return forward(*arguments, **named)

        self._values["forward"] = rewritten

    def close(self) -> None:
        """Harmless when done twice."""
        self._values.pop("forward", None)
        if self._before is not None:
            self._values["forward"] = self._before


def wanted(capability: Capability | None, dtype: torch.dtype) -> bool:
    """Whether calls are rewritten as they run: with flash all of a model's usual ones are fused, and none need be."""
    return capability is not None and not (capability >= _FLASH_FROM and dtype in _HALVES)


def call_of(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **named: Any
) -> Call:
    """Arguments as torch takes them; dropout is for training, which passes of an offloaded model are not."""
    return Call(query, key, value, attn_mask, **named)


def fused(call: Call) -> Tensor:
    """What a fused kernel takes, on tensors without data: its output, and while it runs its mask as numbers."""
    mask = call.attn_mask
    as_bias = call.query.new_empty(mask.shape) if isinstance(mask, Tensor) else None  # a mask of booleans
    output = call.query.new_empty((*call.query.shape[:-1], call.value.shape[-1]))
    del as_bias
    return output


def _repeated(call: Call) -> Call:
    """The same with heads of keys and values repeated for the heads of queries that share them."""
    times = call.query.shape[-3] // call.key.shape[-3]
    if times == 1:
        return call
    key, value = (each.repeat_interleave(times, -3) for each in (call.key, call.value))
    return Call(call.query, key, value, call.attn_mask, call.is_causal, call.scale)


def _sliced(call: Call, some: slice) -> Call:
    """The call for some queries; of a causal one without the keys that none of them may see."""
    query, mask = call.query[..., some, :], call.attn_mask
    if not call.is_causal:
        if mask is not None and mask.shape[-2] != 1:
            mask = mask[..., some, :]
        return Call(query, call.key, call.value, mask, scale=call.scale)
    seen = min(some.stop, call.key.shape[-2])
    mask = torch.ones(some.stop - some.start, seen, dtype=torch.bool, device=query.device).tril(some.start)
    return Call(query, call.key[..., :seen, :], call.value[..., :seen, :], mask, scale=call.scale)
