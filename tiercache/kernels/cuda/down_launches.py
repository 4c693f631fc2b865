"""Calls of the kernels for sums across the rows (down.cu, downs.cu, `sum` of common.cu), as `launches` has the others.

*Bits*: slices of the rows, and the lines of threads that walk them, depend on shapes and on the card's size, never on
the tokens or on where the planes lie.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from tiercache.kernels.cuda.launches import Call, MatrixArguments, RowListArguments

LINE_THREADS = 512
_FEW = (1, 2, 4)  # tokens of a block of down.cu
_MANY = (8, 16, 32, 64)  # of downs.cu
_DECODING = 5  # tokens that a weight could be multiplied with while it is decoded
_TILE_THREADS = 128
_TILE_SUMS = 1024  # tokens times words of a block of downs.cu, times four
_EIGHTHS = 8  # what slices are cut into before they are added up, by `sum` and by layer.cu
_MOST_WORDS = 4  # of a thread, of 16 columns each
_X_ROWS = 128  # whose places and activations are in shared memory at once
_ROW_BYTES = 32
_SUM_COLUMNS = 32
_LEAST_ROWS = 4  # of a line


class DownArguments(ctypes.Structure):
    """Of down.cu and downs.cu."""

    _fields_ = (
        ("matrix", MatrixArguments),
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("block_stride", "token_stride", "row_stride")),
        ("rows", RowListArguments),
        ("partial", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("kind", "block_shift", "tokens", "padded_tokens")),
        *((name, ctypes.c_int) for name in ("count", "per_slice", "wide", "classes", "merged", "most")),
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
        classes, strips = min(LINE_THREADS // wide, _X_ROWS), -(-units // wide)
        wanted = min(-(-multiprocessors // strips), -(-rows // (_LEAST_ROWS * classes)))
        size = max(1, -(-rows // max(1, wanted)))
        return Slices(-(-rows // size), size, wide, classes)


def padded_tokens(tokens: int) -> int:
    """Tokens that `partial` has room for."""
    size = _block(tokens)
    return -(-tokens // size) * size


def _block(tokens: int) -> int:
    """Tokens of a block: the most that it holds, or what multiplies and decodes least in all."""
    if tokens <= _FEW[-1]:
        return next(size for size in _FEW if size >= tokens)
    return min(_MANY, key=lambda size: -(-tokens // size) * (size + _DECODING))


def merged_slices(tokens: int, words: int, slices: Slices, multiprocessors: int) -> int:
    """Slices that downs.cu adds up itself, those of an eighth, if there are blocks enough then; no bit depends on it.

    `words`: of a row, 16 columns each. Without it the sums of all slices go to memory and come back.
    """
    size, eighth = _block(tokens), max(1, -(-slices.count // _EIGHTHS))
    blocks = _strips(words, size) * -(-slices.count // eighth) * -(-tokens // size)
    return eighth if size in _MANY and blocks >= multiprocessors else 1


def _strips(words: int, size: int) -> int:
    return -(-words // (_TILE_SUMS // 4 // size))


def down_call(
    found: MatrixArguments,
    planes: int,
    x: Activations,
    rows: Sequence[int],
    partial: int,
    count: int,
    slices: Slices,
    merged: int = 1,
) -> Call:
    """Of down.cu or downs.cu: `count` rows, whole slices of them, into `partial`.

    It is [slices, padded tokens, padded columns], or has a sum of `merged` slices (`merged_slices`) for each as many.

    `rows`: addresses of the lists for the three planes and the scales; nothing for all rows.
    """
    block, padded = _block(x.tokens), padded_tokens(x.tokens)
    arguments = DownArguments(
        *(found, x.address, *x.strides, RowListArguments(*rows), partial),
        *(x.kind, x.block.bit_length() - 1, x.tokens, padded),
        *(count, slices.size, slices.wide, slices.classes, merged, _X_ROWS // slices.classes * slices.classes),
    )
    words, parts = found.groups * (found.group // 16), -(-count // slices.size)
    if block in _MANY:
        grid = (_strips(words, block), -(-parts // merged), padded // block)
        name = f"downs_{planes}_{block}_{found.group}"
        return Call(name, grid, _tile_bytes(block, found.group), arguments, threads=_TILE_THREADS)
    units = words // min(_MOST_WORDS // block, found.group // 16)
    shared_bytes = max(slices.classes * slices.wide * 64, _X_ROWS * (_ROW_BYTES + 4 * block))
    grid = (-(-units // slices.wide), parts, padded // block)
    return Call(f"down_{planes}_{block}_{found.group}", grid, shared_bytes, arguments, threads=LINE_THREADS)


def _tile_bytes(tokens: int, group: int) -> int:
    """Shared memory of downs.cu: `Tile`."""
    units, rows = _TILE_SUMS // 4 // tokens, 8 if tokens < 32 else 16
    pairs = max(1, units // (group // 16)) * tokens
    return rows * (64 * units + 8 * pairs) + 16 * 8 * _TILE_THREADS


def sum_call(partial: int, out: tuple[int, int], tokens: int, columns: tuple[int, int], parts: int) -> Call:
    """Of common.cu: adds `parts` slices; out is (address, pitch in elements), `columns` those of out and of a slice."""
    width, padded = columns
    arguments = SumArguments(partial, *out, parts, padded_tokens(tokens), padded, width)
    return Call("sum", (-(-width // _SUM_COLUMNS), tokens, 1), 4 * 256, arguments)
