"""How the CUDA kernels are called: their arguments as bytes, their grids and shared memory, as pure functions.

Knows addresses and shapes; nothing of devices or drivers, so that the same calls run on a GPU and in the emulation of
the tests. The structures mirror those of `source` field by field.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tiercache.errors import UsageError
from tiercache.quant.hadamard import BLOCK
from tiercache.quant.planes import Planes

THREADS = 256
WARPS = THREADS // 32
CHUNK_COLUMNS = 1024
"""Columns of the input that a warp takes at a time."""

FEW_TOKENS = 8
"""Most tokens of one pass of the kernels that read planes; more are done in blocks of as many."""

MOST_PIECES = 16
"""Matrices of one gather."""

_BLOCK_SHARED_BYTES = 48 << 10  # of shared memory, that a block may have without asking
GRID_Y = 65535  # CUDA's limit
RowListArguments = ctypes.c_void_p * 4  # `RowLists` of planes.cuh

Address = Callable[[Tensor], int]
"""Where a kernel finds a tensor's bytes."""


@dataclass(frozen=True)
class Call:
    """One launch: the kernel's name, blocks in x, y, z, threads of a block, dynamic shared memory, its one argument."""

    kernel: str
    grid: tuple[int, int, int]
    shared_bytes: int
    arguments: ctypes.Structure
    threads: int = THREADS


class MatrixArguments(ctypes.Structure):
    """`Matrix` of planes.cuh."""

    _fields_ = (
        ("plane", ctypes.c_void_p * 3),
        ("pitch", ctypes.c_int64 * 3),
        ("scales", ctypes.c_void_p),
        ("scales_pitch", ctypes.c_int64),
        ("groups", ctypes.c_int),
        ("group", ctypes.c_int),
        ("aligned", ctypes.c_int),
        ("padding", ctypes.c_int),
    )


class RowsArguments(ctypes.Structure):
    """Of rows.cu."""

    _fields_ = (
        ("matrix", MatrixArguments * 2),
        *((name, ctypes.c_void_p) for name in ("x", "sums")),
        ("rows", RowListArguments),
        ("out", ctypes.c_void_p),
        ("out_pitch", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("count", "tokens", "matrices", "chunks", "tile_chunks", "activation")),
    )


class DecodeArguments(ctypes.Structure):
    """Of decode.cu."""

    _fields_ = (
        ("matrix", MatrixArguments),
        ("rows", RowListArguments),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int) for name in ("columns", "count")),
    )


class PrepareArguments(ctypes.Structure):
    """Of common.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("pitch", "stride")),
        *((name, ctypes.c_void_p) for name in ("out", "sums")),
        *((name, ctypes.c_int) for name in ("kind", "columns", "group", "tokens", "padded_tokens", "chunks")),
    )


class HadamardArguments(ctypes.Structure):
    """Of common.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("pitch", "stride")),
        *((name, ctypes.c_void_p) for name in ("before", "after", "out")),
        *((name, ctypes.c_int) for name in ("kind", "columns")),
    )


class GatherArguments(ctypes.Structure):
    """Of common.cu."""

    _fields_ = (
        ("piece", ctypes.c_void_p * MOST_PIECES),
        *((name, ctypes.c_int64 * MOST_PIECES) for name in ("pitch", "out_at")),
        ("width", ctypes.c_int * MOST_PIECES),
        *((name, ctypes.c_void_p) for name in ("rows", "out")),
    )


