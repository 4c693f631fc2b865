"""The halves of a layer on the CPU, each a call or two of C: what does not change is written down once.

Knows the C structures of source/layer.h and attention.h; nothing of slots or caches.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from ctypes import Structure, byref, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.kernels.blocks import Attention, AttentionWeights, FeedForward, FeedForwardWeights
from tiercache.kernels.contract import ACTIVATIONS
from tiercache.kernels.cpu.library import CInput, CMatrix, CTeam
from tiercache.kernels.cpu.views import KINDS, Views, check_on_host

_MOST_HEAD_DIM = 256  # MOST_DIM of attention.h
_KEPT_BYTES = 1 << 20  # of scratch that a thread keeps between calls: what one token takes


class CAttentionHalf(Structure):
    """`AttentionHalf` of source/layer.h."""

    _fields_ = (
        ("inward", CMatrix * 3),
        ("norm", c_void_p),
        ("bias", c_void_p * 3),
        ("head_norm", c_void_p * 2),
        ("factors", c_void_p),
        ("outward_factors", c_void_p),
        ("outward", CMatrix),
        ("outward_bias", c_void_p),
        ("eps", c_float),
        ("scaling", c_float),
        *((name, c_int32) for name in ("kind", "heads", "key_heads", "head_dim")),
    )


class CFeedForwardHalf(Structure):
    """`FeedForwardHalf` of source/layer.h."""

    _fields_ = (
        ("inward", CMatrix),
        *((name, c_void_p) for name in ("norm", "factors", "down_factors")),
        ("down", CMatrix),
        ("eps", c_float),
        ("kind", c_int32),
        ("activation", c_int32),
    )


class CSlots(Structure):
    """`Slots` of source/attention.h."""

    _fields_ = (
        ("keys", c_void_p),
        ("values", c_void_p),
        ("key_strides", c_int64 * 2),
        ("value_strides", c_int64 * 2),
        ("mask", c_void_p),
        ("mask_stride", c_int64),
        ("slots", c_int64),
        ("kind", c_int32),
    )


class Calls:
    """What the halves call: the compiled kernels, views of matrices, threads, and scratch.

    Args:
        library: the compiled kernels.
        views: of matrices.
        team: says which threads work.
    """

    def __init__(self, library: ctypes.CDLL, views: Views, team: Callable[[], CTeam]) -> None:
        self.library, self.views, self.team = library, views, team
        self._own = threading.local()

    def scratch(self, nbytes: int) -> Tensor:
        """Memory that is this thread's until its next call."""
        if nbytes > _KEPT_BYTES:
            return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        kept: Tensor | None = getattr(self._own, "kept", None)
        if kept is None:
            kept = self._own.kept = torch.empty(_KEPT_BYTES, dtype=torch.uint8, device="cpu")
        return kept


