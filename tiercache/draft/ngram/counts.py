"""Counts of what followed n-grams, kept in an LMDB file across runs.

A key is an n-gram; its value the commonest tokens behind it and their counts, behind a checksum. The record `meta` says
whose tokens they are. Additions are one transaction, so a process killed at any moment loses no more than what it had
not added yet; several processes may add at once, each to what the others did.

Knows tokens; nothing of trees or drafters.
"""

import errno
import json
import mmap
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from tiercache.errors import ClosedError, EnvironmentUnsupportedError, StoreError, TiercacheError, UsageError
from tiercache.store.catalog import sealed, unsealed
from tiercache.store.folders import locked

FILE = "ngrams.mdb"
SCHEMA = "tiercache.ngrams/1"
LEAST_BYTES = 1 << 22
KEPT_TOKENS = 8  # tokens behind an n-gram
LONGEST = 3  # tokens of an n-gram
Gram = tuple[int, ...]
Counts = list[tuple[int, int]]  # (token, count), commonest first

# Keys of n-grams begin with "g", so that they come before the two others.
_GRAM, _HAND, _META = b"g", b"hand", b"meta"
_CHECKSUM = struct.Struct("<I")
_MOST = (1 << 32) - 1
# An entry takes 90 bytes at most and its page may be half empty; a transaction may write every page anew, while a
# reader still holds what the last one left.
_ENTRY_BYTES = 640
_HALVED = 4  # entries for each one too many, before some go whatever they hold
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class CountStore:
    """Counts of the tokens that followed n-grams of 1 to 3 tokens.

    Args:
        folder: where the file is; made if there is none. What was emitted can be told from the counts in part, so
            the file is its owner's alone.
        identity: whose tokens they are: the name or digest of a tokenizer or model.
        vocabulary: tokens.
        max_bytes: of a file that is made now; one that is there keeps its size. When it is full, a hand goes round
            and halves counts, and what falls to 0 goes.

    Raises:
        StoreError: the file is damaged, or of another identity or vocabulary.
        EnvironmentUnsupportedError: it cannot be written, or its disk is full.
        UsageError: `max_bytes` is below `LEAST_BYTES`, or this process has the file open already.
    """

    def __init__(self, folder: Path, *, identity: str, vocabulary: int, max_bytes: int = 1 << 28) -> None:
        if max_bytes < LEAST_BYTES:
            raise UsageError(f"learned tables of {max_bytes} bytes; give {LEAST_BYTES} at least")
        self._path = folder / FILE
        meta = {"schema": SCHEMA, "identity": identity, "vocabulary": vocabulary}
        with _clear_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            with locked(folder, None):  # against another process that would make the same file
                if not self._path.exists():
                    _make(self._path, meta, max_bytes)
            size_bytes = self._path.stat().st_size
            # With the power the last transactions may go, but nothing older: metasync off.
            env = lmdb.open(
                str(self._path), subdir=False, map_size=size_bytes, mode=0o600, metasync=False, readahead=False
            )
        self._limit = size_bytes // _ENTRY_BYTES
        self._env: lmdb.Environment | None = env
        try:
            with _clear_errors(self._path):
                self._check(env, meta, size_bytes)
                env.reader_check()  # readers that were killed keep pages from being used again
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        """N-grams."""
        return _grams(self._open())

    @contextmanager
    def reading(self) -> Iterator[Callable[[Gram], Counts]]:
        """A look-up of n-grams: the commonest tokens behind one, or none.

        Raises:
            StoreError: a record is damaged.
            ClosedError: the store was closed.
        """
        with _clear_errors(self._path), self._open().begin(buffers=True) as transaction:
            yield lambda gram: self._counts(transaction, _key(gram))

    def add(self, counts: Mapping[Gram, Mapping[int, int]]) -> None:
        """Add to what is there: all of it or nothing where it is cut off, but for more than half of what has room.

        Raises:
            StoreError, EnvironmentUnsupportedError: as for the class.
            ClosedError: the store was closed.
        """
        env = self._open()
        keys = sorted((_key(gram), gram) for gram in counts)
        at_once = self._limit // 2
        for first in range(0, len(keys), at_once):
            with _clear_errors(self._path), env.begin(write=True, buffers=True) as transaction:
                for key, gram in keys[first : first + at_once]:
                    transaction.put(key, _packed(key, _merged(self._counts(transaction, key), counts[gram])))
                self._sweep(transaction, _grams(transaction) - self._limit)
        with _clear_errors(self._path):
            env.reader_check()

    def close(self) -> None:
        """Harmless when done twice."""
        env, self._env = self._env, None
        if env is not None:
            env.close()

    def _open(self) -> lmdb.Environment:
        if self._env is None:
            raise ClosedError(f"the learned tables of {self._path} were closed; make a new drafter")
        return self._env

    def _check(self, env: lmdb.Environment, meta: Mapping[str, Any], size_bytes: int) -> None:
        """LMDB maps its file and trusts it: over one cut short it would end the process."""
        if (env.info()["last_pgno"] + 1) * env.stat()["psize"] > size_bytes:
            raise StoreError(f"{self._path} was cut short to {size_bytes} bytes; {_REMOVE}")
        with env.begin() as transaction:
            try:
                found = json.loads(unsealed(_META, transaction.get(_META) or b""))
            except ValueError as error:
                raise StoreError(
                    f"{self._path} is damaged or no file of learned tables ({error}); {_REMOVE}"
                ) from error
        other = [name for name in meta if found.get(name) != meta[name]]
        if other:
            told = ", ".join(f"{name} {found.get(name)!r} and not {meta[name]!r}" for name in other)
            raise StoreError(f"{self._path} holds tables of {told}; give another folder")

    def _counts(self, transaction: lmdb.Transaction, key: bytes) -> Counts:
        stored = transaction.get(key)
        if stored is None:
            return []
        value = bytes(stored)[_CHECKSUM.size :]
        if len(value) % 8 or _CHECKSUM.pack(zlib.crc32(key + value)) != stored[: _CHECKSUM.size]:
            raise StoreError(f"{self._path} is damaged: checksum of the n-gram {key[1:].hex()}; {_REMOVE}")
        return list(struct.iter_unpack("<II", value))

    def _sweep(self, transaction: lmdb.Transaction, excess: int) -> None:
        """Where there are too many n-grams, halve the counts of some, and make room at any rate."""
        if excess <= 0:
            return
        hand = bytes(transaction.get(_HAND) or b"")
        for key in _after(transaction, hand, _HALVED * excess):
            hand = key
            if excess <= 0:
                break
            left = [(token, count // 2) for token, count in self._counts(transaction, key) if count > 1]
            if left:
                transaction.put(key, _packed(key, left))
            else:
                transaction.delete(key)
                excess -= 1
        rest = _after(transaction, hand, excess)
        for key in rest:
            transaction.delete(key)
        transaction.put(_HAND, rest[-1] if rest else hand)


_REMOVE = "remove it to begin anew"


def _make(path: Path, meta: Mapping[str, Any], max_bytes: int) -> None:
    """As large as it may ever become, though sparse: so its size tells later whether it was cut short."""
    made = path.with_suffix(".new")
    made.unlink(missing_ok=True)
    with (
        lmdb.open(str(made), subdir=False, map_size=max_bytes, lock=False, mode=0o600) as env,
        env.begin(write=True) as transaction,
    ):
        transaction.put(_META, sealed(_META, json.dumps(meta).encode()))
        transaction.put(_HAND, _GRAM)
    os.truncate(made, max_bytes // mmap.PAGESIZE * mmap.PAGESIZE)
    made.rename(path)


def _key(gram: Gram) -> bytes:
    return struct.pack(f"<c{len(gram)}I", _GRAM, *gram)


def _packed(key: bytes, counts: Counts) -> bytes:
    value = b"".join(struct.pack("<II", *pair) for pair in counts)
    return _CHECKSUM.pack(zlib.crc32(key + value)) + value


def _merged(kept: Counts, fresh: Mapping[int, int]) -> Counts:
    """The commonest of both; of equals the fresh one, or a full record would never learn anything new."""
    merged = dict(kept)
    for token, count in fresh.items():
        merged[token] = min(_MOST, merged.get(token, 0) + count)
    return sorted(merged.items(), key=lambda item: (item[1], item[0] in fresh), reverse=True)[:KEPT_TOKENS]


def _grams(of: lmdb.Environment | lmdb.Transaction) -> int:
    """But for the hand and the meta record."""
    entries: int = of.stat()["entries"]
    return entries - 2


def _after(transaction: lmdb.Transaction, hand: bytes, most: int) -> list[bytes]:
    """Up to so many keys of n-grams from the hand on, and round again; none twice."""
    most = max(0, min(most, _grams(transaction)))
    cursor, keys = transaction.cursor(), list[bytes]()
    cursor.set_range(hand)
    while len(keys) < most:
        key = bytes(cursor.key())
        if key[:1] != _GRAM:
            cursor.set_range(_GRAM)
            continue
        keys.append(key)
        cursor.next()
    return keys


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Name what stands in the way of using `path`."""
    try:
        yield
    except (lmdb.Error, OSError) as error:
        raise _translated(error, path) from error


def _translated(error: lmdb.Error | OSError, path: Path) -> TiercacheError:
    """LMDB tells the system's errors by their text alone."""
    text = str(error)
    if "already open in this process" in text:
        return UsageError(f"this process has {path} open already; close that drafter, or share it")
    if any(os.strerror(number) in text for number in _FULL):
        return EnvironmentUnsupportedError(f"the disk of {path.parent} is full; free some space")
    if isinstance(error, OSError) or any(os.strerror(number) in text for number in _UNWRITABLE):
        return EnvironmentUnsupportedError(f"cannot write {path} ({text}); make the folder writable or give another")
    return StoreError(f"{path} is damaged ({text}); {_REMOVE}")
