"""The reader against plain file reads: any offsets and lengths, frames, damage, and nothing left after close."""

import errno
import fcntl
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from tiercache.errors import ClosedError, EnvironmentUnsupportedError, StoreError
from tiercache.store.format import BLOCK_BYTES, FRAME_BYTES, FileRange, Piece, align, unit_of
from tiercache.store.reader import Buffer, Reader, aligned_buffer

SIZE = 70_001  # no multiple of 4096
UNTOUCHED = 0xA5
CHUNK = 2 * BLOCK_BYTES  # small, so that small files take several reads


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reader") / "random.bin"
    path.write_bytes(np.random.default_rng(0).bytes(SIZE))
    return path


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """The test leaves no descriptor and no thread."""
    before = descriptors(), threading.active_count()
    yield
    assert (descriptors(), threading.active_count()) == before


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - Path.iterdir would hold one more open


def fresh_slot(nbytes: int) -> Buffer:
    slot = aligned_buffer(align(nbytes) + BLOCK_BYTES)
    slot[:] = UNTOUCHED
    return slot


def read_all(pieces: list[Piece], slot: Buffer, chunk_bytes: int = CHUNK) -> None:
    with Reader(chunk_bytes=chunk_bytes) as reader:
        reader.read(pieces, slot).wait()


def bytes_of(piece: Piece, slot: Buffer) -> bytes:
    return slot[piece.at : piece.at + piece.nbytes].tobytes()


# ---------------------------------------------------------------- the right bytes


@st.composite
def layouts(draw: st.DrawFn) -> list[tuple[int, int, int]]:
    """(offset, nbytes, at) of pieces that share no block of the slot with one read straight into it."""
    found = []
    cursor = 0
    for _ in range(draw(st.integers(1, 5))):
        offset = draw(
            st.one_of(st.integers(0, SIZE - 1), st.sampled_from([0, BLOCK_BYTES, SIZE - 1, 17 * BLOCK_BYTES]))
        )
        most = SIZE - offset
        nbytes = draw(st.one_of(st.integers(1, most), st.just(most), st.integers(1, min(most, 9))))
        at = cursor + draw(st.integers(0, BLOCK_BYTES))
        cursor = at + nbytes
        if draw(st.booleans()) or at % BLOCK_BYTES == offset % BLOCK_BYTES:  # by chance it is read straight as well
            at = align(at) + offset % BLOCK_BYTES
            cursor = align(at + nbytes)
        found.append((offset, nbytes, at))
    return found


@given(layouts())
@example([(SIZE - 1, 1, (SIZE - 1) % BLOCK_BYTES)])
@example([(0, SIZE, 0)])
@example([(1, SIZE - 1, 0)])
def test_pieces_are_the_file_s_bytes_and_touch_nothing_else(file: Path, layout: list[tuple[int, int, int]]) -> None:
    pieces = [Piece(file, offset, nbytes, at, nbytes) for offset, nbytes, at in layout]
    slot = fresh_slot(max(piece.at + piece.nbytes for piece in pieces))
    read_all(pieces, slot)
    content = file.read_bytes()
    touched = np.zeros(len(slot), bool)
    for piece in pieces:
        assert bytes_of(piece, slot) == content[piece.offset : piece.offset + piece.nbytes]
        low, high = piece.at, piece.at + piece.nbytes
        if piece.aligned:  # whole blocks around it
            low, high = low // BLOCK_BYTES * BLOCK_BYTES, align(high)
        touched[low:high] = True
    assert (slot[~touched] == UNTOUCHED).all()


