"""Measures the roofs of this machine: direct reads from a disk, reads from memory. The only place that does.

Knows nothing of models or tiers. Every figure is a rate in GB/s (1e9 bytes) that was reached just now, on a machine
that may be shared: compare figures of the same run.
"""

import ctypes
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from profiler.direct import BLOCK_BYTES, open_direct
from profiler.hugepages import map_huge_pages

Reader = Callable[[int, int], object]
"""Loads every byte of memory, given by its address and length, once."""

LEFTOVERS = ".tiercache-probe-*"  # what a probe that was killed leaves in its folder


@dataclass(frozen=True)
class ReadRoof:
    """What direct reads from a file reached.

    Attributes:
        gbps: the best of the measured settings.
        threads, chunk_bytes: that setting.
        direct: False where the file system has no direct I/O, so that the page cache was measured instead.
    """

    gbps: float
    threads: int
    chunk_bytes: int
    direct: bool


def disk_read(
    path: Path,
    *,
    settings: Sequence[tuple[int, int]] = ((4, 2 << 20), (8, 1 << 20), (2, 4 << 20)),
    limit_bytes: int = 1 << 30,
    limit_s: float = float("inf"),
) -> ReadRoof:
    """Read `path` from its start with each setting of (threads, chunk bytes); the best rate counts.

    Args:
        path: a file; larger than any cache of the device, to be honest.
        settings: what to try.
        limit_bytes: the most to read per setting.
        limit_s: when to begin no more reads of a setting, for a disk that would take long over all bytes.
    """
    descriptor, direct = open_direct(path)
    try:
        size = min(os.fstat(descriptor).st_size, limit_bytes) // BLOCK_BYTES * BLOCK_BYTES
        best = (0.0, *settings[0])
        for threads, chunk_bytes in settings:
            best = max(best, (_read_all(descriptor, size, threads, chunk_bytes, limit_s), threads, chunk_bytes))
    finally:
        os.close(descriptor)
    return ReadRoof(*best, direct)


def folder_read(folder: Path, *, sample_bytes: int = 256 << 20) -> ReadRoof:
    """`disk_read` of a file made for the purpose in `folder` and removed again."""
    with sample_file(folder, sample_bytes) as path:
        return disk_read(path, settings=((4, 2 << 20),))


@contextmanager
def sample_file(folder: Path, sample_bytes: int) -> Iterator[Path]:
    """A file of random bytes in `folder`, on the disk and removed afterwards."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=LEFTOVERS.removesuffix("*")) as file:
        block = os.urandom(4 << 20)
        for _ in range(sample_bytes // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        yield Path(file.name)


def dram_read(
    *,
    threads: int | None = None,
    size_bytes: int = 1 << 30,
    repeats: int = 5,
    memory: memoryview | None = None,
    readers: Sequence[Reader] = (),
) -> float:
    """GB/s that the fastest reader reaches on all cores; of each the median of `repeats`, in turn.

    One reader is the C library's own vectorised comparison, of memory with itself. It needs no compiler, loads every
    byte from memory once and does next to nothing with it, where a framework's sum stays at two thirds. Pages are huge
    where the system has them, as in the tiers' slabs: among ordinary ones the search for pages, not the memory, may set
    the rate.

    Args:
        threads: as many as cores by default.
        size_bytes: how much to read.
        repeats: how often.
        memory: what to read instead of new memory: of a machine with several memories each place has its own roof.
        readers: others to try.
    """
    workers = threads or len(os.sched_getaffinity(0))
    if memory is None:
        memory = map_huge_pages(size_bytes)
        ctypes.memset(ctypes.addressof(ctypes.c_char.from_buffer(memory)), 1, size_bytes)
    address, share = ctypes.addressof(ctypes.c_char.from_buffer(memory)), memory.nbytes // workers
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes, compare.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t], ctypes.c_int
    starts = [address + n * share for n in range(workers)]
    every: list[Reader] = [lambda at, nbytes: compare(at, at, nbytes), *readers]
    rates: list[list[float]] = [[] for _ in every]
    for _ in range(repeats):
        for reader, found in zip(every, rates, strict=True):
            jobs = [partial(reader, at, share) for at in starts]
            found.append(share * workers / _together(jobs) / 1e9)
    return max(map(statistics.median, rates))


def _read_all(descriptor: int, size: int, threads: int, chunk_bytes: int, limit_s: float) -> float:
    """GB/s of reading the first `size` bytes in chunks, `threads` at a time; the first chunk is read however long."""
    local = threading.local()
    begin = time.perf_counter()

    def read(offset: int) -> int:
        if offset and time.perf_counter() - begin > limit_s:
            return 0
        if not hasattr(local, "buffer"):
            local.buffer = map_huge_pages(chunk_bytes)
        return os.preadv(descriptor, [local.buffer[: min(chunk_bytes, size - offset)]], offset)

    with ThreadPoolExecutor(threads) as pool:
        begin = time.perf_counter()
        done = sum(pool.map(read, range(0, size, chunk_bytes)))
        return done / (time.perf_counter() - begin) / 1e9


def _together(jobs: Sequence[Callable[[], object]]) -> float:
    """Seconds until all jobs, run at once, are done."""
    workers = [threading.Thread(target=job) for job in jobs]
    begin = time.perf_counter()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return time.perf_counter() - begin
