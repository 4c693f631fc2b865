"""What a model is made of, ready to be placed: units, and how each parameter comes out of its unit's slot.

A checkpoint that is read in place, a model in memory and a plane store are all described by a `Manifest`
(`store.manifests` makes it). Whoever places and binds weights need not know which of the three it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch

from tiercache.model import meta_model
from tiercache.quant import hadamard
from tiercache.quant.planes import Planes, factor_bytes, plane_row_bytes, plane_widths, scale_row_bytes
from tiercache.store.format import FileRange, Unit, unit_of
from tiercache.store.header import DTYPES, TensorRef


@dataclass(frozen=True)
class PlainWeight:
    """A parameter that lies in the slot of `unit` as it is in the file, from byte `at` on."""

    unit: int
    at: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def units(self) -> tuple[int, ...]:
        """The one unit."""
        return (self.unit,)

    def view(self, slot: torch.Tensor) -> torch.Tensor:
        """The parameter, where it lies."""
        nbytes = self.dtype.itemsize * prod(self.shape)
        return slot[self.at : self.at + nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class Rows:
    """Rows of some matrices side by side, as planes, with their scales and factors in the first unit's slot.

    A *factor* belongs to a column: rows are divided by the columns' factors before they are quantised. The factors lie
    behind the scales, those of the inputs first, if there are any, then those of a down matrix's outputs.

    Attributes:
        rows, columns, group: of each matrix, as stored.
        parts: how many matrices lie side by side in a row of the unit (3 in a gated feed-forward block).
        plane_units: the unit in which each plane lies; as many as the precision has.
        plane_at: first byte of each plane in its unit's slot.
        scale_at: first byte of the scales, which lie in the first plane's unit.
        inputs: what distinguishes the factors of its inputs from others; "" where they have none.
    """

    rows: int
    columns: int
    group: int
    parts: int
    plane_units: tuple[int, ...]
    plane_at: tuple[int, ...]
    scale_at: int
    inputs: str = field(default="", kw_only=True)

    @property
    def unit(self) -> int:
        """The unit of the first plane."""
        return self.plane_units[0]

    def input_factors(self, slot: torch.Tensor) -> torch.Tensor | None:
        """What the inputs of rows along them are multiplied by, fp32 [columns]; None for ones."""
        return self._factors(slot, 0) if self.inputs else None

    def output_factors(self, slot: torch.Tensor) -> torch.Tensor:
        """What the outputs of the last part, a down matrix, are multiplied by, fp32 [columns]."""
        return self._factors(slot, 1 if self.inputs else 0)

    def _factors(self, slot: torch.Tensor, place: int) -> torch.Tensor:
        scales_end = self.scale_at + self.rows * self.parts * scale_row_bytes(self.columns, self.group)
        at = scales_end + place * factor_bytes(self.columns)
        return slot[at : at + factor_bytes(self.columns)].view(torch.float32)

    def _rows(self, slot: torch.Tensor, at: int, width: int) -> torch.Tensor:
        """Rows of `width` bytes from byte `at` of a slot on: [rows, parts, width]."""
        return slot[at : at + self.rows * self.parts * width].view(self.rows, self.parts, width)


@dataclass(frozen=True)
class PlaneWeight(Rows):
    """A parameter that is a sum of planes.

    Attributes:
        own: which of the matrices, in order, make up this parameter (two for a fused gate and up).
        transposed: the parameter is the transpose of what is stored.
    """

    own: tuple[int, ...]
    transposed: bool

    @property
    def units(self) -> tuple[int, ...]:
        """Its units, that of the first plane first."""
        return tuple(dict.fromkeys(self.plane_units))

    @property
    def shape(self) -> tuple[int, int]:
        """Of the parameter."""
        rows = self.rows * len(self.own)
        return (self.columns, rows) if self.transposed else (rows, self.columns)

    def decode_into(self, slot: torch.Tensor, out: torch.Tensor, above: Sequence[torch.Tensor] = ()) -> None:
        """Write the parameter, at the precision that the slots hold (see `part`), into `out` of its shape."""
        stored = out.T if self.transposed else out  # [rows * own, columns]
        for place, part in enumerate(self.own):
            target = stored[place * self.rows : (place + 1) * self.rows]
            down = 1 < self.parts == part + 1
            factors = self.output_factors(slot) if down else self.input_factors(slot)
            hadamard.restored(self.part(slot, part, above), factors, target)

    def part(self, slot: torch.Tensor, part: int, above: Sequence[torch.Tensor] = ()) -> Planes:
        """The planes of one of the unit's matrices, where they lie: rows as `hadamard.stored` says.

        Args:
            slot: of `unit`.
            part: which of the matrices.
            above: slots of the units behind the first; planes without a slot are left out.
        """
        units, slots = self.units, (slot, *above)
        cut = []
        for plane, (unit, at) in enumerate(zip(self.plane_units, self.plane_at, strict=True)):
            place = units.index(unit)
            if place < len(slots):
                width = plane_row_bytes(self.columns, self.group, plane)
                cut.append(self._rows(slots[place], at, width)[:, part])
        width = scale_row_bytes(self.columns, self.group)
        scales = self._rows(slot, self.scale_at, width)[:, part].view(torch.float16).reshape(self.rows, -1, 2)
        return Planes(tuple(cut), scales, self.columns, self.group)


@dataclass(frozen=True)
class NeuronBlock(Rows):
    """A feed-forward block whose neurons are given planes one by one; a row of each part is a neuron's.

    Attributes:
        layer: its place among the blocks.
        inward: module names of the matrices that inputs are multiplied by, each with its places among the parts.
        outward: module name of the matrix whose columns are the neurons'; the last part.
    """

    layer: int
    inward: tuple[tuple[str, tuple[int, ...]], ...]
    outward: str

    @property
    def neurons(self) -> int:
        """How many it has."""
        return self.rows

    @property
    def units(self) -> tuple[int, ...]:
        """The unit in which each plane lies."""
        return self.plane_units

    @property
    def low(self) -> int:
        """Planes that lie in the first unit."""
        return self.units.count(self.units[0])

    @property
    def widths(self) -> tuple[int, ...]:
        """Bytes of a row in each plane."""
        return plane_widths(self.columns, self.group, len(self.units))

    def plane(self, slot: torch.Tensor, plane: int) -> torch.Tensor:
        """Plane `plane` in its unit's slot: [neurons, parts, bytes of a row]."""
        return self._rows(slot, self.plane_at[plane], self.widths[plane])

    def scales(self, slot: torch.Tensor) -> torch.Tensor:
        """The scales in the first unit's slot: bytes [neurons, parts, bytes of a row's scales]."""
        return self._rows(slot, self.scale_at, scale_row_bytes(self.columns, self.group))

    @property
    def factor_bytes(self) -> int:
        """Of both."""
        return factor_bytes(self.columns) * (2 if self.inputs else 1)


