"""Calls of the kernels for matrix units (mma.cu) and of what prepares their activations, as `launches` has the others.

*Bits*: a token's results depend on shapes alone, not on its company, the card's size or the grid.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from tiercache.errors import UsageError
from tiercache.kernels.cuda.launches import (
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

_ROWS = 16  # of a block


class MmaArguments(ctypes.Structure):
    """Of mma.cu."""

    _fields_ = (
        ("matrix", MatrixArguments * 2),
        *((name, ctypes.c_void_p) for name in ("digits", "factors")),
        ("rows", RowListArguments),
        ("out", ctypes.c_void_p),
        ("out_pitch", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("count", "tokens", "matrices", "activation")),
    )


class DigitsArguments(ctypes.Structure):
    """Of common.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("pitch", "stride")),
        *((name, ctypes.c_void_p) for name in ("digits", "factors")),
        *((name, ctypes.c_int) for name in ("kind", "columns", "group", "tokens", "groups")),
    )


def digit_bytes(tokens: int, columns: int, group: int) -> int:
    """Bytes that the activations take, prepared."""
    return Blocks.of(tokens).padded * -(-columns // group) * PIECES * group + ZEROS


def factor_count(tokens: int, columns: int, group: int) -> int:
    """Floats beside them."""
    return 2 * Blocks.of(tokens).padded * -(-columns // group)


def digits_call(
    x: int, strides: tuple[int, int], kind: int, shape: tuple[int, int], group: int, into: tuple[int, int]
) -> Call:
    """Of common.cu: x of that shape, strides and kind (0 fp32, 1 fp16, 2 bf16) into (digits, factors)."""
    groups = -(-shape[1] // group)
    arguments = DigitsArguments(x, *strides, *into, kind, shape[1], group, shape[0], groups)
    return Call("digits", (-(-groups * group // (4 * THREADS)), Blocks.of(shape[0]).padded, 1), 0, arguments)


def mma_call(
    matrices: Sequence[MatrixArguments],
    planes: int,
    x: tuple[int, int],
    rows: Sequence[int],
    out: tuple[int, int],
    shape: tuple[int, int],
    activation: int,
) -> Call:
    """Of mma.cu: x is (digits, factors), out (address, pitch in elements), `shape` (rows, tokens).

    `activation` -1 adds to out. `rows`: addresses of the lists for the three planes and the scales; nothing for all.
    """
    count, tokens = shape
    blocks, high = Blocks.of(tokens), _ROWS // len(matrices)
    grid = (blocks.count, -(-count // high), 1)
    if grid[1] > GRID_Y:
        raise UsageError(f"{count} rows in one call; cut them into calls of {GRID_Y * high}")
    arguments = MmaArguments(
        *((MatrixArguments * 2)(*matrices), *x, RowListArguments(*rows), *out),
        *(count, tokens, len(matrices), activation),
    )
    name = f"mma_{planes}_{blocks.size}_{matrices[0].group}"
    return Call(name, grid, 4 * WARPS * _ROWS * blocks.size, arguments)
