"""How the kernels of layer.cu and attention.cu are called, as `launches` tells it of the others.

Knows addresses and shapes. The addresses of a pass may stay null: whoever keeps a call writes them into its arguments.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from tiercache.errors import UsageError
from tiercache.kernels.cuda.launches import CHUNK_COLUMNS, THREADS, Blocks, Call, chunks_of
from tiercache.kernels.cuda.mma_launches import PackedArguments

SLICE = 64
"""Slots that attention sums up at once."""

SPAN = 8
"""Slices that are merged before they are merged with others."""

MOST_HEAD = 256
"""Numbers of a head, at most; a multiple of 8."""

_PER_BLOCK = 64  # threads of kernels that do four columns each and want many blocks


class EnterArguments(ctypes.Structure):
    """Of layer.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("pitch", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("norm", "factors")),
        ("to", PackedArguments),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("kind", "norm_kind", "padding")),
    )


class RotateArguments(ctypes.Structure):
    """Of layer.cu."""

    _fields_ = (
        ("found", ctypes.c_void_p * 3),
        ("bias", ctypes.c_void_p * 3),
        ("norm", ctypes.c_void_p * 2),
        *((name, ctypes.c_void_p) for name in ("cos", "sin")),
        *((name, ctypes.c_int64) for name in ("cos_pitch", "sin_pitch")),
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "values")),
        *((name, ctypes.c_int64 * 2) for name in ("head_pitch", "token_pitch")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("heads", "key_heads", "head_dim", "tokens", "padded_tokens")),
        *((name, ctypes.c_int) for name in ("kind", "weight_kind", "turn_kind")),
    )


class CombineArguments(ctypes.Structure):
    """Of layer.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("attended", "weights", "factors")),
        ("to", PackedArguments),
        *((name, ctypes.c_int) for name in ("units", "per_span", "head_dim", "padding")),
    )


class LeaveArguments(ctypes.Structure):
    """Of layer.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "bias")),
        ("pitch", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("found", "out")),
        *((name, ctypes.c_int) for name in ("kind", "bias_kind", "tokens", "columns", "padded_tokens", "padding")),
    )


class SettleArguments(ctypes.Structure):
    """Of layer.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("pitch", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("partial", "factors", "out")),
        *((name, ctypes.c_int) for name in ("slices", "padded_tokens", "padded_columns", "kind", "columns", "padding")),
    )


class AttentionArguments(ctypes.Structure):
    """Of attention.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("queries", "keys", "values")),
        *((name, ctypes.c_int64) for name in ("key_head", "key_slot", "value_head", "value_slot")),
        ("mask", ctypes.c_void_p),
        ("mask_pitch", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("attended", "weights")),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_int) for name in ("tokens", "heads", "key_heads", "head_dim", "slots")),
        *((name, ctypes.c_int) for name in ("per_unit", "aligned")),
    )


@dataclass(frozen=True)
class Heads:
    """The shape of attention: heads of queries, of keys and values, numbers in each."""

    queries: int
    keys: int
    size: int

    @staticmethod
    def fit(queries: int, keys: int, size: int) -> bool:
        """Whether the kernels take heads of that shape."""
        return size % 8 == 0 and 8 <= size <= MOST_HEAD and queries >= 1 and queries % max(1, keys) == 0

    def __post_init__(self) -> None:
        if not Heads.fit(self.queries, self.keys, self.size):
            raise UsageError(
                f"{self.queries} heads of {self.size} numbers over {self.keys} of keys: the CUDA kernels take heads of "
                f"8, 16, ... {MOST_HEAD} numbers and as many for each head of keys; leave this layer to its modules"
            )

    @property
    def columns(self) -> int:
        """Numbers of all heads of queries."""
        return self.queries * self.size