@dataclass(frozen=True)
class Blocks:
    """Tokens cut into blocks of the kernels' sizes: `size` each (1, 2, 4 or 8), the last one padded."""

    count: int
    size: int

    @staticmethod
    def of(tokens: int) -> Blocks:
        """The cut of that many tokens."""
        size = next(size for size in (1, 2, 4, FEW_TOKENS) if size >= min(tokens, FEW_TOKENS))
        return Blocks(-(-tokens // size), size)

    @property
    def padded(self) -> int:
        """Tokens with the padding."""
        return self.count * self.size


def chunks_of(columns: int) -> int:
    """Chunks of a row of x."""
    return -(-columns // CHUNK_COLUMNS)


def tile_bytes(capability: tuple[int, int]) -> int:
    """What x may take of shared memory in a block of rows.cu (before 8.0), so that a multiprocessor holds two.

    It has 96 KiB at capability 5.2 (M40), 6.1 (P40) and 7.0 (V100) and 64 KiB at others before 8.0 (T4: 7.5), by the
    CUDA programming guide's table of technical specifications. A tile has at least a chunk: 33 KiB for eight tokens, of
    which a T4 then holds one.
    """
    whole = 96 << 10 if capability in ((5, 2), (6, 1), (7, 0), (7, 2)) else 64 << 10
    return min(_BLOCK_SHARED_BYTES, whole // 2)


def matrix(planes: Planes, address: Address) -> MatrixArguments:
    """A matrix as the kernels see it."""
    if any(plane.shape[1] > 1 and plane.stride(1) != 1 for plane in planes.planes):
        raise UsageError("the bytes of a plane's row do not lie side by side; give a view with a row stride only")
    if planes.scales.stride(2) != 1 or (planes.scales.shape[1] > 1 and planes.scales.stride(1) != 2):
        raise UsageError("the scales of a row do not lie side by side; give a view with a row stride only")
    found = MatrixArguments(groups=planes.scales.shape[1], group=planes.group)
    bits = 0
    for p, plane in enumerate(planes.planes):
        found.plane[p], found.pitch[p] = at, pitch = address(plane), plane.stride(0)
        bits |= at | pitch
    found.scales, found.scales_pitch = address(planes.scales), 2 * planes.scales.stride(0)
    # Rows of whole groups keep what they begin with: a group of 32 has 12 bytes of the first plane and 4 of the second
    # (so an odd number of them is aligned to 4), a group of 64 has 24 and 8. Places within a row are then aligned, too.
    if (found.scales | found.scales_pitch) % 4 == 0:
        found.aligned = next((each for each in (16, 8, 4) if bits % each == 0), 0)
    return found


def rows_call(
    matrices: Sequence[MatrixArguments],
    planes: int,
    x: tuple[int, int],
    rows: Sequence[int],
    out: tuple[int, int],
    shape: tuple[int, int, int],
    how: tuple[int, int, int],
) -> Call:
    """Of rows.cu: x is (packed, sums), out (address, pitch in elements), `shape` (rows, tokens, columns of x).

    `how` is (activation, multiprocessors, `tile_bytes`); activation -1 adds to out. No bit depends on the other two.

    `rows`, here and below: addresses of the lists for the three planes and the scales; nothing for all rows.
    """
    (count, tokens, columns), (activation, multiprocessors, most_bytes) = shape, how
    blocks, items = Blocks.of(tokens), count * len(matrices)
    per_warp = 4 if items >= 2 * multiprocessors * WARPS * 4 else 2
    chunks = chunks_of(columns)
    chunk_bytes = blocks.size * 4 * (CHUNK_COLUMNS + CHUNK_COLUMNS // matrices[0].group)
    tile_chunks = min(chunks, max(1, most_bytes // chunk_bytes))
    grid = (blocks.count, -(-items // (WARPS * per_warp)), 1)
    if grid[1] > GRID_Y:
        raise UsageError(f"{count} rows in one call; cut them into calls of {GRID_Y * WARPS}")
    arguments = RowsArguments(
        *((MatrixArguments * 2)(*matrices), *x, RowListArguments(*rows), *out),
        *(count, tokens, len(matrices), chunks, tile_chunks, activation),
    )
    return Call(f"rows_{planes}_{blocks.size}_{per_warp}", grid, tile_chunks * chunk_bytes, arguments)


def prepare_call(
    x: int, strides: tuple[int, int], kind: int, shape: tuple[int, int], group: int, packed: tuple[int, int]
) -> Call:
    """Of common.cu: x of that shape, strides and kind (0 fp32, 1 fp16, 2 bf16) into (packed, sums)."""
    blocks, chunks = Blocks.of(shape[0]), chunks_of(shape[1])
    arguments = PrepareArguments(x, *strides, *packed, kind, shape[1], group, shape[0], blocks.size, chunks)
    return Call("prepare", (chunks, blocks.padded, 1), 4 * THREADS, arguments)


def hadamard_call(
    x: int, strides: tuple[int, int], kind: int, shape: tuple[int, int], factors: tuple[int, int], out: int
) -> Call:
    """Of common.cu: x as in `prepare_call`; factors before and after the transform, 0 for none."""
    arguments = HadamardArguments(x, *strides, *factors, out, kind, shape[1])
    return Call("hadamard", (shape[0], -(-shape[1] // BLOCK), 1), 4 * BLOCK, arguments, threads=BLOCK)


def decode_call(found: MatrixArguments, planes: int, rows: Sequence[int], shape: tuple[int, int], out: int) -> Call:
    """Of decode.cu: `shape` (rows, columns) into fp32 [rows, padded columns]."""
    count, columns = shape
    words = found.groups * found.group // 16
    arguments = DecodeArguments(found, RowListArguments(*rows), out, columns, count)
    return Call(f"decode_{planes}_0_0", (count, -(-words // THREADS), 1), 0, arguments)


def gather_call(pieces: Sequence[tuple[int, int, int]], rows: int, count: int, out: int) -> Call:
    """Of common.cu: up to 16 pieces (address, pitch, width), one after another in `out`."""
    arguments, at = GatherArguments(rows=rows, out=out), 0
    for i, (address, pitch, width) in enumerate(pieces):
        arguments.piece[i], arguments.pitch[i], arguments.width[i], arguments.out_at[i] = address, pitch, width, at
        at += width * count
    return Call("gather", (count, len(pieces), 1), 0, arguments, threads=128)
