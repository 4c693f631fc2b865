"""Calls of the kernels for sums across the rows (down.cu, downs.cu or downmma.cu, then `sum` of common.cu).

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
_UNIT_ROWS = 64  # that downmma.cu adds up as whole numbers
_UNIT_BLOCKS = 3  # of a multiprocessor, at once
_UNIT_TOKENS = (8, 16)  # of a block
_MOST_MULTIPROCESSORS = 192  # of any card that there is


class DownArguments(ctypes.Structure):
    """Of down.cu, downs.cu and downmma.cu."""

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
    """How rows are cut: into `count` slices of `size`, each walked by `classes` lines of `wide` threads.

    Without lines they are for downmma.cu.
    """

    count: int
    size: int
    wide: int = 0
    classes: int = 0

    @staticmethod
    def of(rows: int, group: int, groups: int, multiprocessors: int, by_matrix_units: bool) -> Slices:
        """As many slices as blocks of one token or a few are on the card at once, yet of some rows each."""
        if by_matrix_units:
            wanted = _UNIT_BLOCKS * multiprocessors // -(-groups // _strip_groups(group))
            pieces = -(-rows // _UNIT_ROWS)
            size = _UNIT_ROWS * -(-max(1, pieces) // max(1, min(wanted, pieces)))
            return Slices(-(-rows // size), size)
        units = groups * -(-(group // 16) // _MOST_WORDS)
        wide = min(units, LINE_THREADS)
        classes, strips = min(LINE_THREADS // wide, _X_ROWS), -(-units // wide)
        wanted = min(-(-multiprocessors // strips), -(-rows // (_LEAST_ROWS * classes)))
        size = max(1, -(-rows // max(1, wanted)))
        return Slices(-(-rows // size), size, wide, classes)

    @property
    def by_matrix_units(self) -> bool:
        """Whether they are for downmma.cu."""
        return not self.classes

    def padded(self, tokens: int) -> int:
        """Tokens that `partial` has room for."""
        size = 1 if self.by_matrix_units else _block(tokens)
        return -(-tokens // size) * size

    def merged(self, tokens: int, group: int, groups: int, multiprocessors: int) -> int:
        """Slices that a block adds up itself: those of an eighth, if blocks are enough then. No bit depends on it.

        Without it the sums of all slices go to memory and come back.
        """
        eighth = max(1, -(-self.count // _EIGHTHS))
        if self.by_matrix_units:
            across, size = -(-groups // _strip_groups(group)), _unit_block(tokens)
        else:
            size = _block(tokens)
            across = _strips(groups * (group // 16), size)
            if size not in _MANY:
                return 1
        return eighth if across * -(-self.count // eighth) * -(-tokens // size) >= multiprocessors else 1


def most_partial_bytes(rows: int, columns: int, group: int, tokens: int, *, far: bool) -> int:
    """What sums of slices take where matrix units multiply so many tokens.

    `Slices.merged` leaves up to 9 MiB more where blocks are few; the plan's reserve beside this holds them.

    `far`: planes may lie across the link, where tiles of them leave each slice its own sum.
    """
    groups = -(-columns // group)
    slices = _UNIT_BLOCKS * _MOST_MULTIPROCESSORS // -(-groups // _strip_groups(group)) if far else 0
    return 4 * tokens * groups * group * min(-(-rows // _UNIT_ROWS), max(_EIGHTHS, slices))


def _strip_groups(group: int) -> int:
    """Groups of a strip of downmma.cu: four warps have 64 columns each, or one group."""
    return 4 * min(64, group) // group


def _unit_block(tokens: int) -> int:
    return _UNIT_TOKENS[tokens > _UNIT_TOKENS[0]]


def _block(tokens: int) -> int:
    """Tokens of a block: the most that it holds, or what multiplies and decodes least in all."""
    if tokens <= _FEW[-1]:
        return next(size for size in _FEW if size >= tokens)
    return min(_MANY, key=lambda size: -(-tokens // size) * (size + _DECODING))


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
    """Of one of the three: `count` rows, whole slices of them, into `partial`.

    It is [slices, padded tokens, padded columns], or has a sum of `merged` slices (`Slices.merged`) for each as many.

    `rows`: addresses of the lists for the three planes and the scales; nothing for all rows.
    """
    padded, most = slices.padded(x.tokens), _X_ROWS // max(1, slices.classes) * slices.classes
    arguments = DownArguments(
        *(found, x.address, *x.strides, RowListArguments(*rows), partial),
        *(x.kind, x.block.bit_length() - 1, x.tokens, padded),
        *(count, slices.size, slices.wide, slices.classes, merged, most),
    )
    words, parts = found.groups * (found.group // 16), -(-count // slices.size)
    if slices.by_matrix_units:
        return _unit_call(arguments, planes, -(-parts // merged))
    block = _block(x.tokens)
    if block in _MANY:
        grid = (_strips(words, block), -(-parts // merged), padded // block)
        name = f"downs_{planes}_{block}_{found.group}"
        return Call(name, grid, _tile_bytes(block, found.group), arguments, threads=_TILE_THREADS)
    units = words // min(_MOST_WORDS // block, found.group // 16)
    shared_bytes = max(slices.classes * slices.wide * 64, _X_ROWS * (_ROW_BYTES + 4 * block))
    grid = (-(-units // slices.wide), parts, padded // block)
    return Call(f"down_{planes}_{block}_{found.group}", grid, shared_bytes, arguments, threads=LINE_THREADS)


def _unit_call(arguments: DownArguments, planes: int, parts: int) -> Call:
    """Of downmma.cu: blocks of tokens first, so that those that want the same weights come one after another."""
    tokens, group = arguments.tokens, arguments.matrix.group
    block = _unit_block(tokens)
    pieces = ((4, 5, 9) if group == 32 else (7, 9, 17))[planes - 1]  # of 16 bytes of a row, with scales: `Strip`
    grid = (-(-tokens // block), -(-arguments.matrix.groups // _strip_groups(group)), parts)
    shared_bytes = 2 * _UNIT_ROWS * (16 * pieces + 4 * block)
    return Call(f"downmma_{planes}_{block // 8}_{group}", grid, shared_bytes, arguments, threads=128)


def _tile_bytes(tokens: int, group: int) -> int:
    """Shared memory of downs.cu: `Tile`."""
    units, rows = _TILE_SUMS // 4 // tokens, 8 if tokens < 32 else 16
    pairs = max(1, units // (group // 16)) * tokens
    return rows * (64 * units + 8 * pairs) + 16 * 8 * _TILE_THREADS


def sum_call(partial: int, out: tuple[int, int], tokens: int, columns: int, shape: tuple[int, int, int]) -> Call:
    """Of common.cu: adds the slices of `partial` of a shape; out [tokens, columns] is (address, pitch in elements)."""
    arguments = SumArguments(partial, *out, *shape, columns)
    return Call("sum", (-(-columns // _SUM_COLUMNS), tokens, 1), 4 * 256, arguments)
