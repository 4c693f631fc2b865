"""An existing plane store: opens it, describes its contents at a precision, and checks every byte of it.

Knows the catalogue and the files; not how weights are multiplied or where they are kept.
"""

import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tiercache.errors import StoreError, UsageError, permissions_named
from tiercache.model import meta_model
from tiercache.progress import bar
from tiercache.quant import planes as codes
from tiercache.store import catalog, layout
from tiercache.store.catalog import Contents, Extent, Record
from tiercache.store.format import (
    CATALOG_FILE,
    DENSE_FILE,
    FRAME_BYTES,
    PLANE_FILES,
    SCALE_FILE,
    VERSION,
    Piece,
    Unit,
    align,
)
from tiercache.store.header import TensorRef
from tiercache.store.manifest import Manifest, NeuronBlock, NeuronWeight, PlaneWeight, Weight, plain_unit
from tiercache.store.reader import aligned_buffer, open_for_reading

_CHECK_BYTES = 8 << 20  # read and hashed at once
DECIDING = ("config.json", "generation_config.json")  # small, and wrong ones make plausible, wrong text


@dataclass(frozen=True)
class PlaneStore:
    """A finished store.

    Attributes:
        folder: where it lies.
        config: the model's transformers configuration.
        dtype: what the model is run in.
        contents: the catalogue.
    """

    folder: Path
    config: transformers.PretrainedConfig
    dtype: torch.dtype
    contents: Contents

    @classmethod
    def open(cls, folder: str | Path) -> "PlaneStore":
        """Read the catalogue and compare it with the files.

        Raises:
            UsageError: no such folder.
            StoreError: not a finished store, of another version, damaged, or with files cut short.
        """
        path = Path(folder).expanduser()
        if not path.is_dir():
            raise UsageError(f"{path} is no folder; make a store with: tiercache convert CHECKPOINT {path}")
        contents = catalog.read(path / CATALOG_FILE)
        if contents.meta.get("units", 0) != len(contents.records):
            raise StoreError(f"{path / CATALOG_FILE} lacks records; convert the checkpoint again")
        if contents.meta.get("version") != VERSION:
            raise StoreError(
                f"{path} has format version {contents.meta.get('version')}, this tiercache reads {VERSION}; convert "
                f"the checkpoint again: tiercache convert CHECKPOINT {path}-v{VERSION}"
            )
        _check_lengths(path, contents)
        for name in DECIDING:
            if (digest := contents.meta["files"].get(name)) and not _is_file_with(path / name, digest):
                raise StoreError(f"{path / name} is not the file that the store was made with; convert again")
        config = meta_model.read_config(path)
        if config.model_type != contents.meta["model_type"]:
            raise StoreError(
                f"{path}: config.json describes {config.model_type!r}, the catalogue "
                f"{contents.meta['model_type']!r}; convert again"
            )
        return cls(path, config, getattr(torch, contents.meta["dtype"]), contents)

    def model(self) -> transformers.PreTrainedModel:
        """The model without weights, with its generation defaults."""
        return meta_model.with_defaults(self.config, self.dtype, self.folder)

    def manifest(self, precision: str, blocks: Sequence[tuple[int, int]] = (), *, cut: bool = False) -> Manifest:
        """What the model is made of when computed at `precision`; the head is always read at int8.

        Args:
            precision: of every matrix; with `blocks`, of every matrix outside of them.
            blocks: how the feed-forward blocks are cut, in their order: the planes of the first unit, and up to which
                plane each one above is a unit of its own.
            cut: each plane of every other matrix is a unit of its own, so that some may stay where others pass.

        Raises:
            StoreError: the token embedding is missing.
        """
        module, table = meta_model.embedding(self.model())
        units: list[Unit] = []
        weights: dict[str, Weight] = {}
        dense: dict[str, TensorRef] = {}
        embedding = None
        made: list[NeuronBlock] = []
        for record in self.contents.records:
            if blocks and record.parts > 1:
                some, block = self._block(len(units), len(made), record, blocks[len(made)])
                units += some
                made.append(block)
                shape = record.rows, record.columns
                for name in (*(name for name, _ in block.inward), block.outward):
                    weights[name] = NeuronWeight(block.units[0], block.layer, shape)
                continue
            if record.kind == "planes":
                count = len(codes.PLANE_BITS) if record.all_planes else codes.PRECISIONS[precision]
                some, placed = self._planes(len(units), record, count, cut=cut)
                units += some
                weights |= placed
                continue
            ref = self._dense(record)
            if record.name == table:
                unit, plain = plain_unit(len(units), table, ref)
                units.append(unit)
                embedding = (module, plain)
            else:
                dense[record.name] = ref
        if embedding is None:
            raise StoreError(f"{self.folder} lacks the token embedding {table!r}; convert again")
        return Manifest(tuple(units), weights, embedding, dense, precision, tuple(made))

    def _block(self, key: int, layer: int, record: Record, cut: tuple[int, int]) -> tuple[list[Unit], NeuronBlock]:
        """The units of a feed-forward block: its first planes with the scales, and each plane above."""
        low, top = cut
        laid = self._lay_out(
            key, record, ((*PLANE_FILES[:low], SCALE_FILE), *((name,) for name in PLANE_FILES[low:top]))
        )
        members = record.members
        group: int = self.contents.meta["group"]
        block = NeuronBlock(
            layer=layer,
            inward=tuple((member.module, member.own) for member in members[:-1]),
            outward=members[-1].module,
            neurons=record.rows,
            columns=record.columns,
            group=group,
            parts=record.parts,
            units=tuple(laid.unit_of[name] for name in PLANE_FILES[:top]),
            plane_at=tuple(laid.at[name] for name in PLANE_FILES[:top]),
            scale_at=laid.at[SCALE_FILE],
            inputs=record.inputs,
        )
        return laid.units, block

    def _lay_out(self, key: int, record: Record, groups: Sequence[Sequence[str]]) -> "_Laid":
        """Units from `key` on, each of some files' extents of a record, one behind the other."""
        laid = _Laid([], {}, {})
        for names in groups:
            pieces: list[Piece] = []
            cursor = 0
            for name in names:
                laid.unit_of[name], laid.at[name] = key + len(laid.units), cursor
                pieces += _pieces(self.folder / name, record.extents[name], cursor)
                cursor += align(record.extents[name].nbytes)
            title = record.name if len(groups) == 1 else f"{record.name}, {' and '.join(names)}"
            laid.units.append(Unit(title, tuple(pieces), sum(piece.nbytes for piece in pieces), cursor))
        return laid

    def blocks(self) -> tuple[Record, ...]:
        """The feed-forward blocks that lie neuron by neuron, in the model's order."""
        return tuple(record for record in self.contents.records if record.parts > 1)

    @property
    def digest(self) -> str:
        """Of the catalogue, and so of every byte that it lists."""
        return catalog.digest(self.folder / CATALOG_FILE)

    def _planes(self, key: int, record: Record, count: int, *, cut: bool) -> tuple[list[Unit], dict[str, Weight]]:
        """The unit of a record's first planes, or with `cut` one for each plane; the scales lie with the first."""
        names = PLANE_FILES[:count]
        low = 1 if cut else count
        laid = self._lay_out(key, record, ((*names[:low], SCALE_FILE), *((name,) for name in names[low:])))
        weights: dict[str, Weight] = {
            member.module: PlaneWeight(
                unit=key,
                rows=record.rows,
                columns=record.columns,
                group=self.contents.meta["group"],
                parts=record.parts,
                own=member.own,
                plane_at=tuple(laid.at[name] for name in names),
                scale_at=laid.at[SCALE_FILE],
                transposed=member.transposed,
                above=tuple(laid.unit_of[name] for name in names[low:]),
                inputs=record.inputs,
            )
            for member in record.members
        }
        return laid.units, weights

    def _dense(self, record: Record) -> TensorRef:
        extent = record.extents[DENSE_FILE]
        if extent.frames:
            raise StoreError(
                f"{self.folder}: {record.name!r} is compressed, which dense tensors never are; convert again"
            )
        return TensorRef(self.folder / DENSE_FILE, extent.offset, extent.nbytes, record.dtype, record.shape)

    def verify(self, *, show_progress: bool | None = None) -> "Verification":
        """Hash every extent and compare with the catalogue; also that what lies between extents is zero.

        Raises:
            StoreError: some extents differ; the message names the first and counts them.
        """
        jobs = [(name, record, extent) for record in self.contents.records for name, extent in record.extents.items()]
        total = sum(extent.stored_bytes for _, _, extent in jobs)
        bad: list[str] = []
        with ThreadPoolExecutor(2) as pool, bar(f"verifying {self.folder.name}", total, show=show_progress) as advance:
            outcomes = pool.map(lambda job: _hash_matches(self.folder / job[0], job[2]), jobs)
            for (name, record, extent), good in zip(jobs, outcomes, strict=True):
                advance(extent.stored_bytes)
                if not good:
                    bad.append(f"{record.name!r} in {name} at byte {extent.offset}")
        for name, digest in self.contents.meta["files"].items():
            if not _is_file_with(self.folder / name, digest):
                bad.append(f"the file {name}")
        if bad:
            parts = len(jobs) + len(self.contents.meta["files"])
            raise StoreError(
                f"{self.folder}: {len(bad)} of {parts} extents and files are corrupt, first {bad[0]}; "
                "check the disk and convert the checkpoint again"
            )
        return Verification(str(self.folder), len(jobs), total)

    def describe(self) -> dict[str, Any]:
        """What is in it, as plain data."""
        files: dict[str, dict[str, int]] = {}
        for record in self.contents.records:
            for name, extent in record.extents.items():
                row = files.setdefault(name, {"extents": 0, "plain_bytes": 0, "stored_bytes": 0})
                row["extents"] += 1
                row["plain_bytes"] += extent.nbytes
                row["stored_bytes"] += extent.stored_bytes
        each = (
            (r.rows * r.columns * r.parts, {n: e.nbytes for n, e in r.extents.items()}) for r in self.contents.records
        )
        manifests = {precision: self.manifest(precision) for precision in codes.PRECISIONS}
        return {
            "schema": "tiercache.inspect/1",
            "folder": str(self.folder),
            **self.contents.meta,
            "files": files,
            "bits": layout.bits(each),
            "pass_bytes": {
                precision: sum(unit.nbytes for unit in manifest.units if unit.name != _table(manifest))
                for precision, manifest in manifests.items()
            },
            "units": len(self.contents.records),
            "neurons": sum(r.rows for r in self.contents.records if r.name.endswith(" neurons")),
        }