@dataclass(frozen=True)
class Units:
    """Slots cut into what one block does: `count` units of `per_unit` slices each.

    Attributes:
        count, per_unit: see above.
        per_span: units of a span.
        queries: of a block.
        tiles: blocks for all queries of a head of keys.
    """

    count: int
    per_unit: int
    per_span: int
    queries: int
    tiles: int

    @staticmethod
    def of(tokens: int, slots: int, heads: Heads, multiprocessors: int) -> Units:
        """Long units if there are blocks enough, short ones to fill the card otherwise; no bit depends on it."""
        wanted = tokens * (heads.queries // heads.keys)
        queries = 1 if wanted == 1 else 4 if wanted <= 4 or heads.size > 128 else 8
        tiles, slices = -(-wanted // queries), -(-slots // SLICE)
        enough, spans = 2 * multiprocessors, -(-slices // SPAN)
        if heads.keys * tiles >= enough or slices <= 1:
            return Units(1, spans * SPAN, 1, queries, tiles)
        if heads.keys * tiles * spans >= enough:
            return Units(spans, SPAN, 1, queries, tiles)
        return Units(slices, 1, SPAN, queries, tiles)


def packed(inputs: Sequence[int], group: int, shape: tuple[int, int], digits: bool = False) -> PackedArguments:
    """Inputs (tokens, columns) as products want them; plain fp32 rows at the first address for a group of 0.

    `digits`: as mma.cu wants them, else as rows.cu does.
    """
    tokens, columns = shape
    size = Blocks.of(tokens).size
    return PackedArguments(inputs[0], inputs[1], group, digits, size, chunks_of(columns), tokens, columns)


def enter_call(x: tuple[int, int, int], norm: tuple[int, int, float], factors: int, to: PackedArguments) -> Call:
    """Of layer.cu: x is (address, pitch, kind), the norm (address, kind, eps); factors 0 for none."""
    rows = Blocks.of(to.tokens).padded if to.group else to.tokens
    arguments = EnterArguments(x[0], x[1], norm[0], factors, to, norm[2], x[2], norm[1])
    return Call("layer_enter", (to.chunks, rows, 1), 4 * THREADS // 32, arguments)


def rotate_call(arguments: RotateArguments) -> Call:
    """Of layer.cu."""
    heads = arguments.heads + 2 * arguments.key_heads
    return Call("layer_rotate", (heads, arguments.tokens, 1), 0, arguments, threads=32)


def attention_call(arguments: AttentionArguments, kind: int, units: Units) -> Call:
    """Of attention.cu, for keys and values of that kind; takes the units' part of the arguments from `units`."""
    size = arguments.head_dim
    pairs = 1 if size <= 64 else 2 if size <= 128 else 4
    arguments.per_unit = units.per_unit
    shared_bytes = 4 * units.queries * (9 * size + SLICE + 3)
    name = f"attention_{kind + 1}_{units.queries}_{pairs}"
    return Call(name, (units.count, arguments.key_heads, units.tiles), shared_bytes, arguments)


def combine_call(found: tuple[int, int], factors: int, units: Units, size: int, to: PackedArguments) -> Call:
    """Of layer.cu: what attention.cu found (attended, weights) in heads of that size, into `to`."""
    rows = Blocks.of(to.tokens).padded if to.group else to.tokens
    arguments = CombineArguments(*found, factors, to, units.count, units.per_span, size)
    blocks = to.chunks * (CHUNK_COLUMNS // (4 * _PER_BLOCK))
    return Call("layer_combine", (blocks, rows, 1), 0, arguments, threads=_PER_BLOCK)


def leave_call(arguments: LeaveArguments) -> Call:
    """Of layer.cu."""
    blocks = -(-arguments.tokens // arguments.padded_tokens)
    return Call("layer_leave", (-(-arguments.columns // THREADS), blocks, 1), 0, arguments)


def settle_call(arguments: SettleArguments, tokens: int) -> Call:
    """Of layer.cu."""
    return Call("layer_settle", (-(-arguments.columns // 128), tokens, 1), 16 * THREADS, arguments)
