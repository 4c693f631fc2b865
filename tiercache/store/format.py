"""What a unit of weights is, and what a plane store looks like on disk.

A *unit* is what moves between tiers at once: one matrix, or one feed-forward block, one plane of them, or rows of the
head. Its *pieces* say which file bytes go where in the unit's slot. Both the original checkpoint, read in place, and
the plane store are described in these two words. So tiers and readers need not know which of the two they serve.

The plane store is a folder:

    plane-0.bin plane-1.bin plane-2.bin   the bit planes, most significant first (`tiercache.quant.packing`)
    scales.bin                            fp16 pairs (lo, step) of every group; factors of columns
    dense.bin                             everything that is not quantised, in its original dtype
    catalog.mdb                           LMDB: what lies where, with checksums (`tiercache.store.catalog`)
    config.json, tokenizer files, ...     copied from the checkpoint

Within a plane file the layers follow one another, so that one layer's plane is one contiguous run. Within a layer
come the attention matrices in the model's order, then the feed-forward block. A matrix lies row by row; a row is one
output feature. A feed-forward block lies neuron by neuron: the neuron's gate row, up row and down column side by side
(for blocks without a gate: its two parts), each as one row of codes. The down matrix is therefore stored transposed,
and its groups run along the neuron's column. `scales.bin` is laid out in the same way.

A *factor* belongs to a column of a matrix: the column is divided by it before it is quantised. Factors are fp32 and lie
behind a unit's scales. First come those of the unit's inputs, where codes are calibrated. Then come those of a down
matrix's outputs, which are columns because it lies transposed.

Every matrix or block in a file is an *extent*. It MUST start at a multiple of 4096 bytes, and MUST be followed by zero
bytes up to the next extent, so that it can be read with direct I/O. The catalogue holds a SHA-256 of each
extent's stored bytes, padding left out. Extents MUST NOT overlap. With compression an extent is a run of zstd
frames, each of at most 4 MiB of plain bytes, whose lengths the catalogue lists.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

VERSION = 2
BLOCK_BYTES = 4096  # the unit of direct I/O, and the alignment of slots
FRAME_BYTES = 4 << 20  # plain bytes of one zstd frame
PLANE_FILES = ("plane-0.bin", "plane-1.bin", "plane-2.bin")
SCALE_FILE = "scales.bin"
DENSE_FILE = "dense.bin"
CATALOG_FILE = "catalog.mdb"
FILES = (*PLANE_FILES, SCALE_FILE, DENSE_FILE)


@dataclass(frozen=True)
class Piece:
    """File bytes, and the place in the slot that they go to.

    Attributes:
        path, offset, stored_bytes: where they are in which file.
        at, nbytes: where they go in the slot; `nbytes` is other than `stored_bytes` for a zstd frame.
        compressed: whether they are one zstd frame.
    """

    path: Path
    offset: int
    nbytes: int
    at: int
    stored_bytes: int
    compressed: bool = False

    @property
    def aligned(self) -> bool:
        """Whether direct reads can go straight into the slot."""
        return not self.compressed and self.at % BLOCK_BYTES == self.offset % BLOCK_BYTES


@dataclass(frozen=True)
class FileRange:
    """Bytes of a file that lie together: `nbytes` of them before compression, in elements of `itemsize` bytes.

    `frames` are the stored bytes of each zstd frame; empty where they are stored plain.
    """

    path: Path
    offset: int
    nbytes: int
    itemsize: int = 1
    frames: tuple[int, ...] = ()

    def pieces(self, at: int) -> list[Piece]:
        """The pieces that put it into a slot, from byte `at` on."""
        if not self.frames:
            return [Piece(self.path, self.offset, self.nbytes, at, self.nbytes)]
        pieces = []
        offset, left = self.offset, self.nbytes
        for stored in self.frames:
            plain = min(FRAME_BYTES, left)
            pieces.append(Piece(self.path, offset, plain, at, stored, compressed=True))
            offset, at, left = offset + stored, at + plain, left - plain
        return pieces

    def part(self, first: int, nbytes: int) -> "FileRange":
        """Its bytes [first, first + nbytes), of a range that is stored plain."""
        assert not self.frames  # frames are decompressed whole
        return replace(self, offset=self.offset + first, nbytes=nbytes)


@dataclass(frozen=True)
class Unit:
    """What moves in one piece.

    Attributes:
        name: for messages and statistics.
        nbytes: the weights' own bytes.
        slot_bytes: what its slot takes, a multiple of 4096, padding included.
    """

    name: str
    pieces: tuple[Piece, ...]
    nbytes: int
    slot_bytes: int


def align(nbytes: int) -> int:
    """`nbytes` rounded up to whole blocks."""
    return -(-nbytes // BLOCK_BYTES) * BLOCK_BYTES


def unit_of(name: str, ranges: Iterable[FileRange]) -> Unit:
    """The unit of some ranges, one after another in the slot.

    Each keeps its place within a block of the file, so direct reads need no second copy, and a tensor lies at
    the same address modulo 4096 as if the file were mapped: some matrix kernels (fp32 products of one row among
    them) round differently on data that is not aligned to 16 bytes, and the resident model of transformers is
    mapped. A tensor that its file does not align to its own element size is moved to the start of a block.
    """
    pieces: list[Piece] = []
    cursor = 0
    for part in ranges:
        at = cursor + (part.offset % BLOCK_BYTES if part.offset % part.itemsize == 0 else 0)
        pieces += part.pieces(at)
        cursor = align(at + part.nbytes)
    return Unit(name, tuple(pieces), sum(piece.nbytes for piece in pieces), cursor)
