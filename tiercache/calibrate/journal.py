"""What a calibration under way has done so far: an LMDB file in the store's folder that outlives the process.

Each finished step is one transaction with all that is known by then, every value sealed, so that a process killed at
any moment goes on behind its last finished step. Knows arguments, arrays and plain data; not what they mean.
"""

import io
import json
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lmdb
import numpy as np

from tiercache.errors import StoreError, UsageError
from tiercache.store import catalog
from tiercache.store.calibration import PARTIAL_FILE
from tiercache.store.folders import clear_io_errors, locked

Arrays = dict[str, np.ndarray]
_ASKED, _SECONDS = "asked", "seconds"
_ANEW = "begin again with --restart"


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
        with clear_errors(self._path):
            catalog.put(self._env, values)

    def _value(self, key: str) -> bytes | None:
        with clear_errors(self._path), self._env.begin() as transaction:
            stored = transaction.get(key.encode())
        try:
            return None if stored is None else catalog.unsealed(key.encode(), bytes(stored))
        except ValueError as error:
            raise StoreError(f"{self._path} is damaged ({error}); {_ANEW}") from error


@contextmanager
def journal(folder: Path, asked: Mapping[str, Any], *, restart: bool) -> Iterator[Journal]:
    """The journal of `folder` for a calibration with the arguments `asked`; begun if there is none.

    Raises:
        UsageError: it was begun with other arguments, or another calibration is writing it.
        StoreError: it is damaged.
        EnvironmentUnsupportedError: the folder cannot be written, or its disk is full.
    """
    path = folder / PARTIAL_FILE
    with ExitStack() as stack:
        with clear_errors(path):
            stack.enter_context(locked(folder, f"another calibration is writing into {folder}; wait for it"))
            if restart:
                path.unlink(missing_ok=True)
            env = stack.enter_context(catalog.environment(path, readonly=False, way_out=_ANEW))
            made = Journal(env, path)
        before = made.plain(_ASKED)
        if before is None:
            made.put(plain={_ASKED: dict(asked)})
        else:
            _refuse_other(before, asked, path)
        yield made


def _refuse_other(before: Mapping[str, Any], asked: Mapping[str, Any], path: Path) -> None:
    """A journal is gone on with by the command that began it."""
    other = [name for name in {**before, **asked} if before.get(name) != asked.get(name)]
    if not other:
        return
    if set(other) & {"store", "identity", "schema"}:
        raise UsageError(f"{path} was begun for another store than the one it lies in; {_ANEW}")
    told = ", ".join(f"{name} {before.get(name)} (now {asked.get(name)})" for name in other)
    raise UsageError(
        f"{path} holds a calibration that was begun with {told}; give what it was begun with to go on, or --restart"
    )


@contextmanager
def clear_errors(path: Path) -> Iterator[None]:
    """Name what stands in the way of writing `path`: around such writing alone, not around work with it."""
    with clear_io_errors(path.parent, "make the store writable"), catalog.errors_translated(path, _ANEW):
        yield
