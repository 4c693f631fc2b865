"""What a calibration under way has done so far: an LMDB file in the store's folder that outlives the process.

Each finished step is one transaction with all that is known by then, every value sealed, so that a process killed at
any moment goes on behind its last finished step. Knows arguments, arrays and plain data; not what they mean.
"""

import errno
import io
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from tiercache.errors import EnvironmentUnsupportedError, StoreError, UsageError
from tiercache.store import catalog
from tiercache.store.calibration import PARTIAL_FILE
from tiercache.store.folders import locked

Arrays = dict[str, np.ndarray]
_ASKED, _SECONDS = "asked", "seconds"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


class Journal:
    """See the module; made by `journal`."""

    def __init__(self, env: lmdb.Environment, path: Path) -> None:
        self._env, self._path = env, path
        self._seconds = float(self.plain(_SECONDS) or 0.0)
        self._begin = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time worked on it, by all processes together."""
        return self._seconds + time.monotonic() - self._begin

    def plain(self, key: str) -> Any:
        """What was put under `key`, or None."""
        value = self._value(key)
        return None if value is None else json.loads(value)

    def arrays(self, key: str) -> Arrays | None:
        """The arrays put under `key`, or None."""
        value = self._value(key)
        if value is None:
            return None
        with np.load(io.BytesIO(value), allow_pickle=False) as found:
            return {name: found[name] for name in found.files}

    def put(self, *, plain: Mapping[str, Any] | None = None, arrays: Mapping[str, Arrays] | None = None) -> None:
        """One finished step: all of it is kept, or nothing."""
        values = {key: json.dumps(value).encode() for key, value in (plain or {}).items()}
        for key, several in (arrays or {}).items():
            made = io.BytesIO()
            np.savez(made, allow_pickle=False, **several)
            values[key] = made.getvalue()
        values[_SECONDS] = json.dumps(self.seconds).encode()
        with clear_errors(self._path), self._env.begin(write=True) as transaction:
            for key, value in values.items():
                transaction.put(key.encode(), catalog.sealed(key.encode(), value))

    def _value(self, key: str) -> bytes | None:
        with clear_errors(self._path), self._env.begin() as transaction:
            stored = transaction.get(key.encode())
        try:
            return None if stored is None else catalog.unsealed(key.encode(), bytes(stored))
        except ValueError as error:
            raise StoreError(f"{self._path} is damaged ({error}); begin again with --restart") from error


@contextmanager
def journal(folder: Path, asked: Mapping[str, Any], *, restart: bool) -> Iterator[Journal]:
    """The journal of `folder` for a calibration with the arguments `asked`; begun if there is none.

    Raises:
        UsageError: it was begun with other arguments, or another calibration is writing it.
        StoreError: it is damaged.
        EnvironmentUnsupportedError: the folder cannot be written, or its disk is full.
    """
    path = folder / PARTIAL_FILE
    with _locked(folder), ExitStack() as stack:
        with clear_errors(path):
            if restart:
                path.unlink(missing_ok=True)
            made = Journal(stack.enter_context(catalog.environment(path, readonly=False)), path)
        before = made.plain(_ASKED)
        if before is None:
            made.put(plain={_ASKED: dict(asked)})
        else:
            _refuse_other(before, asked, path)
        yield made


def remove(folder: Path) -> None:
    """Forget what was under way; harmless where nothing was."""
    (folder / PARTIAL_FILE).unlink(missing_ok=True)


def _refuse_other(before: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    """A journal is gone on with by the command that began it."""
    other = [name for name in {**before, **asked} if before.get(name) != asked.get(name)]
    if not other:
        return
    if set(other) & {"store", "identity", "schema"}:
        raise UsageError(f"{path} was begun for another store than the one it lies in; begin again with --restart")
    told = ", ".join(f"{name} {before.get(name)} (now {asked.get(name)})" for name in other)
    raise UsageError(
        f"{path} holds a calibration that was begun with {told}; give what it was begun with to go on, or --restart"
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold `folder` against a second calibration."""
    with ExitStack() as stack:
        with clear_errors(folder):
            stack.enter_context(locked(folder, f"another calibration is writing into {folder}; wait for it"))
        yield


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Name what stands in the way of writing `path`: around such writing alone, not around work with it.

    Raises:
        StoreError: it is damaged.
        EnvironmentUnsupportedError: it cannot be written, or its disk is full.
    """
    try:
        yield
    except lmdb.Error as error:
        raise _translated(error, path) from error
    except StoreError as error:
        if not isinstance(error.__cause__, lmdb.Error):
            raise
        raise _translated(error.__cause__, path) from error
    except OSError as error:
        if error.errno not in (*_FULL, *_UNWRITABLE):
            raise
        raise _translated(error, path) from error


def _translated(error: lmdb.Error | OSError, path: Path) -> StoreError | EnvironmentUnsupportedError:
    """LMDB tells the system's errors by their text alone."""

    def is_one_of(numbers: Sequence[int]) -> bool:
        return any(os.strerror(number) in str(error) for number in numbers)

    if is_one_of(_FULL):
        return EnvironmentUnsupportedError(
            f"the disk of {path.parent} is full; what is done is kept: free some space and run the same command again"
        )
    if is_one_of(_UNWRITABLE):
        return EnvironmentUnsupportedError(f"cannot write {path} ({error}); make the store writable")
    return StoreError(f"{path} is damaged ({error}); begin again with --restart")
