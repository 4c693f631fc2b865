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
from tiercache.quant.planes import PRECISIONS
from tiercache.store import catalog, layout
from tiercache.store.catalog import Contents, Extent, UnitRecord
from tiercache.store.format import CATALOG_FILE, VERSION, align
from tiercache.store.manifest import Manifest
from tiercache.store.manifests import store_manifest
from tiercache.store.reader import aligned_buffer, open_for_reading

_CHECK_BYTES = 8 << 20  # read and hashed at once
DECIDING = ("config.json", "generation_config.json")  # small, and wrong ones make plausible, wrong text


@dataclass(frozen=True)
class PlaneStore:
    """A finished store, as docs/store-format.md describes it. `PlaneStore.open(folder)` gives one.

    Attributes:
        folder: where it lies.
        config: the model's configuration.
        dtype: of the checkpoint's weights, and of activations.
        contents: the catalogue: what lies where, with checksums.
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
            EnvironmentUnsupportedError: it may not be read.
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
        """The model without weights (all parameters on the meta device), with its generation defaults."""
        return meta_model.with_defaults(self.config, self.dtype, self.folder)

    def manifest(
        self,
        precision: str,
        blocks: Sequence[tuple[int, int]] = (),
        *,
        cut: bool = False,
        by_rows: bool = False,
        model: transformers.PreTrainedModel | None = None,
    ) -> Manifest:
        """What the model is made of when computed at `precision`; the head is always read at int8.

        Args:
            precision: of every matrix; with `blocks`, of every matrix outside of them.
            blocks: how the feed-forward blocks are cut, in their order: the planes of the first unit, and up to which
                plane each one above is a unit of its own.
            cut: each plane of every other matrix is a unit of its own, so that some may stay where others pass.
            by_rows: a head larger than a layer's units is cut into blocks of rows (`RowBlocks`), for kernels that
                multiply by planes.
            model: one that `model` gave, where the caller has it; to build one takes a while.
        """
        embedding = meta_model.embedding(self.model() if model is None else model)
        return store_manifest(self.folder, self.contents, embedding, precision, blocks, cut=cut, by_rows=by_rows)

    def blocks(self) -> tuple[UnitRecord, ...]:
        """The feed-forward blocks that lie neuron by neuron, in the model's order; one neuron is a row of each part."""
        return tuple(record for record in self.contents.records if record.parts > 1)

    @property
    def digest(self) -> str:
        """SHA-256 of the catalogue, in hex, and so of every byte that it lists."""
        return catalog.digest(self.folder / CATALOG_FILE)

    def verify(self, *, show_progress: bool | None = None) -> "Verification":
        """Hash every extent and compare with the catalogue; also that what lies between extents is zero.

        Args:
            show_progress: draw a bar on standard error; None means where that is a terminal.

        Returns:
            How many extents and bytes were checked.

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
        files = self.contents.meta["files"]
        bad += [f"the file {name}" for name, digest in files.items() if not _is_file_with(self.folder / name, digest)]
        if bad:
            raise StoreError(
                f"{self.folder}: {len(bad)} of {len(jobs) + len(files)} extents and files are corrupt, first {bad[0]}; "
                "check the disk and convert the checkpoint again"
            )
        return Verification(str(self.folder), len(jobs), total)

    def describe(self) -> dict[str, Any]:
        """What is in it, as plain data: bytes of each file, bits a weight and bytes a pass at each precision."""
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
        return {
            "schema": "tiercache.inspect/1",
            "folder": str(self.folder),
            **self.contents.meta,
            "files": files,
            "bits": layout.bits(each),
            "pass_bytes": {precision: _pass_bytes(self.manifest(precision)) for precision in PRECISIONS},
            "units": len(self.contents.records),
            "neurons": sum(r.rows for r in self.contents.records if r.name.endswith(" neurons")),
        }


@dataclass(frozen=True)
class Verification:
    """A store without fault: how many extents and bytes were checked."""

    folder: str
    extents: int
    checked_bytes: int


def _pass_bytes(manifest: Manifest) -> int:
    """Bytes of all units but the token embedding."""
    table = manifest.embedding[1].unit
    return sum(unit.nbytes for key, unit in enumerate(manifest.units) if key != table)


def _is_file_with(path: Path, digest: str) -> bool:
    with permissions_named(path):
        return path.is_file() and catalog.digest(path) == digest


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
