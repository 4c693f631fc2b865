"""The plane store's catalogue: an LMDB file with one record per unit and one for the store itself.

Keys are `meta` and `unit/NNNNN`. Values are JSON behind a SHA-256 of key and value. `meta` counts the units. Weights
never go in here.

LMDB is an embedded key-value store: a B+ tree in one file, which is mapped into memory. It is used here because

- a store is copied with plain file tools;
- a transaction is kept whole or not at all, and is on disk when it ends: the journal of a conversion (`store.journal`)
  enters each layer in one;
- readers need no lock and no lock file, so a store on a read-only disk can be read.

A finished catalogue is written in one transaction into a fresh file, so the same records give the same bytes.
"""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lmdb

from tiercache.errors import StoreError, permissions_named

_MAP_BYTES = 1 << 30  # address space, not disk
_META = "meta"
_DIGEST_BYTES = 32
_WAY_OUT = "convert the checkpoint again"
_SYSTEM_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@dataclass(frozen=True)
class Extent:
    """A unit's bytes in one file: `nbytes` of them before compression.

    Attributes:
        sha256: of the stored bytes.
        frames: stored length of each zstd frame; empty when stored plain.
    """

    offset: int
    nbytes: int
    sha256: str
    frames: tuple[int, ...] = ()

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file."""
        return sum(self.frames) if self.frames else self.nbytes


@dataclass(frozen=True)
class Member:
    """A module whose weight lies in a unit: which of the unit's parts it is, and whether it lies transposed."""

    module: str
    own: tuple[int, ...]
    transposed: bool


@dataclass(frozen=True)
class UnitRecord:
    """One unit as the catalogue knows it.

    Attributes:
        kind: "planes", or "dense" for one tensor in its original dtype.
        extents: by file name.
        rows, columns, parts: of a unit of planes.
        members: the modules whose weights lie in a unit of planes.
        dtype, shape: of a dense tensor.
        all_planes: read every plane whatever the precision (the head).
        inputs: of a unit whose inputs have factors, 16 hex digits of these factors' SHA-256; equal ones can be shared.
    """

    name: str
    kind: str
    extents: dict[str, Extent]
    rows: int = 0
    columns: int = 0
    parts: int = 1
    members: tuple[Member, ...] = ()
    dtype: str = ""
    shape: tuple[int, ...] = ()
    all_planes: bool = False
    inputs: str = ""

    def to_json(self) -> bytes:
        """As stored."""
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def from_json(cls, value: bytes) -> "UnitRecord":
        """As read."""
        plain = json.loads(value)
        plain["extents"] = {
            name: Extent(**{**extent, "frames": tuple(extent["frames"])}) for name, extent in plain["extents"].items()
        }
        plain["members"] = tuple(Member(m["module"], tuple(m["own"]), m["transposed"]) for m in plain["members"])
        plain["shape"] = tuple(plain["shape"])
        return cls(**plain)


@dataclass(frozen=True)
class Contents:
    """Everything a catalogue holds."""

    meta: dict[str, Any] = field(default_factory=dict)
    records: tuple[UnitRecord, ...] = ()


@contextmanager
def environment(path: Path, *, readonly: bool, way_out: str = _WAY_OUT) -> Iterator[lmdb.Environment]:
    """The LMDB file at `path`; closed at the end.

    Raises StoreError with the `way_out` where it is missing or damaged, OSError where it cannot be written.
    """
    if readonly:
        if not path.is_file():
            raise StoreError(f"{path.parent} has no {path.name}, so it is no finished plane store; convert again")
        _check_digest(path)
    with errors_translated(path, way_out):
        env = lmdb.open(str(path), subdir=False, map_size=_MAP_BYTES, lock=False, readonly=readonly)
        try:
            yield env
        finally:
            env.close()


