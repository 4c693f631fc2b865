"""Folders that are being written: one writer at a time, and clear errors. Knows nothing of what is written."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiercache.errors import EnvironmentUnsupportedError, UsageError


@contextmanager
def locked(folder: Path, refusal: str | None) -> Iterator[None]:
    """Hold `folder` against other processes.

    Where another process holds it, a UsageError says `refusal`; where that is None, this waits for the other process.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if refusal is None else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise UsageError(refusal) from error
        yield
    finally:
        os.close(descriptor)


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
