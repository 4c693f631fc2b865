"""Calls of the kernels for matrix units (mma.cu) and of what prepares their activations, as `launches` has the others.

*Bits*: a token's results depend on shapes alone, not on its company, the card's size or the grid.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from tiercache.errors import UsageError
from tiercache.kernels.cuda.launches import (
    FEW_TOKENS,
    GRID_Y,
    THREADS,
    WARPS,
    Blocks,
    Call,
    MatrixArguments,
    RowListArguments,
)

LEAST_CAPABILITY = (8, 0)
"""The first cards whose matrix units take bytes 16 x 32 x 8 at a time."""

PIECES = 3
"""Bytes of an activation."""

ZEROS = 128
"""Bytes at the end of the activations."""

_ROWS = 16  # of an instruction
_MANY = 32  # tokens of a block, where there are more than a few
_SHARERS = 4  # warps that share the parts of 16 rows, where blocks would be few
_SMALL_GROUP = 32  # which the kernel for many tokens does not take


class MmaArguments(ctypes.Structure):
    """Of mma.cu."""

    _fields_ = (
        ("matrix", MatrixArguments * 2),
        *((name, ctypes.c_void_p) for name in ("digits", "factors")),
        ("rows", RowListArguments),
        ("out", ctypes.c_void_p),
        ("out_pitch", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("count", "tokens", "matrices", "activation", "sharers", "padding")),
    )


class DigitsArguments(ctypes.Structure):
    """Of common.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("pitch", "stride")),
        *((name, ctypes.c_void_p) for name in ("digits", "factors")),
        *((name, ctypes.c_int) for name in ("kind", "columns", "group", "tokens", "groups")),
    )


def blocks_of(tokens: int, group: int) -> Blocks:
    """Tokens cut into blocks of 1, 2, 4 or 8, or more than 8 into blocks of 32, the last one padded."""
    if tokens <= FEW_TOKENS or group == _SMALL_GROUP:
        return Blocks.of(tokens)
    return Blocks(-(-tokens // _MANY), _MANY)


def digit_bytes(tokens: int, columns: int, group: int) -> int:
    """Bytes that the activations take, prepared."""
    return blocks_of(tokens, group).padded * -(-columns // group) * PIECES * group + ZEROS


def factor_count(tokens: int, columns: int, group: int) -> int:
    """Floats beside them."""
    return 2 * blocks_of(tokens, group).padded * -(-columns // group)


def digits_call(
    x: int, strides: tuple[int, int], kind: int, shape: tuple[int, int], group: int, into: tuple[int, int]
) -> Call:
    """Of common.cu: x of that shape, strides and kind (0 fp32, 1 fp16, 2 bf16) into (digits, factors)."""
    groups = -(-shape[1] // group)
    arguments = DigitsArguments(x, *strides, *into, kind, shape[1], group, shape[0], groups)
    return Call("digits", (-(-groups * group // (4 * THREADS)), blocks_of(shape[0], group).padded, 1), 0, arguments)


def mma_call(
    matrices: Sequence[MatrixArguments],
    planes: int,
    x: tuple[int, int],
    rows: Sequence[int],
    out: tuple[int, int],
    shape: tuple[int, int],
    how: tuple[int, int],
) -> Call:
    """Of mma.cu: x is (digits, factors), out (address, pitch in elements), `shape` (rows, tokens).

    `how` is (activation, multiprocessors); activation -1 adds to out. `rows`: addresses of the lists for the three
    planes and the scales; nothing for all.
    """
    (count, tokens), (activation, multiprocessors) = shape, how
    blocks, high = blocks_of(tokens, matrices[0].group), _ROWS // len(matrices)
    sharers, shared_bytes = WARPS, 4 * WARPS * _ROWS * blocks.size  # a block's warps share the parts of its rows
    if blocks.size == _MANY:
        wide = -(-count // (high * WARPS)) * blocks.count  # blocks in which each warp has rows of its own
        sharers = 1 if wide >= multiprocessors else _SHARERS
        shared_bytes *= WARPS // sharers if sharers > 1 else 1
    high *= WARPS // sharers
    grid = (blocks.count, -(-count // high), 1)
    if grid[1] > GRID_Y:
        raise UsageError(f"{count} rows in one call; cut them into calls of {GRID_Y * high}")
    arguments = MmaArguments(
        *((MatrixArguments * 2)(*matrices), *x, RowListArguments(*rows), *out),
        *(count, tokens, len(matrices), activation, sharers, 0),
    )
    return Call(f"mma_{planes}_{blocks.size}_{matrices[0].group}", grid, shared_bytes, arguments)
