"""What changes from pass to pass in the calls of an attention half: addresses and strides, written into arguments.

Knows torch's tensors and the arguments of layer.cu and attention.cu; nothing of planes or launches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.kernels.cuda.card import KINDS, Card
from tiercache.kernels.cuda.layer_calls import AttentionArguments, Heads, RotateArguments


def turn(cos: Tensor, sin: Tensor, shape: tuple[int, int], card: Card) -> tuple[Tensor, Tensor]:
    """cos and sin [tokens, head_dim], their rows in one piece.

    Raises:
        UsageError: of another shape or kind, or elsewhere.
    """
    for given in (cos, sin):
        if given.shape != shape or given.dtype not in KINDS or given.device != card.device:
            raise UsageError(
                f"cos and sin are {given.dtype} {list(given.shape)} on {given.device}, expected fp32, fp16 or bf16 "
                f"{list(shape)} on {card.device}"
            )
    if cos.dtype != sin.dtype:
        raise UsageError(f"cos is {cos.dtype}, sin {sin.dtype}; give both in one dtype")
    return (cos if cos.stride(1) == 1 else cos.contiguous()), (sin if sin.stride(1) == 1 else sin.contiguous())


def write(
    into: RotateArguments, turns: tuple[Tensor, Tensor], queries: int, kept: tuple[Tensor, Tensor], first: int = 0
) -> None:
    """cos and sin; where queries go, and keys and values: from their slot `first` on."""
    cos, sin = turns
    into.cos, into.cos_pitch, into.sin, into.sin_pitch = cos.data_ptr(), cos.stride(0), sin.data_ptr(), sin.stride(0)
    keys, values = kept
    (_, key_head, key_slot, _), (_, value_head, value_slot, _) = keys.stride(), values.stride()
    before = first * keys.element_size()
    into.queries = queries
    into.keys, into.values = keys.data_ptr() + before * key_slot, values.data_ptr() + before * value_slot
    into.head_pitch[:], into.token_pitch[:] = (key_head, value_head), (key_slot, value_slot)


def point(into: AttentionArguments, queries: int, keys: Tensor, values: Tensor, mask: Tensor | None) -> None:
    """What is attended to."""
    at, other = keys.data_ptr(), values.data_ptr()
    _, key_head, key_slot, _ = keys.stride()
    _, value_head, value_slot, _ = values.stride()
    into.queries, into.keys, into.values, into.slots = queries, at, other, keys.shape[2]
    into.key_head, into.key_slot, into.value_head, into.value_slot = key_head, key_slot, value_head, value_slot
    strides = (key_head | key_slot | value_head | value_slot) * keys.element_size()
    into.aligned = not (at | other | strides) % 16
    into.mask, into.mask_pitch = (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))


def check_attended(
    heads: Heads, card: Card, asking: tuple[int, Tensor], kept: tuple[Tensor, Tensor], mask: Tensor | None
) -> None:
    """Refuse keys, values and masks that do not fit (tokens, queries).

    Raises:
        UsageError: one of them is of another shape or kind, or elsewhere.
    """
    (tokens, queries), (keys, values) = asking, kept
    slots, device = keys.shape[2], card.device
    good = queries.dtype == torch.float32 and queries.shape == (tokens, heads.queries, heads.size)
    good = good and keys.shape == (1, heads.keys, slots, heads.size) and slots > 0
    good = good and keys.dtype in KINDS and keys.stride(3) == 1
    good = good and values.shape == keys.shape and values.dtype == keys.dtype and values.stride(3) == 1
    if not good or not queries.device == keys.device == values.device == device:
        found = ", ".join(f"{t.dtype} {list(t.shape)} on {t.device}" for t in (queries, keys, values))
        raise UsageError(
            f"queries, keys, values are {found}; expected fp32 [{tokens}, {heads.queries}, {heads.size}] and twice "
            f"[1, {heads.keys}, slots, {heads.size}] of one dtype, numbers of a slot in one piece, on {device}"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (tokens, slots) or mask.device != device):
        raise UsageError(
            f"the mask is {mask.dtype} {list(mask.shape)} on {mask.device}, expected bool [{tokens}, {slots}] "
            f"on {device}"
        )
