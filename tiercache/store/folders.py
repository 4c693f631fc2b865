"""Folders that are written or read: one writer at a time, and clear errors. Knows nothing of what is in them."""

import errno
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiercache.config.environment import home_folder
from tiercache.errors import EnvironmentUnsupportedError, UsageError

IN_USE_FILE = "config.json"  # of a checkpoint or store: held by all who read the folder, for the folder is its writer's
ORIGIN_FILE = "packed-origin"  # of a checkpoint's description in the cache: where its weights are read from
MAKING = ".tiercache-making-"  # a folder that is gone when what is made in it is whole has this before its name


@contextmanager
def locked(path: Path, refusal: str | None, *, shared: bool = False) -> Iterator[None]:
    """Hold a folder or file against other processes; with `shared`, against those alone that do not share it.

    Where another process holds it, a UsageError says `refusal`; where that is None, this waits for the other process.
    A UsageError as well where `path` was removed before it could be held.
    """
    gone = f"{path} was removed meanwhile; run the same command again"
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError as error:
        raise UsageError(gone) from error
    try:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(descriptor, kind | (0 if refusal is None else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UsageError(refusal) from error
        if not _lies_at(path, descriptor):  # what was locked is what somebody has just removed
            raise UsageError(gone)
        yield
    finally:
        os.close(descriptor)


def _lies_at(path: Path, descriptor: int) -> bool:
    """Whether what was opened is what `path` names still."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """A folder in `parent` to make something in: held against removal, and removed at the end."""
    with tempfile.TemporaryDirectory(dir=parent, prefix=MAKING) as made, locked(Path(made), None):
        yield Path(made)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Hold a checkpoint or store in the cache folder against its removal; elsewhere people remove as they like.

    Raises:
        UsageError: it is being removed, or was removed.
    """
    if not folder.resolve().is_relative_to(home_folder().resolve()):
        yield
        return
    with locked(folder / IN_USE_FILE, f"{folder} is being removed; open it again to make it anew", shared=True):
        yield


@contextmanager
def clear_io_errors(folder: Path, way_out: str = "name a folder that can be written") -> Iterator[None]:
    """Turn what the file system refuses into an EnvironmentUnsupportedError, or a UsageError for a file in the way."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise EnvironmentUnsupportedError(
                f"the disk of {folder} is full; what is done is kept: free some space and run the same command again"
            ) from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST):
            raise UsageError(f"{error.filename or folder} is in the way; name a folder that can be made") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            raise EnvironmentUnsupportedError(
                f"cannot write {error.filename or folder}: {error.strerror}; {way_out}"
            ) from error
        raise


def existing(path: Path) -> Path:
    """The nearest folder above `path`, or `path` itself, that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())
