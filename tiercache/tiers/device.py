"""What each kind of device does in its own way: memory, streams, events, and waiting for queued work.

No other module of tiers, models and kernels tests what kind of device it has. Knows torch; nothing of tiers or planes.
"""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from profiler.hugepages import HUGE_PAGE_BYTES, map_huge_pages

Event = torch.cuda.Event


def on_host(device: torch.device) -> bool:
    """Whether what lies on the device lies in main memory."""
    return device.type == "cpu"


def on_gpu(device: torch.device) -> bool:
    """Whether it is an NVIDIA GPU."""
    return device.type == "cuda"


class Copies:
    """The order of copies to a device or from it: each is done when its call returns."""

    @contextmanager
    def after(self, events: Iterable[Event] = ()) -> Iterator[None]:
        """Copies queued within begin after the events, and after what this object has queued before."""
        yield

    def arrival(self) -> Event | None:
        """An event after all that was queued so far; None where it is done already."""
        return None

    def wait(self) -> None:
        """Sleep until all that was queued so far is done."""
        if (event := self.arrival()) is not None:
            event.synchronize()


class StreamCopies(Copies):
    """As `Copies`, on a stream of their own: copies overlap with the kernels of other streams.

    Args:
        device: a GPU. Copies begin after what its current stream has queued by now.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def after(self, events: Iterable[Event] = ()) -> Iterator[None]:
        with torch.cuda.stream(self._stream):  # and its device
            for event in events:
                self._stream.wait_event(event)
            yield

    def arrival(self) -> Event:
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event


class PinnedMemory:
    """Main memory that a device copies from and to at full speed: page-locked until `unlock`, or as long as it lives.

    Locked memory is never given back to the system: should nobody unlock it, that is done when the last tensor over it
    goes. torch's own pinned allocator rounds up and keeps what it has.

    Args:
        nbytes: how much; its first byte lies at a multiple of 2 MiB.
        device: that copies.

    Attributes:
        bytes: uint8.

    Raises:
        RuntimeError: it cannot be had.
    """

    def __init__(self, nbytes: int, device: "Device") -> None:
        pages = np.frombuffer(map_huge_pages(nbytes), np.uint8)
        holder = _Holder(pages)
        lock = _Lock(device, pages)
        self.unlock = weakref.finalize(holder, lock.release)
        self.unlock.atexit = False  # type: ignore[misc]  # the process gives it back
        self.bytes = torch.from_numpy(np.asarray(holder))
        lock.take()


class _Holder:
    """What numpy's arrays and torch's tensors over some memory keep alive."""

    def __init__(self, pages: "np.typing.NDArray[np.uint8]") -> None:
        self.__array_interface__ = pages.__array_interface__
        self._pages = pages


class _Lock:
    """A page lock; it keeps the memory."""

    def __init__(self, device: "Device", pages: "np.typing.NDArray[np.uint8]") -> None:
        self._device, self._pages, self._taken = device, pages, False

    def take(self) -> None:
        if not self._pages.nbytes:
            return
        self._taken = True  # before: Ctrl-C may come between the call and the next line
        try:
            self._device.register(self._pages.ctypes.data, self._pages.nbytes)
        except RuntimeError:
            self._taken = False
            raise

    def release(self) -> None:
        if self._taken:
            self._taken = False
            self._device.synchronize()  # a copy may still be reading, or writing
            self._device.unregister(self._pages.ctypes.data)


class Standstill:
    """For how long a stream stood still for an event.

    Args:
        begin, end: recorded on it before and after; None where it did not stand.
    """

    def __init__(self, begin: Event | None, end: Event | None) -> None:
        self._begin, self._end = begin, end

    def seconds(self) -> float | None:
        """None while nobody knows."""
        if self._begin is None or self._end is None:
            return 0.0
        return float(self._begin.elapsed_time(self._end)) / 1e3 if self._end.query() else None


class Device:
    """A device whose work is done when a call returns.

    Attributes:
        at: torch's name for it.
        on_host: its memory is main memory.
        wants_pinned: copies from main memory are faster, and need not be waited for, if that memory is pinned.
        wants_aligned: its matrix kernels want tensors aligned.
    """

    on_host = wants_pinned = wants_aligned = False

    def __init__(self, at: torch.device) -> None:
        self.at = at

    @property
    def name(self) -> str:
        """What its maker calls it; empty for the processor."""
        return ""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """uint8 memory whose first byte lies at a multiple of 2 MiB."""
        raw = torch.empty(nbytes + HUGE_PAGE_BYTES, dtype=torch.uint8, device=self.at)
        start = -raw.data_ptr() % HUGE_PAGE_BYTES
        return raw[start : start + nbytes]

    def copies(self) -> Copies:
        """The order of copies to the device."""
        return Copies()

    def last_use(self) -> Event | None:
        """An event after everything that the current stream has queued; None where nothing is ever queued."""
        return None

    def follow(self, last: object) -> object:
        """The current stream. What it queues from now on begins after what `last`, found so before, has queued."""
        return None

    def stand_until(self, event: Event) -> Standstill:
        """What the current stream queues from now on begins after the event; the caller need not wait."""
        raise NotImplementedError

    def register(self, address: int, nbytes: int) -> None:
        """Page-lock main memory for copies of this device; see `PinnedMemory`."""

    def unregister(self, address: int) -> None:
        """Unlock what `register` has locked."""

    def synchronize(self) -> None:
        """Wait for all that is queued."""

    def synchronize_stream(self) -> None:
        """Wait for what this thread has queued on its current stream."""

    def free_bytes(self) -> tuple[int, int] | None:
        """Bytes free and in all of the device's own memory; None where that is not known."""
        return None

    def peak_bytes(self) -> int | None:
        """The most that torch has taken of the device's own memory since `reset_peak`; None where it is not counted."""
        return None

    def reset_peak(self) -> None:
        """Begin to count `peak_bytes` anew."""

    def release_cache(self) -> None:
        """Give back the memory that torch keeps for itself."""