class CpuAttention(Attention):
    """See `blocks.Attention`.

    Args:
        weights: of the half.
        calls: what it calls.

    Raises:
        UsageError: heads that the kernels do not take.
    """

    def __init__(self, weights: AttentionWeights, calls: Calls) -> None:
        w = weights
        if not takes_heads(w.heads, w.key_heads, w.head_dim):
            raise UsageError(
                f"{w.heads} heads of {w.head_dim} numbers on {w.key_heads} of keys: need an even number of at most "
                f"{_MOST_HEAD_DIM}, and as many heads for each of keys; leave this layer to its modules"
            )
        self._weights, self._calls, self._dtype = weights, calls, w.norm.dtype
        self._hidden, self._width = w.inward[0].columns, w.outward.rows
        half = CAttentionHalf(eps=w.eps, scaling=w.scaling, kind=KINDS[self._dtype])
        half.heads, half.key_heads, half.head_dim = w.heads, w.key_heads, w.head_dim
        for part, (planes, bias) in enumerate(zip(w.inward, w.biases, strict=True)):
            half.inward[part], half.bias[part] = calls.views.matrix(planes), _address(bias)
        for part, norm in enumerate(w.head_norms or ()):
            half.head_norm[part] = _address(norm)
        half.norm, half.factors, half.outward_factors = map(_address, (w.norm, w.factors, w.outward_factors))
        half.outward, half.outward_bias = calls.views.matrix(w.outward), _address(w.outward_bias)
        self._half, self._sizes = byref(half), dict[int, int]()
        self._slots = CSlots(kind=half.kind)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, tokens, calls = self._weights, x.shape[0], self._calls
        source = _input(x, self._hidden, self._dtype)
        _check_rotary(cos, tokens, w.head_dim, self._dtype)
        queries = torch.empty(tokens, w.heads, w.head_dim, dtype=torch.float32, device="cpu")
        shape = (1, w.key_heads, tokens, w.head_dim)
        keys = torch.empty(shape, dtype=self._dtype, device="cpu")
        values = torch.empty(shape, dtype=self._dtype, device="cpu")
        nbytes = self._sizes.get(tokens)
        if nbytes is None:
            nbytes = self._sizes[tokens] = calls.library.tc_project_scratch(self._half, tokens)
        scratch = calls.scratch(nbytes)
        given = (cos.data_ptr(), sin.data_ptr(), scratch.data_ptr())
        made = (queries.data_ptr(), keys.data_ptr(), values.data_ptr())
        calls.library.tc_project(self._half, byref(source), *given, *made, byref(calls.team()))
        return queries, keys, values

    def attend(self, x: Tensor, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        tokens, slots, calls = x.shape[0], keys.shape[2], self._calls
        source, where = _input(x, self._width, self._dtype), self._where(tokens, keys, values, mask)
        scratch = calls.scratch(calls.library.tc_attend_scratch(self._half, tokens, slots))
        out = torch.empty(tokens, self._width, dtype=self._dtype, device="cpu")
        given = (byref(source), queries.data_ptr(), where, scratch.data_ptr(), out.data_ptr())
        calls.library.tc_attend(self._half, *given, byref(calls.team()))
        return out

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        tokens, slots, calls = x.shape[0], keys.shape[2], self._calls
        source, where = _input(x, self._width, self._dtype), self._where(tokens, keys, values, mask)
        _check_rotary(cos, tokens, self._weights.head_dim, self._dtype)
        scratch = calls.scratch(calls.library.tc_step_scratch(self._half, tokens, slots))
        out = torch.empty(tokens, self._width, dtype=self._dtype, device="cpu")
        given = (cos.data_ptr(), sin.data_ptr(), where, scratch.data_ptr(), out.data_ptr())
        calls.library.tc_step(self._half, byref(source), *given, byref(calls.team()))
        return out

    def _where(self, tokens: int, keys: Tensor, values: Tensor, mask: Tensor | None) -> object:
        """A pointer to where keys and values lie, and which of them are attended to."""
        where, slots = self._slots, keys.shape[2]
        _, key_head, key_slot, apart = keys.stride()
        _, value_head, value_slot, values_apart = values.stride()
        if keys.dtype != self._dtype or apart != 1 or values_apart != 1:
            raise UsageError(f"keys are {keys.dtype} of strides {keys.stride()}, expected {self._dtype} in whole rows")
        like = (1, self._weights.key_heads, slots, self._weights.head_dim)
        if keys.shape != like or values.shape != like or values.dtype != self._dtype or tokens > slots:
            found = f"keys are {list(keys.shape)}, values {values.dtype} {list(values.shape)}"
            raise UsageError(f"{found}, expected {self._dtype} {list(like)} with room for {tokens} tokens")
        where.keys, where.values, where.slots = keys.data_ptr(), values.data_ptr(), slots
        where.key_strides[:], where.value_strides[:] = (key_head, key_slot), (value_head, value_slot)
        where.mask, where.mask_stride = None, 0
        if mask is not None:
            if mask.dtype != torch.bool or mask.shape != (tokens, slots) or mask.stride(1) != 1:
                raise UsageError(f"a mask is {mask.dtype} {list(mask.shape)}, expected bool {[tokens, slots]}")
            where.mask, where.mask_stride = mask.data_ptr(), mask.stride(0)
        return byref(where)


class CpuFeedForward(FeedForward):
    """See `blocks.FeedForward`; arguments as of `CpuAttention`."""

    def __init__(self, weights: FeedForwardWeights, calls: Calls) -> None:
        pair = calls.views.pair(weights.inward)
        if pair is None:
            raise UsageError("gate and up of unlike layout; those of a block lie alike")
        self._weights, self._calls, self._dtype = weights, calls, weights.norm.dtype
        self._width = weights.down.columns
        half = CFeedForwardHalf(eps=weights.eps, kind=KINDS[self._dtype])
        half.inward, half.down = pair, calls.views.matrix(weights.down)
        half.activation = ACTIVATIONS.index(weights.activation)
        half.norm, half.factors = _address(weights.norm), _address(weights.factors)
        half.down_factors = _address(weights.down_factors)
        self._half, self._sizes = byref(half), dict[int, int]()

    def forward(self, x: Tensor) -> Tensor:
        tokens, calls = x.shape[0], self._calls
        source = _input(x, self._width, self._dtype)
        nbytes = self._sizes.get(tokens)
        if nbytes is None:
            nbytes = self._sizes[tokens] = calls.library.tc_feed_forward_scratch(self._half, tokens)
        scratch = calls.scratch(nbytes)
        out = torch.empty(tokens, self._width, dtype=self._dtype, device="cpu")
        given = (byref(source), scratch.data_ptr(), out.data_ptr(), byref(calls.team()))
        calls.library.tc_feed_forward(self._half, *given)
        return out


def takes_heads(heads: int, key_heads: int, head_dim: int) -> bool:
    """Whether the kernels take so many heads of queries, and of keys and values, of so many numbers."""
    return head_dim <= _MOST_HEAD_DIM and head_dim % 2 == 0 and heads % key_heads == 0


def declare(library: ctypes.CDLL) -> None:
    """Give the library's functions their signatures."""
    half, source, team = c_void_p, c_void_p, c_void_p
    library.tc_linear_scratch.argtypes, library.tc_linear_scratch.restype = [half, c_int32], c_int64
    library.tc_linear.argtypes, library.tc_linear.restype = [half, source, *[c_void_p] * 3, team], None
    library.tc_project_scratch.argtypes = library.tc_feed_forward_scratch.argtypes = [half, c_int32]
    library.tc_attend_scratch.argtypes = library.tc_step_scratch.argtypes = [half, c_int32, c_int64]
    for name in ("project", "attend", "step", "feed_forward"):
        getattr(library, f"tc_{name}_scratch").restype = c_int64
    library.tc_project.argtypes = [half, source, *[c_void_p] * 6, team]
    library.tc_attend.argtypes = [half, source, *[c_void_p] * 4, team]
    library.tc_step.argtypes, library.tc_step.restype = [half, source, *[c_void_p] * 5, team], None
    library.tc_feed_forward.argtypes = [half, source, c_void_p, c_void_p, team]
    library.tc_project.restype = library.tc_attend.restype = library.tc_feed_forward.restype = None
    library.tc_pool.argtypes, library.tc_pool.restype = [], c_void_p


def _address(tensor: Tensor | None) -> int | None:
    """Of what stays where it is, in one piece."""
    if tensor is None:
        return None
    check_on_host("a weight", tensor)
    if not tensor.is_contiguous():
        raise UsageError(f"a norm, bias or factor of strides {tensor.stride()}; it must lie in one piece")
    return tensor.data_ptr()


def _input(x: Tensor, columns: int, dtype: torch.dtype) -> CInput:
    if x.dtype != dtype or x.ndim != 2 or x.shape[1] != columns or x.stride(1) != 1:
        raise UsageError(f"x is {x.dtype} {list(x.shape)}, expected {dtype} [tokens, {columns}], rows in one piece")
    return CInput(x.data_ptr(), x.stride(0), KINDS[dtype], x.shape[0])


def _check_rotary(cos: Tensor, tokens: int, head_dim: int, dtype: torch.dtype) -> None:
    if cos.dtype != dtype or cos.shape != (tokens, head_dim) or not cos.is_contiguous():
        raise UsageError(f"cos is {cos.dtype} {list(cos.shape)}, expected {dtype} {[tokens, head_dim]} in one piece")
