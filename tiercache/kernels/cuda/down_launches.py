"""Calls of the kernels for sums across the rows (down.cu, `sum` of common.cu), as `launches` has the others.

*Bits*: slices of the rows, and the lines of threads that walk them, depend on shapes and on the card's size, never on
the tokens or on where the planes lie.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from tiercache.kernels.cuda.launches import Call, MatrixArguments, RowListArguments

LINE_THREADS = 512
_MOST_TOKENS = 4  # of a block
_MOST_WORDS = 4  # of a thread, of 16 columns each
_X_ROWS = 128  # whose places and activations are in shared memory at once
_ROW_BYTES = 32
_SUM_COLUMNS = 32
_LEAST_ROWS = 4  # of a line


class DownArguments(ctypes.Structure):
    """Of down.cu."""

    _fields_ = (
        ("matrix", MatrixArguments),
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("block_stride", "token_stride", "row_stride")),
        ("rows", RowListArguments),
        ("partial", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("kind", "block_shift", "tokens", "padded_tokens")),
        *((name, ctypes.c_int) for name in ("count", "per_slice", "wide", "classes")),
    )


class SumArguments(ctypes.Structure):
    """Of common.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("partial", "out")),
        ("out_pitch", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("slices", "padded_tokens", "padded_columns", "columns")),
    )


@dataclass(frozen=True)
class Activations:
    """x as the kernel reads it: its address, its type (0 fp32, 1 fp16, 2 bf16) and its strides in elements.

    Attributes:
        block: tokens of a block.
        strides: from block to block, token to token within one, row to row.
    """

    address: int
    kind: int
    tokens: int
    block: int
    strides: tuple[int, int, int]


@dataclass(frozen=True)
class Slices:
    """How rows are cut: into `count` slices of `size`, each walked by `classes` lines of `wide` threads."""

    count: int
    size: int
    wide: int
    classes: int

    @staticmethod
    def of(rows: int, group: int, groups: int, multiprocessors: int) -> Slices:
        """A slice for each multiprocessor that a strip of columns can have, yet some rows a line."""
        units = groups * -(-(group // 16) // _MOST_WORDS)
        wide = min(units, LINE_THREADS)
        classes, strips = LINE_THREADS // wide, -(-units // wide)
        wanted = min(-(-multiprocessors // strips), -(-rows // (_LEAST_ROWS * classes)))
        size = max(1, -(-rows // max(1, wanted)))
        return Slices(-(-rows // size), size, wide, classes)


def padded_tokens(tokens: int) -> int:
    """Tokens that `partial` has room for."""
    size = _block(tokens)
    return -(-tokens // size) * size


def _block(tokens: int) -> int:
    return next(size for size in (1, 2, _MOST_TOKENS) if size >= min(tokens, _MOST_TOKENS))


def down_call(
    found: MatrixArguments, planes: int, x: Activations, rows: Sequence[int], partial: int, count: int, slices: Slices
) -> Call:
    """Of down.cu: `count` rows, whole slices of them, into `partial` [slices, padded tokens, padded columns].

    `rows`: addresses of the lists for the three planes and the scales; nothing for all rows.
    """
    block, padded = _block(x.tokens), padded_tokens(x.tokens)
    units = found.groups * (found.group // 16) // min(_MOST_WORDS // block, found.group // 16)
    shared_bytes = max(slices.classes * slices.wide * 64, _X_ROWS * (_ROW_BYTES + 4 * block))
    arguments = DownArguments(
        *(found, x.address, *x.strides, RowListArguments(*rows), partial),
        *(x.kind, x.block.bit_length() - 1, x.tokens, padded),
        *(count, slices.size, slices.wide, slices.classes),
    )
    grid = (-(-units // slices.wide), -(-count // slices.size), padded // block)
    return Call(f"down_{planes}_{block}_{found.group}", grid, shared_bytes, arguments, threads=LINE_THREADS)


def sum_call(partial: int, out: tuple[int, int], tokens: int, columns: tuple[int, int], parts: int) -> Call:
    """Of common.cu: adds `parts` slices; out is (address, pitch in elements), `columns` those of out and of a slice."""
    width, padded = columns
    arguments = SumArguments(partial, *out, parts, padded_tokens(tokens), padded, width)
    return Call("sum", (-(-width // _SUM_COLUMNS), tokens, 1), 4 * 256, arguments)