@given(st.lists(st.tuples(st.integers(0, 9000), st.integers(1, 9000), st.sampled_from([1, 2, 4])), max_size=5))
def test_tensors_laid_out_keep_their_alignment_and_share_no_block(
    file: Path, extents: list[tuple[int, int, int]]
) -> None:
    unit = unit_of("unit", [FileRange(file, offset, nbytes, itemsize) for offset, nbytes, itemsize in extents])
    assert unit.nbytes == sum(nbytes for _, nbytes, _ in extents)
    assert unit.slot_bytes % BLOCK_BYTES == 0
    end = 0
    for piece, (offset, nbytes, itemsize) in zip(unit.pieces, extents, strict=True):
        assert (piece.offset, piece.nbytes, piece.stored_bytes) == (offset, nbytes, nbytes)
        assert piece.at // BLOCK_BYTES * BLOCK_BYTES >= end
        assert piece.at % itemsize == 0
        assert piece.aligned == (offset % itemsize == 0 or offset % BLOCK_BYTES == 0)
        end = align(piece.at + nbytes)
    assert end == unit.slot_bytes
    slot = fresh_slot(unit.slot_bytes)
    read_all(list(unit.pieces), slot)
    content = file.read_bytes()
    for piece in unit.pieces:
        assert bytes_of(piece, slot) == content[piece.offset : piece.offset + piece.nbytes]


@pytest.mark.parametrize("shift", [0, 1])
def test_pieces_of_many_chunks(tmp_path: Path, shift: int) -> None:
    content = np.random.default_rng(1).bytes(2 * FRAME_BYTES + 4321)
    (tmp_path / "large").write_bytes(content)
    piece = Piece(tmp_path / "large", shift, len(content) - shift, 0, len(content) - shift)
    assert piece.aligned == (shift == 0)
    slot = fresh_slot(len(content))
    with Reader() as reader:
        ticket = reader.read([piece], slot)
        ticket.wait()
        assert ticket.done()
        assert len(content) <= reader.read_bytes + shift <= len(content) + 3 * BLOCK_BYTES
    assert bytes_of(piece, slot) == content[shift:]


def frames_file(path: Path, plains: list[bytes], before: int = 0) -> list[Piece]:
    """A file of zstd frames, and the pieces that unpack them one behind the other."""
    stored = bytearray(b"?" * before)
    pieces = []
    at = 0
    for plain in plains:
        frame = zstandard.ZstdCompressor(level=3, write_checksum=True).compress(plain)
        pieces.append(Piece(path, len(stored), len(plain), at, len(frame), compressed=True))
        stored += frame
        at += len(plain)
    path.write_bytes(stored)
    return pieces


@given(st.lists(st.binary(min_size=1, max_size=3000), min_size=1, max_size=6), st.integers(0, 5000), st.booleans())
def test_frames_unpack_side_by_side(
    tmp_path_factory: pytest.TempPathFactory, plains: list[bytes], before: int, repetitive: bool
) -> None:
    plains = [plain * 9 for plain in plains] if repetitive else plains
    pieces = frames_file(tmp_path_factory.getbasetemp() / "frames", plains, before)
    slot = fresh_slot(sum(map(len, plains)))
    read_all(pieces, slot)
    assert slot.tobytes().startswith(b"".join(plains) + bytes([UNTOUCHED]))


def test_a_full_frame_that_could_not_shrink_fits_its_buffer(tmp_path: Path) -> None:
    plain = np.random.default_rng(2).bytes(FRAME_BYTES)
    (piece,) = frames_file(tmp_path / "frame", [plain], before=BLOCK_BYTES - 1)
    assert piece.stored_bytes > FRAME_BYTES
    slot = fresh_slot(FRAME_BYTES)
    read_all([piece], slot)
    assert bytes_of(piece, slot) == plain


def test_staging_is_needed_only_for_what_cannot_go_straight_in(file: Path) -> None:
    straight, moved = Piece(file, 5, 9, 5, 9), Piece(file, 5, 9, 0, 9)
    frame = Piece(file, 0, 9, 0, 9, compressed=True)
    assert Reader.staging_bytes([straight]) == 0
    assert Reader.staging_bytes([straight, moved]) == Reader.staging_bytes([frame]) > 4 * FRAME_BYTES


# ---------------------------------------------------------------- without direct I/O


