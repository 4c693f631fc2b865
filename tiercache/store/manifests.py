"""Makes manifests: of a checkpoint in place, of a model in memory, and of a plane store at a precision."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from tiercache.errors import StoreError, UsageError
from tiercache.model import meta_model
from tiercache.quant.planes import PLANE_BITS, PRECISIONS, plane_widths, scale_row_bytes
from tiercache.store.catalog import Contents, UnitRecord
from tiercache.store.checkpoint import Checkpoint
from tiercache.store.format import DENSE_FILE, PLANE_FILES, SCALE_FILE, FileRange, Unit, align, unit_of
from tiercache.store.header import TensorRef
from tiercache.store.manifest import (
    Manifest,
    NeuronBlock,
    NeuronWeight,
    PlainWeight,
    PlaneWeight,
    RowBlocks,
    Rows,
    Weight,
    plain_unit,
)
from tiercache.tiers.device import on_host

ROW_BLOCK_BYTES = 32 << 20
"""The head goes in blocks of rows of about this size, or of a layer's largest unit, whichever is more, so that the
smallest budget is a layer's. Reading as much takes a millisecond from anywhere; a block's call is little beside it."""
_BLOCK_ROWS = 1024  # a block has a multiple of it, so that its rows are as aligned as the whole matrix's
_ALIGNMENT = 64  # parameters keep their place within a cache line, so that kernels round as they did


def checkpoint_manifest(checkpoint: Checkpoint, model: transformers.PreTrainedModel | None = None) -> Manifest:
    """The checkpoint in place: one unit per matrix, one for the token embedding, everything else dense.

    `model` is one that `checkpoint.model` gave, where the caller has it; to build one takes a while.
    """
    refs = checkpoint.refs()
    made = _manifest(model or checkpoint.model(), lambda key, name: plain_unit(key, name, refs[name]))
    names = {unit.name for unit in made.units}
    return replace(made, dense={name: ref for name, ref in refs.items() if name not in names})


def check_in_memory(model: transformers.PreTrainedModel) -> None:
    """Refuse models whose parameters are not plain tensors in main memory, and mixtures of experts.

    Raises UsageError for a model that is offloaded already, by tiercache or by accelerate, or has parameters elsewhere.
    """
    if hasattr(model, "tiercache"):
        raise UsageError("this model is offloaded already; leave that context before opening it again")
    if getattr(model, "hf_device_map", None) or any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UsageError(
            "accelerate holds this model's weights (device_map); load it without device_map, or give its path"
        )
    for name, parameter in model.named_parameters():
        if not on_host(parameter.device) or not parameter.is_contiguous():
            raise UsageError(
                f"{name} lies on {parameter.device} or in a strided view; give a model in main memory, or its path"
            )
    meta_model.refuse_experts(model.config)


def memory_manifest(model: transformers.PreTrainedModel) -> tuple[Manifest, list[torch.Tensor]]:
    """The parts of a model in memory, and each unit's bytes, which are the parameters' own: no budget counts them."""
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}

    def unit(key: int, name: str) -> tuple[Unit, PlainWeight]:
        data = parameters[name]
        at = data.data_ptr() % _ALIGNMENT
        return Unit(name, (), data.nbytes, align(at + data.nbytes)), PlainWeight(key, at, data.dtype, tuple(data.shape))

    made = _manifest(model, unit)
    return made, [parameters[unit.name].view(-1).view(torch.uint8) for unit in made.units]


def _manifest(model: transformers.PreTrainedModel, unit: Callable[[int, str], tuple[Unit, PlainWeight]]) -> Manifest:
    """Each matrix and the token embedding as one unit, which `unit` makes of its key and the parameter's name."""
    units: list[Unit] = []
    placed: dict[str, PlainWeight] = {}

    def place(name: str) -> PlainWeight:
        if name not in placed:  # a tied head shares the embedding's unit
            made, placed[name] = unit(len(units), name)
            units.append(made)
        return placed[name]

    weights: dict[str, Weight] = {matrix.module: place(matrix.name) for matrix in meta_model.matrices(model)}
    module, table = meta_model.embedding(model)
    embedding = module, place(table)
    return Manifest(tuple(units), weights, embedding, {})


