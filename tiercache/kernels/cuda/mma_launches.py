"""Calls of the products along the input by whole numbers (dots.cu, mma.cu) and of what prepares their activations.

*Bits*: a token's results depend on columns alone, not on its company, the card, the grid or the kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from tiercache.errors import UsageError
from tiercache.kernels.cuda.launches import (
    GRID_Y,
    THREADS,
    Blocks,
    Call,
    MatrixArguments,
    RowListArguments,
)

LEAST_CAPABILITY = (8, 0)
"""The first cards whose matrix units take bytes 16 x 32 x 8 at a time."""

PIECES = 3
"""Bytes of an activation."""

FEW_TOKENS = 2
"""Tokens up to which dots.cu takes them, one by one."""

_CHUNK = 2048  # columns that are added up two by two; of a warp of dots.cu
_STEP = 256  # columns of a step of mma.cu
_TILE = 8  # tokens of an instruction
_ROWS = 16  # rows of one
_MMA_WARPS = 4  # of a block
_BATCH = {1: 4, 2: 4, 3: 2}  # rows that a warp of dots.cu has on their way, for each number of planes
_DOTS_WARPS = 8
_DOTS_BLOCKS = 2  # of a multiprocessor, at once
_MOST_ROWS = 512  # of a block of dots.cu: their places and sums are in shared memory
_ROW_BYTES = 32
_SHARED_BYTES = 48 << 10  # that a block may have without asking


class ProductArguments(ctypes.Structure):
    """Of products.cuh."""

    _fields_ = (
        ("matrix", MatrixArguments * 2),
        *((name, ctypes.c_void_p) for name in ("digits", "factors")),
        ("rows", RowListArguments),
        ("out", ctypes.c_void_p),
        ("out_pitch", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("count", "tokens", "matrices", "activation")),
        *((name, ctypes.c_int) for name in ("block", "per_block", "across", "sharers")),
    )


class PackedArguments(ctypes.Structure):
    """`Packed` of numbers.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("out", "sums")),
        *((name, ctypes.c_int) for name in ("group", "digits", "padded_tokens", "chunks", "tokens", "columns")),
    )


class DigitsArguments(ctypes.Structure):
    """Of common.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("pitch", "stride")),
        ("to", PackedArguments),
        *((name, ctypes.c_int) for name in ("kind", "padding")),
    )


def digit_bytes(tokens: int, columns: int, group: int) -> int:
    """Bytes that the activations take, prepared."""
    if tokens <= FEW_TOKENS:
        return tokens * -(-columns // _CHUNK) * _CHUNK * PIECES
    padded = -(-columns // group) * group
    return -(-tokens // _TILE) * _TILE * -(-padded // _STEP) * _STEP * PIECES


def factor_count(tokens: int, columns: int, group: int) -> int:
    """Floats beside them."""
    padded = tokens if tokens <= FEW_TOKENS else -(-tokens // _TILE) * _TILE
    return 2 * padded * -(-columns // group)


def digits_call(
    x: int, strides: tuple[int, int], kind: int, shape: tuple[int, int], group: int, into: tuple[int, int]
) -> Call:
    """Of common.cu: x of that shape, strides and kind (0 fp32, 1 fp16, 2 bf16) into (digits, factors)."""
    (tokens, columns), blocks = shape, Blocks.of(shape[0])
    to = PackedArguments(*into, group, 1, blocks.size, 0, tokens, columns)
    padded = -(-columns // group) * group
    return Call("digits", (-(-padded // (4 * THREADS)), tokens, 1), 0, DigitsArguments(x, *strides, to, kind, 0))


def mma_call(
    matrices: Sequence[MatrixArguments],
    planes: int,
    x: tuple[int, int],
    rows: Sequence[int],
    out: tuple[int, int],
    shape: tuple[int, int],
    how: tuple[int, int],
) -> Call:
    """Of dots.cu or mma.cu: x is (digits, factors), out (address, pitch in elements), `shape` (rows, tokens).

    `how` is (activation, multiprocessors); activation -1 adds to out, others leave hidden in blocks of
    `Blocks.of(tokens).size`. `rows`: addresses of the lists for the three planes and the scales; nothing for all.
    """
    (count, tokens), (activation, multiprocessors) = shape, how
    arguments = ProductArguments(
        *((MatrixArguments * 2)(*matrices), *x, RowListArguments(*rows), *out),
        *(count, tokens, len(matrices), activation, Blocks.of(tokens).size, 0, 0, 0),
    )
    if tokens <= FEW_TOKENS:
        return _dots_call(arguments, planes, multiprocessors)
    group, high = matrices[0].group, _ROWS // len(matrices)
    tiles = 1 if tokens <= _TILE else 2
    blocks = -(-tokens // (tiles * _TILE))
    apart = tiles > 1 and -(-count // (high * _MMA_WARPS)) * blocks >= 2 * multiprocessors
    arguments.sharers = 1 if apart else _MMA_WARPS
    grid = (blocks, -(-count // (high * _MMA_WARPS // arguments.sharers)), 1)
    stage = 3072 + 1024 * (planes > 1) + 4096 * (planes > 2) + 128 * (512 // group + 1)
    shared_bytes = _MMA_WARPS * (stage + 4 * _ROWS * tiles * _TILE)
    return Call(f"mma_{planes}_{tiles}_{group}", _checked(grid, count), shared_bytes, arguments, threads=128)


def _dots_call(arguments: ProductArguments, planes: int, multiprocessors: int) -> Call:
    """As many blocks as are at once on the card, each with as many rows as that leaves it."""
    group, matrices = arguments.matrix[0].group, arguments.matrices
    chunks = -(-arguments.matrix[0].groups * group // _CHUNK)
    arguments.across = -(-chunks // -(-chunks // _DOTS_WARPS))
    turns = max(1, _DOTS_WARPS // arguments.across)
    items, batch = arguments.count * matrices, _BATCH[planes]
    wanted = -(-items // (_DOTS_BLOCKS * multiprocessors))
    most = min(_MOST_ROWS, _SHARED_BYTES // (_ROW_BYTES + 4 * chunks)) // batch
    arguments.per_block = min(most, -(-wanted // batch)) * batch
    grid = (arguments.tokens, -(-items // arguments.per_block), 1)
    shared_bytes = arguments.per_block * (_ROW_BYTES + 4 * chunks)
    threads = 32 * arguments.across * turns
    name = f"dots_{planes}_1_{group}"
    return Call(name, _checked(grid, arguments.count), shared_bytes, arguments, threads=threads)


def _checked(grid: tuple[int, int, int], count: int) -> tuple[int, int, int]:
    if grid[1] > GRID_Y:
        raise UsageError(f"{count} rows in one call; cut them into calls of {count * GRID_Y // grid[1]}")
    return grid