def test_proc_files_have_no_direct_io(nothing_left: None) -> None:
    """A real file system that refuses O_DIRECT when the file is opened."""
    path = Path("/proc/version")
    content = path.read_bytes()
    piece = Piece(path, 3, 20, 777, 20)
    slot = fresh_slot(BLOCK_BYTES)
    with Reader() as reader:
        assert not reader.direct(path)
        reader.read([piece], slot).wait()
    assert bytes_of(piece, slot) == content[3:23]


@pytest.mark.parametrize("refused", ["open", "read"])
def test_file_systems_without_direct_io_give_the_same_bytes(
    file: Path, monkeypatch: pytest.MonkeyPatch, nothing_left: None, refused: str
) -> None:
    """tmpfs knows O_DIRECT on some kernels and not on others, so the refusal is put in by hand.

    Some file systems refuse to open (EINVAL), others take the flag and refuse to read.
    """
    true_open, true_read = os.open, os.preadv

    def no_open(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument", str(path))
        return true_open(path, flags, mode)

    def no_read(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return true_read(descriptor, buffers, offset)

    if refused == "open":
        monkeypatch.setattr(os, "open", no_open)
    else:
        monkeypatch.setattr(os, "preadv", no_read)
    frame = frames_file(file.with_name("direct-frame"), [b"tiercache" * 500], before=11)[0]
    pieces = [
        Piece(file, 4097, 30_000, 1, 30_000),  # could go straight in
        Piece(file, 100, 30_000, 32_768, 30_000),  # could not
        Piece(file, SIZE - 3, 3, 70_000, 3),  # the tail
        Piece(frame.path, frame.offset, frame.nbytes, 71_001, frame.stored_bytes, compressed=True),
    ]
    slot = fresh_slot(80_000)
    with Reader(chunk_bytes=CHUNK) as reader:
        assert not reader.direct(file)
        reader.read(pieces, slot).wait()
    content = file.read_bytes()
    for piece in pieces[:3]:
        assert bytes_of(piece, slot) == content[piece.offset : piece.offset + piece.nbytes]
    assert bytes_of(pieces[3], slot) == b"tiercache" * 500


def test_this_disk_has_direct_io(file: Path) -> None:
    """Or the tests above would all have tested the same path."""
    with Reader() as reader:
        assert reader.direct(file)


# ---------------------------------------------------------------- damage


@pytest.mark.parametrize("offset", [0, 1, 4096, 8192, 12_000])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("kept", [0, 1, 8192, 10_001])
def test_a_truncated_file_is_named(tmp_path: Path, offset: int, aligned: bool, kept: int) -> None:
    path = tmp_path / "cut.bin"
    path.write_bytes(bytes(kept))
    at = offset % BLOCK_BYTES if aligned else (offset + 1) % BLOCK_BYTES
    with pytest.raises(StoreError, match=r"cut\.bin ends \d+ bytes early"):
        read_all([Piece(path, offset, 20_000, at, 20_000)], fresh_slot(30_000))


def test_a_file_that_is_one_byte_short_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "short.bin"
    path.write_bytes(bytes(3 * BLOCK_BYTES - 1))
    with pytest.raises(StoreError, match="ends 1 bytes early, at byte 12287"):
        read_all([Piece(path, 0, 3 * BLOCK_BYTES, 0, 3 * BLOCK_BYTES)], fresh_slot(3 * BLOCK_BYTES))


def test_a_file_cut_short_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    """The reason why nothing is memory-mapped: this would have killed the process."""
    path = tmp_path / "cut.bin"
    path.write_bytes(bytes(40_000))
    piece = Piece(path, 0, 40_000, 0, 40_000)
    slot = fresh_slot(40_000)
    with Reader() as reader:
        reader.read([piece], slot).wait()
        os.truncate(path, 5000)
        with pytest.raises(StoreError, match=r"cut\.bin ends 35000 bytes early"):
            reader.read([piece], slot).wait()


def test_a_corrupt_frame_is_named(tmp_path: Path) -> None:
    """Frames with a checksum: any flipped bit is noticed (but for those of the header's descriptor)."""
    plain = np.random.default_rng(3).integers(0, 4, 5000, np.uint8).tobytes()
    (piece,) = frames_file(tmp_path / "frame.bin", [plain], before=7)
    good = piece.path.read_bytes()
    for at in [*range(7, 11), *range(12, 20), *np.random.default_rng(4).integers(20, len(good), 60)]:
        bad = bytearray(good)
        bad[at] ^= 1 << int(at % 8)
        piece.path.write_bytes(bad)
        with pytest.raises(StoreError, match=r"frame\.bin: the frame at byte 7 is corrupt"):
            read_all([piece], fresh_slot(5000))


@pytest.mark.parametrize("plain", [b"", b"x" * 4999, b"x" * 5001])
def test_a_frame_of_another_length_is_corrupt(tmp_path: Path, plain: bytes) -> None:
    frame = zstandard.ZstdCompressor().compress(plain)
    (tmp_path / "frame.bin").write_bytes(frame)
    slot = fresh_slot(8192)
    with pytest.raises(StoreError, match="the frame at byte 0 is corrupt"):
        read_all([Piece(tmp_path / "frame.bin", 0, 5000, 0, len(frame), compressed=True)], slot)
    assert (slot[5000:] == UNTOUCHED).all()


def test_a_frame_that_claims_to_be_enormous_is_corrupt(tmp_path: Path) -> None:
    """A header of a content size of 2**56 bytes; unpacking it must not try to have them."""
    header = bytes.fromhex("28b52ffd") + bytes([0b1110_0000]) + (1 << 56).to_bytes(8, "little")
    (tmp_path / "frame.bin").write_bytes(header + bytes(50))
    with pytest.raises(StoreError, match="the frame at byte 0 is corrupt"):
        read_all([Piece(tmp_path / "frame.bin", 0, 5000, 0, 63, compressed=True)], fresh_slot(5000))


def test_a_missing_file_is_named(tmp_path: Path, nothing_left: None) -> None:
    with Reader() as reader, pytest.raises(StoreError, match=r"gone\.bin is gone"):
        reader.read([Piece(tmp_path / "gone.bin", 0, 1, 0, 1)], fresh_slot(1))


def test_a_file_that_may_not_be_read_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with Reader() as reader, pytest.raises(EnvironmentUnsupportedError, match=r"random\.bin: Permission denied"):
        reader.direct(file)


def test_a_failing_disk_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reader() as reader:
        reader.direct(file)  # opened, so that only the read fails
        monkeypatch.setattr(os, "preadv", _fail)
        with pytest.raises(StoreError, match=r"cannot read .*random\.bin at byte 0: Input/output error"):
            reader.read([Piece(file, 0, 9, 0, 9)], fresh_slot(9)).wait()


def _fail(*_: object) -> int:
    raise OSError(errno.EIO, "Input/output error")


def test_one_bad_read_leaves_the_others_right(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(b"")
    good, bad = Piece(file, 0, SIZE, 0, SIZE), Piece(tmp_path / "cut", 0, 9, 0, 9)
    slot = fresh_slot(SIZE)
    with Reader() as reader:
        tickets = [reader.read([piece], fresh_slot(9) if piece is bad else slot) for piece in (bad, good, bad)]
        with pytest.raises(StoreError):
            tickets[0].wait()
        tickets[1].wait()
        with pytest.raises(StoreError):
            tickets[2].wait()
        with pytest.raises(StoreError):
            tickets[2].wait()  # and says so again
    assert bytes_of(good, slot) == file.read_bytes()


# ---------------------------------------------------------------- lifetime


def test_nothing_is_left_after_close(file: Path, nothing_left: None) -> None:
    for _ in range(3):
        reader = Reader()
        reader.read([Piece(file, 1, 60_000, 0, 60_000)], fresh_slot(60_000)).wait()
        assert descriptors() > 3
        assert any(thread.name.startswith("tiercache-reader") for thread in threading.enumerate())
        reader.close()
        reader.close()  # harmless
        assert not any(thread.name.startswith("tiercache-reader") for thread in threading.enumerate())


def test_nothing_is_left_when_a_read_fails(tmp_path: Path, nothing_left: None) -> None:
    (tmp_path / "cut").write_bytes(b"")
    with pytest.raises(StoreError):
        read_all([Piece(tmp_path / "cut", 0, 9, 0, 9)], fresh_slot(9))


def test_use_after_close_is_refused(file: Path) -> None:
    reader = Reader()
    reader.close()
    with pytest.raises(ClosedError, match="reader is closed"):
        reader.read([Piece(file, 0, 9, 0, 9)], fresh_slot(9))


class SlowDisk:
    """`os.preadv` after a while; `begun` is set when the first read starts."""

    def __init__(self, delay_s: float) -> None:
        self.begun, self._delay_s, self._read = threading.Event(), delay_s, os.preadv

    def __call__(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        self.begun.set()
        time.sleep(self._delay_s)
        return self._read(descriptor, buffers, offset)


@pytest.fixture
def slow_disk(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Reader, SlowDisk]]:
    """A reader that has the file open, on a disk that takes 50 ms a read."""
    with Reader(threads=2, chunk_bytes=BLOCK_BYTES) as reader:
        reader.direct(file)
        disk = SlowDisk(0.05)
        monkeypatch.setattr(os, "preadv", disk)
        yield reader, disk


def settled(slot: Buffer) -> bool:
    """Nobody writes to `slot` any more: longer than the slow disk takes, nothing changes."""
    before = slot.copy()
    time.sleep(0.15)
    return bool((slot == before).all())


def test_after_cancel_nobody_writes(file: Path, slow_disk: tuple[Reader, SlowDisk]) -> None:
    reader, disk = slow_disk
    slot = fresh_slot(SIZE)
    ticket = reader.read([Piece(file, 0, SIZE, 0, SIZE)], slot)
    assert disk.begun.wait(5)
    assert not ticket.done()
    ticket.cancel()
    assert ticket.done()
    assert settled(slot)
    assert (slot == UNTOUCHED).any()  # it really was given up


def test_close_waits_for_reads_in_flight(file: Path, slow_disk: tuple[Reader, SlowDisk]) -> None:
    reader, disk = slow_disk
    slot = fresh_slot(SIZE)
    reader.read([Piece(file, 0, SIZE, 0, SIZE)], slot)
    assert disk.begun.wait(5)
    reader.close()
    assert settled(slot)


def test_a_read_given_up_by_close_says_so(file: Path, slow_disk: tuple[Reader, SlowDisk]) -> None:
    reader, disk = slow_disk
    ticket = reader.read([Piece(file, 0, SIZE, 0, SIZE)], fresh_slot(SIZE))
    assert disk.begun.wait(5)
    reader.close()
    with pytest.raises(ClosedError):
        ticket.wait()


def test_cancel_after_close_returns(file: Path, slow_disk: tuple[Reader, SlowDisk]) -> None:
    reader, disk = slow_disk
    ticket = reader.read([Piece(file, 0, SIZE, 0, SIZE)], fresh_slot(SIZE))
    assert disk.begun.wait(5)
    reader.close()
    canceller = threading.Thread(target=ticket.cancel, daemon=True)
    canceller.start()
    canceller.join(1)
    assert not canceller.is_alive()


def test_a_refused_read_leaves_the_slot_alone(file: Path, tmp_path: Path, slow_disk: tuple[Reader, SlowDisk]) -> None:
    """Without a ticket the caller cannot wait, and will use its slot for something else."""
    reader, _ = slow_disk
    slot = fresh_slot(SIZE)
    with pytest.raises(StoreError, match="gone"):
        reader.read([Piece(file, 0, SIZE, 0, SIZE), Piece(tmp_path / "gone", 0, 1, 0, 1)], slot)
    assert settled(slot)
