"""Which units a plane store will have, and exactly how many bytes they take, before any is written.

The model without weights is enough to tell. The units are the matrices in the model's order, layer by layer, each
feed-forward block bundled by neuron. Then comes the head, then every tensor that is kept as it is.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from tiercache.model import meta_model
from tiercache.model.meta_model import Ffn, Matrix
from tiercache.quant.planes import PRECISIONS, factor_bytes, plane_widths, scale_row_bytes
from tiercache.store.catalog import Member
from tiercache.store.checkpoint import Checkpoint
from tiercache.store.format import DENSE_FILE, PLANE_FILES, SCALE_FILE


@dataclass(frozen=True)
class Part:
    """One matrix of a unit: rows [first, first + rows) of a parameter, seen as [outputs, inputs] or transposed."""

    parameter: str
    first: int
    transposed: bool


@dataclass(frozen=True)
class UnitPlan:
    """One unit to be written.

    Attributes:
        layer: its decoder layer; None for the head and dense tensors.
        rows, columns: of each part as stored; 0 for a dense tensor.
        parts: the matrices that lie side by side in each row; for a dense tensor the one that holds it.
        members: the modules that multiply by them.
        sizes: plain bytes in each file.
        scaled: its inputs have scales.
    """

    name: str
    layer: int | None
    rows: int
    columns: int
    parts: tuple[Part, ...]
    members: tuple[Member, ...]
    sizes: dict[str, int]
    scaled: bool = False

    @property
    def weights(self) -> int:
        """How many weights are quantised."""
        return self.rows * self.columns * len(self.parts)

    @property
    def dense(self) -> bool:
        """Whether it is one tensor, kept as it is."""
        return self.rows == 0


def plan(checkpoint: Checkpoint, group: int, *, scaled: bool = False) -> list[UnitPlan]:
    """Every unit, in the order in which it will lie in the files; `scaled`: inputs of the layers' units have scales."""
    model = checkpoint.model()
    found = meta_model.matrices(model)
    blocks = {block.outward.module: block for block in meta_model.ffns(found)}
    inward = {matrix.module for block in blocks.values() for matrix in block.inward}
    units: dict[int | None, list[UnitPlan]] = {}
    for matrix in found:
        if matrix.module in inward:
            continue
        block = blocks.get(matrix.module)
        parts, members = _of_matrix(matrix) if block is None else _of_block(block)
        rows, columns = (matrix.rows, matrix.columns) if block is None else (block.neurons, matrix.rows)
        name = matrix.module if block is None else f"{matrix.module.rpartition('.')[0]} neurons"
        unit = UnitPlan(name, matrix.layer, rows, columns, parts, members, {}, scaled and matrix.layer is not None)
        units.setdefault(matrix.layer, []).append(replace(unit, sizes=_sizes(unit, group)))
    head = units.pop(None, [])
    ordered = [unit for layer in sorted(units, key=lambda n: n or 0) for unit in units[layer]] + head
    quantised = {matrix.name for matrix in found}
    _, table = meta_model.embedding(model)
    kept = [name for name in checkpoint.tensors if name not in quantised or name == table]
    return ordered + [_dense(name, checkpoint.tensors[name].nbytes) for name in kept]


def bits(units: Iterable[tuple[int, Mapping[str, int]]]) -> dict[str, float]:
    """Bits a weight at each precision, scales and factors included, padding not.

    `units` are each its weights, and its bytes in each file; what is not quantised has none in the planes' files.
    """
    coded = [(weights, sizes) for weights, sizes in units if PLANE_FILES[0] in sizes]
    weights = sum(count for count, _ in coded)
    files = {precision: (*PLANE_FILES[:planes], SCALE_FILE) for precision, planes in PRECISIONS.items()}
    taken = {precision: sum(sizes[name] for _, sizes in coded for name in some) for precision, some in files.items()}
    return {precision: 8 * nbytes / weights for precision, nbytes in taken.items()}


def _of_matrix(matrix: Matrix) -> tuple[tuple[Part, ...], tuple[Member, ...]]:
    return (Part(matrix.name, 0, matrix.transposed),), (Member(matrix.module, (0,), matrix.transposed),)


def _of_block(block: Ffn) -> tuple[tuple[Part, ...], tuple[Member, ...]]:
    """Gate row, up row and down column of each neuron side by side; the down matrix is stored transposed."""
    parts: list[Part] = []
    members: list[Member] = []
    for matrix in block.inward:
        halves = range(2 if block.fused else 1)
        own = tuple(len(parts) + half for half in halves)
        parts += [Part(matrix.name, half * block.neurons, matrix.transposed) for half in halves]
        members.append(Member(matrix.module, own, matrix.transposed))
    outward = block.outward
    members.append(Member(outward.module, (len(parts),), not outward.transposed))
    parts.append(Part(outward.name, 0, not outward.transposed))
    return tuple(parts), tuple(members)


def _dense(name: str, nbytes: int) -> UnitPlan:
    return UnitPlan(name, None, 0, 0, (Part(name, 0, False),), (), {DENSE_FILE: nbytes})


def _sizes(unit: UnitPlan, group: int) -> dict[str, int]:
    """Bytes of the unit's codes, scales and factors in each file."""
    widths = (*plane_widths(unit.columns, group), scale_row_bytes(unit.columns, group))
    count = unit.rows * len(unit.parts)
    sizes = {name: count * width for name, width in zip((*PLANE_FILES, SCALE_FILE), widths, strict=True)}
    sizes[SCALE_FILE] += (unit.scaled + (len(unit.parts) > 1)) * factor_bytes(unit.columns)
    return sizes