def store_manifest(
    folder: Path,
    contents: Contents,
    embedding: tuple[str, str],
    precision: str,
    blocks: Sequence[tuple[int, int]] = (),
    *,
    cut: bool = False,
    by_rows: bool = False,
) -> Manifest:
    """A plane store at a precision, see `PlaneStore.manifest`.

    `embedding` is the module and the parameter's name of the token embedding.
    """
    module, table = embedding
    group: int = contents.meta["group"]
    units: list[Unit] = []
    weights: dict[str, Weight] = {}
    made: list[NeuronBlock] = []
    plain: PlainWeight | None = None
    dense: dict[str, TensorRef] = {}
    block_bytes = _row_block_bytes(contents.records, precision)
    for record in contents.records:
        if record.kind != "planes":
            dense[record.name] = _tensor(folder, record)
            if record.name == table:
                unit, plain = plain_unit(len(units), table, dense.pop(table))
                units.append(unit)
        elif blocks and record.parts > 1:
            placed, rows = _place(folder, record, group, len(units), *blocks[len(made)])
            units += placed
            *inward, outward = record.members
            each = tuple((member.module, member.own) for member in inward)
            made.append(NeuronBlock(**vars(rows), layer=len(made), inward=each, outward=outward.module))
            weight = NeuronWeight(rows.unit, made[-1].layer, (record.rows, record.columns))
            weights |= {member.module: weight for member in record.members}
        else:
            top = _planes(record, precision)
            pieces = _row_ranges(record, block_bytes) if by_rows and record.all_planes else [range(record.rows)]
            cuts: list[Rows] = []
            for piece in pieces:
                placed, rows = _place(folder, record, group, len(units), 1 if cut else top, top, piece)
                units += placed
                cuts.append(rows)
            for member in record.members:
                made_of = [PlaneWeight(**vars(rows), own=member.own, transposed=member.transposed) for rows in cuts]
                weights[member.module] = made_of[0] if len(made_of) == 1 else RowBlocks(tuple(made_of))
    if plain is None:
        raise StoreError(f"{folder} lacks the token embedding {table!r}; convert again")
    return Manifest(tuple(units), weights, (module, plain), dense, precision, tuple(made))


def _place(
    folder: Path, record: UnitRecord, group: int, key: int, low: int, top: int, some: range | None = None
) -> tuple[list[Unit], Rows]:
    """Units from `key` on: the first `low` planes with the scales, and each plane above, below `top`, by itself.

    `some`: of these rows alone.
    """
    some = some or range(record.rows)
    cuts = [(*PLANE_FILES[:low], SCALE_FILE), *((name,) for name in PLANE_FILES[low:top])]
    units: list[Unit] = []
    where: dict[str, tuple[int, int]] = {}
    for names in cuts:
        title = record.name if len(some) == record.rows else f"{record.name}, rows {some[0]} to {some[-1]}"
        title = title if len(cuts) == 1 else f"{title}, {' and '.join(names)}"
        unit = unit_of(title, [_range(folder, record, group, name, some) for name in names])
        where |= {piece.path.name: (key + len(units), piece.at) for piece in reversed(unit.pieces)}
        units.append(unit)
    plane_units, plane_at = zip(*(where[name] for name in PLANE_FILES[:top]), strict=True)
    shape = len(some), record.columns, group, record.parts
    return units, Rows(*shape, plane_units, plane_at, where[SCALE_FILE][1], inputs=record.inputs)


def _range(folder: Path, record: UnitRecord, group: int, name: str, some: range) -> FileRange:
    """Where rows of a unit lie in one of its files; factors come with all rows."""
    extent = record.extents[name]
    whole = FileRange(folder / name, extent.offset, extent.nbytes, frames=extent.frames)
    if len(some) == record.rows:
        return whole
    widths = (*plane_widths(record.columns, group), scale_row_bytes(record.columns, group))
    width = record.parts * dict(zip((*PLANE_FILES, SCALE_FILE), widths, strict=True))[name]
    return whole.part(some.start * width, len(some) * width)


def _planes(record: UnitRecord, precision: str) -> int:
    """How many planes a unit is read with."""
    return len(PLANE_BITS) if record.all_planes else PRECISIONS[precision]


def _bytes(record: UnitRecord, precision: str) -> int:
    """What a unit of planes takes at a precision."""
    return sum(record.extents[name].nbytes for name in (*PLANE_FILES[: _planes(record, precision)], SCALE_FILE))


def _row_block_bytes(records: Sequence[UnitRecord], precision: str) -> int:
    """How large a block of rows may be, see `ROW_BLOCK_BYTES`."""
    layers = (_bytes(record, precision) for record in records if record.kind == "planes" and not record.all_planes)
    return max(ROW_BLOCK_BYTES, *layers)


def _row_ranges(record: UnitRecord, block_bytes: int) -> list[range]:
    """The rows of a unit in blocks of about the same size.

    One if it is no larger, if its rows are not its outputs, or if it is compressed: frames would be read twice.
    """
    alone = record.parts == 1 and not record.inputs and not any(member.transposed for member in record.members)
    alone = alone and not any(extent.frames for extent in record.extents.values())
    count = -(-sum(extent.nbytes for extent in record.extents.values()) // block_bytes) if alone else 1
    step = -(-record.rows // count // _BLOCK_ROWS) * _BLOCK_ROWS if count > 1 else record.rows
    return [range(at, min(at + step, record.rows)) for at in range(0, record.rows, step)]


def _tensor(folder: Path, record: UnitRecord) -> TensorRef:
    """The dense tensor of a record."""
    extent = record.extents[DENSE_FILE]
    if extent.frames:
        raise StoreError(f"{folder}: {record.name!r} is compressed, which dense tensors never are; convert again")
    return TensorRef(folder / DENSE_FILE, extent.offset, extent.nbytes, record.dtype, record.shape)
