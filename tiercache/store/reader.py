"""Reads file bytes into the caller's buffers with direct I/O, a few threads deep; never maps a file.

Knows files, offsets and buffers; not what the bytes mean, nor when they are wanted.

Ordering: reads are queued in the order of the calls and started in that order; they may finish in any order. A
buffer belongs to the reader from `read` until its ticket is done, or was cancelled; nobody else may touch it.
"""

import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_all
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import zstandard

from policies.settings import DEFAULT
from profiler.direct import open_direct
from tiercache.errors import ClosedError, EnvironmentUnsupportedError, StoreError
from tiercache.store.format import BLOCK_BYTES, FRAME_BYTES, FileRange, Piece, align, unit_of
from tiercache.store.header import DTYPES, INTEGERS, TensorRef

Buffer = npt.NDArray[np.uint8]


class Ticket:
    """A read that was asked for; `wait` returns when its bytes have arrived, or raises what went wrong."""

    def __init__(self, futures: Iterable["Future[None]"]) -> None:
        self._futures = tuple(futures)

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return all(future.done() for future in self._futures)

    def wait(self) -> None:
        """Block until every byte has arrived; raises StoreError, or ClosedError where the reader was closed before."""
        try:
            for future in self._futures:
                future.result()
        except CancelledError as error:
            raise ClosedError("the read was given up because its reader closed; open the model again") from error

    def cancel(self) -> None:
        """Give up; returns when nothing writes to the buffer any more."""
        wait_all([future for future in self._futures if not future.cancel()])


class Reader:
    """A small pool of reading threads over the files it is asked for; one read asks for at most `chunk_bytes`."""

    def __init__(self, threads: int = DEFAULT.read_threads, chunk_bytes: int = DEFAULT.read_bytes) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="tiercache-reader")
        self._chunk_bytes = chunk_bytes
        self._files: dict[Path, tuple[int, bool]] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self._closed = False
        self.read_bytes = 0

    @staticmethod
    def staging_bytes(pieces: Iterable[Piece], threads: int = DEFAULT.read_threads) -> int:
        """What the pool's own buffers take for reading such pieces; nothing when all of them are aligned."""
        return 0 if all(piece.aligned for piece in pieces) else threads * _STAGING_BYTES

    @staticmethod
    def request_bytes(pieces: Iterable[Piece], chunk_bytes: int = DEFAULT.read_bytes) -> tuple[int, ...]:
        """The bytes of the reads that `read` makes of such pieces, where I/O is direct."""
        found: list[int] = []
        for piece in pieces:
            head = piece.offset % BLOCK_BYTES
            if piece.aligned:
                span = align(head + piece.stored_bytes)
                found += [min(chunk_bytes, span - low) for low in range(0, span, chunk_bytes)]
            elif piece.compressed:
                found.append(align(head + piece.stored_bytes))
            else:
                left = range(0, piece.nbytes, FRAME_BYTES)
                found += [align(head + min(FRAME_BYTES, piece.nbytes - low)) for low in left]
        return tuple(found)

    def read(self, pieces: Iterable[Piece], slot: Buffer) -> Ticket:
        """Queue the reading of `pieces` into `slot`.

        The slot's address is a multiple of 4096, and it is long enough for whole blocks around each piece.

        Raises ClosedError after `close`; StoreError or EnvironmentUnsupportedError where a file cannot be opened.
        """
        if self._closed:
            raise ClosedError("the reader is closed; open the model again with tiercache.offload(...)")
        futures = []
        opened = [(piece, *self._open(piece.path)) for piece in pieces]  # all, before the first read is queued
        for piece, descriptor, direct in opened:
            if piece.aligned or (not direct and not piece.compressed):
                futures += self._queue_plain(descriptor, direct, piece, slot)
            else:
                futures += self._queue_staged(descriptor, piece, slot)
        return Ticket(futures)

    def direct(self, path: Path) -> bool:
        """Whether `path` is read with direct I/O; False where its file system has none."""
        return self._open(path)[1]

    def close(self) -> None:
        """Stop the threads, after the reads in flight, and close the files; harmless when done twice."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        while self._files:
            os.close(self._files.popitem()[1][0])

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, path: Path) -> tuple[int, bool]:
        with self._lock:
            if path not in self._files:
                self._files[path] = open_for_reading(path)
            return self._files[path]

    def _queue_plain(self, descriptor: int, direct: bool, piece: Piece, slot: Buffer) -> list["Future[None]"]:
        """Straight into the slot, whole blocks where I/O is direct; what lies around the piece is read along."""
        head = piece.offset % BLOCK_BYTES if direct else 0
        begin, at = piece.offset - head, piece.at - head
        needed = head + piece.nbytes
        span = align(needed) if direct else needed
        futures = []
        for low in range(0, span, self._chunk_bytes):
            high = min(low + self._chunk_bytes, span)
            place = begin + low, slot[at + low : at + high], min(needed, high) - low
            futures.append(self._pool.submit(self._fetch, descriptor, piece.path, *place))
        return futures

    def _queue_staged(self, descriptor: int, piece: Piece, slot: Buffer) -> list["Future[None]"]:
        """Through a buffer of the thread's own: zstd frames, and bytes that must change their place in a block."""
        if piece.compressed:
            return [self._pool.submit(self._fetch_staged, descriptor, piece, slot)]
        return [
            self._pool.submit(
                self._fetch_staged,
                descriptor,
                Piece(piece.path, piece.offset + low, n, piece.at + low, n),
                slot,
            )
            for low in range(0, piece.nbytes, FRAME_BYTES)
            for n in [min(FRAME_BYTES, piece.nbytes - low)]
        ]

    def _fetch(self, descriptor: int, path: Path, offset: int, view: Buffer, needed: int) -> None:
        done = 0
        while done < needed:
            try:
                count = os.preadv(descriptor, [view[done:].data], offset + done)
            except OSError as error:
                raise StoreError(
                    f"cannot read {path} at byte {offset + done}: {error.strerror}; check the disk"
                ) from error
            if count == 0:
                raise StoreError(
                    f"{path} ends {needed - done} bytes early, at byte {offset + done}; it was cut short: "
                    "download or convert it again"
                )
            done += count
        with self._lock:
            self.read_bytes += done

    def _fetch_staged(self, descriptor: int, piece: Piece, slot: Buffer) -> None:
        head = piece.offset % BLOCK_BYTES
        stored = head + piece.stored_bytes
        staging = self._staging()
        self._fetch(descriptor, piece.path, piece.offset - head, staging[: align(stored)], stored)
        target = slot[piece.at : piece.at + piece.nbytes]
        if not piece.compressed:
            target[:] = staging[head:stored]
            return
        try:
            header = staging[head : min(head + 18, stored)].tobytes()  # 18 bytes: the longest that zstd has
            if zstandard.get_frame_parameters(header).content_size != piece.nbytes:
                raise zstandard.ZstdError("another length")
            plain = zstandard.ZstdDecompressor().decompress(staging[head:stored].data, piece.nbytes)
        except zstandard.ZstdError as error:
            raise StoreError(f"{piece.path}: the frame at byte {piece.offset} is corrupt; convert again") from error
        target[:] = np.frombuffer(plain, np.uint8)

    def _staging(self) -> Buffer:
        if not hasattr(self._local, "staging"):
            self._local.staging = aligned_buffer(_STAGING_BYTES)
        staging: Buffer = self._local.staging
        return staging