class CpuDevice(Device):
    """The processor and main memory."""

    on_host = True

    def allocate(self, nbytes: int) -> torch.Tensor:
        """See `Device`; the pages are huge where the system has huge pages."""
        return torch.from_numpy(np.frombuffer(map_huge_pages(nbytes), np.uint8))


class CudaDevice(Device):
    """An NVIDIA GPU."""

    wants_pinned = wants_aligned = True

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.at)

    def copies(self) -> Copies:
        return StreamCopies(self.at)

    def last_use(self) -> Event:
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self.at))
        return event

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.at)

    def synchronize_stream(self) -> None:
        torch.cuda.current_stream(self.at).synchronize()

    def follow(self, last: object) -> object:
        stream = torch.cuda.current_stream(self.at)
        if isinstance(last, torch.cuda.Stream) and last != stream:
            stream.wait_stream(last)
        return stream

    def stand_until(self, event: Event) -> Standstill:
        stream = torch.cuda.current_stream(self.at)
        if event.query():
            return Standstill(None, None)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(stream)
        stream.wait_event(event)
        end.record(stream)
        return Standstill(begin, end)

    def register(self, address: int, nbytes: int) -> None:
        with torch.cuda.device(self.at):  # under another one that would open a context there
            code = torch.cuda.cudart().cudaHostRegister(address, nbytes, 0)
        if int(code) != 0:
            raise RuntimeError(f"cudaHostRegister gives error {int(code)}")

    def unregister(self, address: int) -> None:
        with torch.cuda.device(self.at):
            torch.cuda.cudart().cudaHostUnregister(address)

    def free_bytes(self) -> tuple[int, int]:
        free, total = torch.cuda.mem_get_info(self.at)
        return free, total

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_reserved(self.at)

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.at)

    def release_cache(self) -> None:
        if not torch.cuda.is_initialized():
            return  # nothing was ever on the device
        self.synchronize()
        # cuBLAS keeps a workspace of torch's, 36 MiB on an H200, and asks for it again. No public name clears it.
        clear_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
        with torch.cuda.device(self.at):
            if clear_workspaces is not None:
                clear_workspaces()
            torch.cuda.empty_cache()


def device_of(at: torch.device) -> Device:
    """The device called `at` by torch."""
    if on_host(at):
        return CpuDevice(at)
    return CudaDevice(at) if on_gpu(at) else Device(at)