@dataclass(frozen=True)
class _Laid:
    """Units of one record; in which unit, and from which byte of its slot, the extent of each file lies."""

    units: list[Unit]
    unit_of: dict[str, int]
    at: dict[str, int]


@dataclass(frozen=True)
class Verification:
    """A store without fault: how many extents and bytes were checked."""

    folder: str
    extents: int
    checked_bytes: int


def _table(manifest: Manifest) -> str:
    return manifest.units[manifest.embedding[1].unit].name


def _is_file_with(path: Path, digest: str) -> bool:
    with permissions_named(path):
        return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == digest


def _pieces(path: Path, extent: Extent, at: int) -> list[Piece]:
    if not extent.frames:
        return [Piece(path, extent.offset, extent.nbytes, at, extent.nbytes)]
    pieces = []
    offset, left = extent.offset, extent.nbytes
    for stored in extent.frames:
        plain = min(FRAME_BYTES, left)
        pieces.append(Piece(path, offset, plain, at, stored, compressed=True))
        offset, at, left = offset + stored, at + plain, left - plain
    return pieces


def _check_lengths(folder: Path, contents: Contents) -> None:
    """Each file is as long as its extents say: a short one is noticed before anything is loaded."""
    ends: dict[str, int] = {}
    for record in contents.records:
        for name, extent in record.extents.items():
            ends[name] = max(ends.get(name, 0), align(extent.offset + extent.stored_bytes))
            if record.kind == "dense" and math.prod(record.shape) == 0:
                raise StoreError(f"{folder}: {record.name!r} is empty; convert again")
    for name, end in ends.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else 0
        if size != end:
            raise StoreError(f"{path} has {size} bytes, the catalogue describes {end}; convert the checkpoint again")


def _hash_matches(path: Path, extent: Extent) -> bool:
    """Whether an extent's stored bytes have the catalogue's hash, and its padding is zero."""
    digest = hashlib.sha256()
    buffer = aligned_buffer(_CHECK_BYTES)
    descriptor, _ = open_for_reading(path)
    try:
        left, padding = extent.stored_bytes, align(extent.stored_bytes) - extent.stored_bytes
        offset = extent.offset
        while left > 0:
            count = os.preadv(descriptor, [buffer.data], offset)
            if count == 0:
                return False
            digest.update(buffer.data[: min(count, left)])
            if count > left and buffer[left : min(count, left + padding)].any():
                return False
            left, offset = left - count, offset + count
    except OSError as error:
        raise StoreError(f"cannot read {path} at byte {extent.offset}: {error.strerror}; check the disk") from error
    finally:
        os.close(descriptor)
    return digest.hexdigest() == extent.sha256