# A frame that zstd could not shrink is a little longer than its plain bytes.
_STAGING_BYTES = align(FRAME_BYTES + FRAME_BYTES // 128 + 2 * BLOCK_BYTES)


def aligned_buffer(nbytes: int) -> Buffer:
    """A fresh buffer whose address is a multiple of 4096."""
    raw = np.empty(nbytes + BLOCK_BYTES, np.uint8)
    start = -raw.ctypes.data % BLOCK_BYTES
    return raw[start : start + nbytes]


@dataclass(frozen=True)
class PackedTensor(ABC):
    """A tensor that its file holds in another form, from which it is computed whenever it is read.

    Attributes:
        dtype, shape: of what comes out, as in `TensorRef`.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of what comes out."""
        return math.prod(self.shape) * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of a weight of what comes out."""
        return DTYPES[self.dtype].itemsize

    @property
    @abstractmethod
    def encoding(self) -> str:
        """How it was quantised, for people; empty where it was not."""

    @abstractmethod
    def parts(self) -> dict[str, TensorRef]:
        """The stored tensors that it is computed from, each under a name of its own."""

    @abstractmethod
    def load(self, reader: Reader) -> torch.Tensor:
        """The tensor, in fresh memory. Raises StoreError where what is stored cannot be meant."""


StoredTensor = TensorRef | PackedTensor
"""A tensor of a checkpoint: it lies in its file as it is, or is packed there."""


def load(reader: Reader, ref: StoredTensor) -> torch.Tensor:
    """A tensor of a checkpoint, in fresh memory."""
    if isinstance(ref, PackedTensor):
        return ref.load(reader)
    dtype = (DTYPES | INTEGERS)[ref.dtype]
    data = load_bytes(reader, FileRange(ref.path, ref.offset, ref.nbytes, dtype.itemsize))
    return torch.from_numpy(data).view(dtype).view(ref.shape)


def load_bytes(reader: Reader, part: FileRange) -> Buffer:
    """Bytes of a file, in fresh memory."""
    unit = unit_of("", [part])
    slot = aligned_buffer(unit.slot_bytes)
    reader.read(unit.pieces, slot).wait()
    at = unit.pieces[0].at
    return slot[at : at + part.nbytes]


def open_for_reading(path: Path) -> tuple[int, bool]:
    """A descriptor of `path`, and whether its I/O is direct; plain where the file system has no direct I/O."""
    try:
        return open_direct(path)
    except FileNotFoundError as error:
        raise StoreError(f"{path} is gone; download or convert it again") from error
    except OSError as error:
        raise EnvironmentUnsupportedError(f"cannot open {path}: {error.strerror}; check its permissions") from error