@dataclass(frozen=True)
class NeuronWeight:
    """A parameter whose rows (of a down matrix: columns) are neurons of the block at place `block` in the manifest.

    Every pass needs `unit`, the block's first.
    """

    unit: int
    block: int
    shape: tuple[int, ...]

    @property
    def units(self) -> tuple[int, ...]:
        """The first unit alone."""
        return (self.unit,)


@dataclass(frozen=True)
class RowBlocks:
    """A parameter of many rows, cut into blocks of rows that are units of their own: first rows first.

    A row's products need no other row: by kernels that read planes as they are its bits are those of the whole matrix.
    """

    blocks: tuple[PlaneWeight, ...]

    @property
    def unit(self) -> int:
        """The first block's."""
        return self.blocks[0].unit

    @property
    def units(self) -> tuple[int, ...]:
        """All blocks', in their order."""
        return tuple(unit for block in self.blocks for unit in block.units)

    @property
    def shape(self) -> tuple[int, int]:
        """Of the parameter."""
        return sum(block.shape[0] for block in self.blocks), self.blocks[0].shape[1]


Weight = PlainWeight | PlaneWeight | NeuronWeight | RowBlocks


def in_turn(weight: Weight) -> Sequence[PlainWeight | PlaneWeight | NeuronWeight]:
    """What of a weight a module multiplies by in turn: its blocks of rows, or all of it at once."""
    return weight.blocks if isinstance(weight, RowBlocks) else (weight,)


@dataclass(frozen=True)
class Manifest:
    """A model's parts.

    Attributes:
        units: what is placed in tiers; a unit's index is its key.
        weights: what each linear module multiplies by, by module name.
        embedding: module name and weight of the token embedding, which can also be read row by row from its file.
        dense: parameters kept in the computing device's memory for good (norms, biases, position tables), by name.
        precision: "source", or the precision.
        blocks: feed-forward blocks that are served neuron by neuron; none in the exact modes.
    """

    units: tuple[Unit, ...]
    weights: dict[str, Weight]
    embedding: tuple[str, PlainWeight]
    dense: dict[str, TensorRef]
    precision: str = "source"
    blocks: tuple[NeuronBlock, ...] = ()

    @property
    def head(self) -> Weight | None:
        """The language-model head's weight: the one that lies in no layer; None where the model has no head."""
        return next((weight for name, weight in self.weights.items() if meta_model.layer_of(name) is None), None)


def plain_unit(key: int, name: str, ref: TensorRef) -> tuple[Unit, PlainWeight]:
    """A unit of one tensor as it lies in its file."""
    dtype = DTYPES[ref.dtype]
    unit = unit_of(name, [FileRange(ref.path, ref.offset, ref.nbytes, dtype.itemsize)])
    return unit, PlainWeight(key, unit.pieces[0].at, dtype, ref.shape)
