"""Writes the files of a plane store: extents one behind the other, hashed, and compressed where that is asked for.

Knows units and bytes; not where the bytes come from, nor when a store is complete.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import zstandard

from tiercache.errors import StoreError
from tiercache.store.catalog import Extent, UnitRecord
from tiercache.store.format import FILES, FRAME_BYTES, align
from tiercache.store.layout import UnitPlan
from tiercache.store.reader import Buffer, StoredTensor

Compression = dict[str, dict[str, float | bool]]
"""By file name: what zstd saves and costs, and whether it is used."""

_LEVEL = 3


class Writer:
    """Appends units to the store's files behind those that the journal lists; what lies beyond is overwritten."""

    def __init__(self, folder: Path, records: list[UnitRecord], compression: Compression) -> None:
        self._used = {name for name, row in compression.items() if row["used"]}
        self._end = dict.fromkeys(FILES, 0)
        for record in records:
            for name, extent in record.extents.items():
                self._end[name] = max(self._end[name], extent.offset + extent.stored_bytes)
        self._files = {name: os.open(folder / name, os.O_RDWR | os.O_CREAT, 0o644) for name in FILES}
        for name, descriptor in self._files.items():
            if os.fstat(descriptor).st_size < align(self._end[name]):
                raise StoreError(
                    f"{folder / name} is shorter than the journal says; convert again from the start, with --restart"
                )
            os.ftruncate(descriptor, align(self._end[name]))
        sync(folder)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self._files.values():
            os.close(descriptor)

    def write(
        self, unit: UnitPlan, tensors: Mapping[str, StoredTensor], blocks: Iterator[dict[str, Buffer]]
    ) -> UnitRecord:
        """Append one unit; its record names where it lies."""
        writers = {
            name: _ExtentWriter(self._files[name], align(self._end[name]), name in self._used) for name in unit.sizes
        }
        for block in blocks:
            for name, data in block.items():
                writers[name].append(data)
        extents = {name: one.finish() for name, one in writers.items()}
        for name, extent in extents.items():
            self._end[name] = extent.offset + extent.stored_bytes
            os.ftruncate(self._files[name], align(self._end[name]))
        return record_of(unit, tensors, extents)

    def sync(self) -> None:
        """Return when everything written is on disk."""
        for descriptor in self._files.values():
            os.fdatasync(descriptor)


class _ExtentWriter:
    """Writes one extent: bytes in, an `Extent` out."""

    def __init__(self, descriptor: int, offset: int, compressed: bool) -> None:
        self._descriptor, self._offset = descriptor, offset
        self._compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True) if compressed else None
        self._digest = hashlib.sha256()
        self._plain = self._stored = 0
        self._frames: list[int] = []
        self._waiting = bytearray()

    def append(self, data: Buffer) -> None:
        self._plain += data.nbytes
        if self._compressor is None:
            self._put(data.data)
            return
        self._waiting += data.tobytes()
        while len(self._waiting) >= FRAME_BYTES:
            self._frame(FRAME_BYTES)

    def finish(self) -> Extent:
        if self._waiting:
            self._frame(len(self._waiting))
        return Extent(self._offset, self._plain, self._digest.hexdigest(), tuple(self._frames))

    def _frame(self, nbytes: int) -> None:
        assert self._compressor is not None
        frame = self._compressor.compress(bytes(self._waiting[:nbytes]))
        del self._waiting[:nbytes]
        self._frames.append(len(frame))
        self._put(memoryview(frame))

    def _put(self, data: memoryview) -> None:
        self._digest.update(data)
        while len(data):
            count = os.pwrite(self._descriptor, data, self._offset + self._stored)
            self._stored += count
            data = data[count:]


def record_of(unit: UnitPlan, tensors: Mapping[str, StoredTensor], extents: dict[str, Extent]) -> UnitRecord:
    """What the catalogue says of a unit."""
    if unit.dense:
        ref = tensors[unit.parts[0].parameter]
        return UnitRecord(unit.name, "dense", extents, dtype=ref.dtype, shape=ref.shape)
    return UnitRecord(
        unit.name,
        "planes",
        extents,
        rows=unit.rows,
        columns=unit.columns,
        parts=len(unit.parts),
        members=unit.members,
        all_planes=unit.layer is None,
        inputs="0" * 16 if unit.scaled else "",  # as long as it will be
    )


def compression_of(sample: Buffer, disk_gbps: float) -> dict[str, float | bool]:
    """What zstd does to a sample: the seconds per GB that reading less saves, and those that decompressing costs."""
    frame = zstandard.ZstdCompressor(level=_LEVEL).compress(sample.tobytes())
    begin = time.perf_counter()
    zstandard.ZstdDecompressor().decompress(frame)
    costs = (time.perf_counter() - begin) / sample.nbytes * 1e9
    ratio = len(frame) / sample.nbytes
    saves = (1 - ratio) / disk_gbps if disk_gbps else 0.0
    used = saves > costs or not disk_gbps
    return {"ratio": round(ratio, 4), "saves_s": saves, "costs_s": costs, "used": used}


def sync(path: Path) -> None:
    """Return when a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