@contextmanager
def errors_translated(path: Path, way_out: str) -> Iterator[None]:
    """LMDB's errors as those that `environment` raises. LMDB tells the system's errors by their text alone."""
    try:
        yield
    except lmdb.Error as error:
        for number in _SYSTEM_ERRORS:
            if os.strerror(number) in str(error):
                raise OSError(number, os.strerror(number), str(path)) from error
        raise StoreError(f"{path} is damaged ({error}); {way_out}") from error


def meta_values(meta: Mapping[str, Any]) -> dict[str, bytes]:
    """What concerns the whole store, as a value by its key."""
    return {_META: json.dumps(meta, sort_keys=True).encode()}


def record_values(records: Sequence[UnitRecord], first: int = 0) -> dict[str, bytes]:
    """The records from the `first` on, as values by their keys."""
    return {f"unit/{index:05d}": record.to_json() for index, record in enumerate(records[first:], first)}


def write(path: Path, meta: Mapping[str, Any], records: Sequence[UnitRecord]) -> None:
    """A fresh catalogue, on disk when this returns."""
    write_values(path, meta_values(meta) | record_values(records))


def write_values(path: Path, values: Mapping[str, bytes]) -> None:
    """A fresh file of sealed values with its digest beside it, on disk when this returns."""
    path.unlink(missing_ok=True)
    with environment(path, readonly=False) as env:
        put(env, values)
    digest_file(path).write_text(digest(path) + "\n", encoding="utf-8")


def put(env: lmdb.Environment, values: Mapping[str, bytes]) -> None:
    """Enter values, sealed, in one transaction."""
    with env.begin(write=True) as transaction:
        for name, value in values.items():
            transaction.put(name.encode(), sealed(name.encode(), value))


def size_bytes(meta: Mapping[str, Any], records: list[UnitRecord]) -> int:
    """How large the catalogue of such records will be; their values' lengths are all that counts."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "catalog.mdb"
        write(path, meta, records)
        return path.stat().st_size + digest_file(path).stat().st_size


def read(path: Path) -> Contents:
    """All of a catalogue; raises StoreError where it is missing or damaged."""
    with environment(path, readonly=True) as env:
        return contents(env, path)


def contents(env: lmdb.Environment, path: Path) -> Contents:
    """What an open catalogue, or the journal of one, holds."""
    try:
        values = values_in(env)
        meta = json.loads(values.pop(_META, b"{}"))
        return Contents(meta, tuple(map(UnitRecord.from_json, values.values())))
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{path} holds a record that cannot be read ({error!r}); convert again") from error


def read_values(path: Path) -> dict[str, bytes]:
    """All sealed values of a file; raises as `values_in` does, and StoreError where it is missing or damaged."""
    with environment(path, readonly=True) as env:
        return values_in(env)


def values_in(env: lmdb.Environment) -> dict[str, bytes]:
    """All sealed values of an open file; raises ValueError where one is not what was written."""
    with env.begin() as transaction:
        return {bytes(key).decode(): unsealed(bytes(key), bytes(value)) for key, value in transaction.cursor()}


def sealed(key: bytes, value: bytes) -> bytes:
    """A value behind the hash of its key and itself."""
    return hashlib.sha256(key + value).digest() + value


def unsealed(key: bytes, stored: bytes) -> bytes:
    """The value that was sealed; raises ValueError where it is not what was written under this key."""
    value = stored[_DIGEST_BYTES:]
    if sealed(key, value) != stored:
        raise ValueError(f"checksum of {key.decode(errors='replace')}")
    return value


def _check_digest(path: Path) -> None:
    """LMDB maps its file and trusts it: over a damaged or shortened one it may end the process."""
    beside = digest_file(path)
    if not beside.is_file() or beside.read_text(encoding="utf-8", errors="replace").strip() != digest(path):
        raise StoreError(f"{path} is damaged, for {beside.name} tells another checksum; convert the checkpoint again")


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with permissions_named(path):
        return hashlib.sha256(path.read_bytes()).hexdigest()


def digest_file(path: Path) -> Path:
    """Where the digest of an LMDB file is kept."""
    return path.with_suffix(".sha256")
