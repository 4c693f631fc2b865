"""Opens files for direct I/O, which goes past the page cache."""

import mmap
import os
from pathlib import Path

BLOCK_BYTES = 4096
"""What offsets, lengths and addresses of direct reads are multiples of."""


def open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor of `path`, and whether its I/O is direct; plain where the file system has no direct I/O."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except (FileNotFoundError, PermissionError):
        raise
    except OSError:
        return os.open(path, os.O_RDONLY), False
    try:  # some file systems take the flag and refuse the read
        with mmap.mmap(-1, BLOCK_BYTES) as trial:
            os.preadv(descriptor, [trial], 0)
    except OSError:
        os.close(descriptor)
        return os.open(path, os.O_RDONLY), False
    return descriptor, hasattr(os, "O_DIRECT")
