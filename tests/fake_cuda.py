"""A CUDA device that does everything at once on the CPU and records what a real one would have been free to reorder.

In the spirit of a race detector (FastTrack, PLDI 2009): each stream, and the host, has a vector clock. Events carry
clocks; a launch comes after all that the host knows. Two accesses to the same bytes, one of them a write, must be
ordered by these clocks, or it is a fault. The host's threads count as one: what they do among one another is not looked
into.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

from tiercache.kernels.reference import ReferenceKernels
from tiercache.tiers import device as devices
from tiercache.tiers.device import CudaDevice
from tiercache.tiers.slab import Slab
from tiercache.tiers.stack import TierStack

Clock = dict[str, int]
HOST = "the host"
HUGE = 1 << 40


def _join(clock: Clock, other: Clock) -> None:
    for actor, tick in other.items():
        clock[actor] = max(clock.get(actor, 0), tick)


@dataclass(frozen=True)
class _Access:
    start: int
    end: int
    write: bool
    actor: str
    tick: int
    what: str


@dataclass
class _Region:
    """Memory that the library has asked for."""

    start: int
    end: int
    pinned: bool
    over: str = ""  # why nobody may touch it any more
    accesses: list[_Access] = field(default_factory=list)


class Ordering:
    """What was done to which bytes, and in which order it had to be.

    Attributes:
        faults: what was not ordered, or touched memory that was given back.
        asked: calls of torch.cuda so far; `interrupt_at` raises KeyboardInterrupt before that one, in the main thread.
        registered: page-locked memory by its address: its bytes, and the device that was current.
        unlocked_for: devices that were current when memory was unlocked.
    """

    def __init__(self) -> None:
        self.faults: list[str] = []
        self.asked, self.interrupt_at = 0, -1
        self.registered: dict[int, tuple[int, torch.device]] = {}
        self.unlocked_for: list[torch.device] = []
        self.host: Clock = {HOST: 0}
        self.streams: list[Stream] = []
        self.lock = threading.RLock()
        self._regions: list[_Region] = []

    @property
    def taken_bytes(self) -> int:
        """Of the device's memory that somebody holds."""
        with self.lock:
            return sum(region.end - region.start for region in self._regions if not region.pinned)

    def ask(self) -> None:
        """The library calls torch.cuda."""
        with self.lock:
            if threading.current_thread() is not threading.main_thread():
                return
            self.asked += 1
            if self.asked == self.interrupt_at:
                raise KeyboardInterrupt

    def allocated(self, memory: torch.Tensor, *, pinned: bool) -> None:
        """Memory to look after; whatever lay there before is forgotten."""
        start, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
        weakref.finalize(memory.untyped_storage(), self.freed, start)
        if not memory.nbytes:
            return
        with self.lock:
            self._regions = [region for region in self._regions if region.end <= start or end <= region.start]
            self._regions.append(_Region(start, end, pinned))

    def freed(self, start: int) -> None:
        """The memory is anybody's: nobody is left who could touch it."""
        with self.lock:
            self._regions = [region for region in self._regions if region.start != start]

    def given_back(self, start: int, why: str) -> None:
        """The library needs a region no more: all that was done to it must be over by now."""
        with self.lock:
            for region in self._regions:
                if region.start <= start < region.end and not region.over:
                    self._touch(region, region.start, region.end, True, HOST, self.host, why)
                    region.over = why

    def touched(self, tensor: torch.Tensor, write: bool, what: str, stream: "Stream | None") -> None:
        """By a kernel or a copy on a stream; by the host without one."""
        start = tensor.data_ptr()
        end = start + tensor.element_size() * (1 + sum((n - 1) * step for n, step in _steps(tensor)))
        with self.lock:
            for region in self._regions:
                if start < region.end and region.start < end:
                    actor, clock = (HOST, self.host) if stream is None else (stream.name, stream.clock)
                    self._touch(region, start, end, write, actor, clock, what)

    def pinned(self, tensor: torch.Tensor) -> bool | None:
        """Whether it lies in main memory that is looked after, or in the device's; None elsewhere."""
        with self.lock:
            for region in self._regions:
                if region.start <= tensor.data_ptr() < region.end:
                    return region.pinned
        return None

    def launch(self, stream: "Stream") -> None:
        """Something is queued: it comes after all that the host knows."""
        with self.lock:
            _join(stream.clock, self.host)
            stream.clock[stream.name] += 1

    def on_host(self) -> None:
        """The host does something."""
        with self.lock:
            self.host[HOST] += 1

    def _touch(self, region: _Region, start: int, end: int, write: bool, actor: str, clock: Clock, what: str) -> None:
        if region.over:
            self.faults.append(f"{what} on {actor} after {region.over}")
            return
        kept = []
        for old in region.accesses:
            overlaps = old.start < end and start < old.end
            ordered = clock.get(old.actor, 0) >= old.tick
            if overlaps and (write or old.write) and not ordered:
                self.faults.append(f"{what} on {actor} is not after {old.what} on {old.actor}")
            if not (ordered and start <= old.start and old.end <= end and (write or not old.write)):
                kept.append(old)
        region.accesses = [*kept, _Access(start, end, write, actor, clock[actor], what)]


def _steps(tensor: torch.Tensor) -> Iterator[tuple[int, int]]:
    yield from zip(tensor.shape, tensor.stride(), strict=True)


class Stream:
    """Stands for torch.cuda.Stream."""

    current = threading.local()

    def __init__(self, device: object = None, **_: object) -> None:
        ordering = _ordering()
        ordering.ask()
        self.name = f"stream {len(ordering.streams)}"
        self.clock: Clock = {self.name: 0}
        ordering.streams.append(self)

    def wait_event(self, event: "Event") -> None:
        _ordering().ask()
        _join(self.clock, event.clock)

    def wait_stream(self, other: "Stream") -> None:
        _ordering().ask()
        _join(self.clock, other.clock)

    def synchronize(self) -> None:
        _ordering().ask()
        with _ordering().lock:
            _join(_ordering().host, self.clock)


class Event:
    """Stands for torch.cuda.Event. It is never known to have happened before somebody has waited for it."""

    def __init__(self, **_: object) -> None:
        _ordering().ask()
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        ordering = _ordering()
        ordering.ask()
        stream = stream or current_stream()
        ordering.launch(stream)
        self.clock = dict(stream.clock)

    def query(self) -> bool:
        host = _ordering().host
        return all(host.get(actor, 0) >= tick for actor, tick in self.clock.items())

    def synchronize(self) -> None:
        _ordering().ask()
        with _ordering().lock:
            _join(_ordering().host, self.clock)

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


_CURRENT: list[Ordering] = []


def _ordering() -> Ordering:
    return _CURRENT[-1]


def current_stream(device: object = None) -> Stream:
    """Stands for torch.cuda.current_stream: the first stream of all, unless the thread has entered another."""
    found: Stream = getattr(Stream.current, "stream", None) or _ordering().streams[0]
    return found


@contextmanager
def stream(chosen: Stream) -> Iterator[None]:
    """Stands for torch.cuda.stream."""
    before = getattr(Stream.current, "stream", None)
    Stream.current.stream = chosen
    try:
        with nullcontext() if isinstance(_get_current_dispatch_mode(), Watching) else Watching():
            yield
    finally:
        Stream.current.stream = before


class Watching(TorchDispatchMode):
    """Tells of every operation of torch within, on the thread's current stream.

    An operation on main memory alone is the host's.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        ordering, result = _ordering(), func(*args, **(kwargs or {}))
        schema = func._schema
        if _is_view(schema):
            return result
        touched = [
            (tensor, bool(argument.alias_info and argument.alias_info.is_write))
            for argument, value in _arguments(schema, args, kwargs or {})
            for tensor in tree_leaves(value)
            if isinstance(tensor, torch.Tensor) and tensor.numel() and ordering.pinned(tensor) is not None
        ]
        if not touched:
            return result
        on = None if all(ordering.pinned(tensor) for tensor, _ in touched) else current_stream()
        if on is None:
            ordering.on_host()
        else:
            ordering.launch(on)
        for tensor, write in touched:
            ordering.touched(tensor, write, str(func), on)
        return result


def _is_view(schema: Any) -> bool:
    return any(each.alias_info is not None and not each.alias_info.is_write for each in schema.arguments)


def _arguments(schema: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    for number, argument in enumerate(schema.arguments):
        if number < len(args):
            yield argument, args[number]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


class FakeCudaDevice(CudaDevice):
    """The code for CUDA, on tensors of the CPU. Allocations may fail.

    Attributes:
        fail_at: the allocation, counted from 1, that fails; none by default.
        allocations: so far.
    """

    fail_at, allocations = -1, 0

    @classmethod
    def count(cls) -> None:
        """One more allocation."""
        cls.allocations += 1
        if cls.allocations == cls.fail_at:
            raise RuntimeError("out of memory, for a test")

    def allocate(self, nbytes: int) -> torch.Tensor:
        self.count()
        memory = super().allocate(nbytes)
        _ordering().allocated(memory, pinned=False)
        return memory


class _Runtime:
    """Stands for what torch.cuda.cudart() gives."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0)

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:  # noqa: N802 - CUDA's name
        FakeCudaDevice.count()
        _ordering().registered[address] = (nbytes, self.device)
        return 0

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802 - CUDA's name
        del _ordering().registered[address]
        _ordering().unlocked_for.append(self.device)
        _ordering().given_back(address, "its memory was unlocked")
        return 0


@contextmanager
def recording() -> Iterator[Ordering]:
    """torch's CPU is a CUDA device within, for the tiers, and what it does is recorded."""
    ordering, runtime, cuda = Ordering(), _Runtime(), torch.cuda
    _CURRENT.append(ordering)
    FakeCudaDevice.fail_at, FakeCudaDevice.allocations = -1, 0

    @contextmanager
    def device(at: torch.device) -> Iterator[None]:
        before, runtime.device = runtime.device, at
        yield
        runtime.device = before

    def synchronize(at: object = None) -> None:
        ordering.ask()
        with ordering.lock:
            for each in ordering.streams:
                _join(ordering.host, each.clock)

    read, close, pinned = TierStack._read, Slab.close, devices.PinnedMemory.__init__

    def reading(stack: TierStack, key: int, slot: torch.Tensor, after: Any) -> Any:
        ordering.on_host()
        ordering.touched(slot, True, "a read from the disk", None)
        return read(stack, key, slot, after)

    def closing(slab: Slab) -> None:
        close(slab)
        if slab.bytes.numel():
            ordering.given_back(slab.bytes.data_ptr(), "its slab was closed")

    def pinning(memory: Any, nbytes: int, at: Any) -> None:
        pinned(memory, nbytes, at)
        ordering.allocated(memory.bytes, pinned=True)

    with pytest.MonkeyPatch.context() as patch:
        for name, fake in {
            "Stream": Stream,
            "Event": Event,
            "stream": stream,
            "current_stream": current_stream,
            "device": device,
            "synchronize": synchronize,
            "cudart": lambda: runtime,
            "empty_cache": lambda: None,
            "is_initialized": lambda: True,
            "mem_get_info": lambda at=None: (HUGE, HUGE),
            "max_memory_reserved": lambda at=None: 0,
            "reset_peak_memory_stats": lambda at=None: None,
            "get_device_name": lambda at=None: "a fake",
        }.items():
            patch.setattr(cuda, name, fake)
        patch.setattr(devices, "CpuDevice", FakeCudaDevice)
        patch.setattr(TierStack, "_read", reading)
        patch.setattr(Slab, "close", closing)
        patch.setattr(devices.PinnedMemory, "__init__", pinning)
        patch.setattr("tiercache.engine.machine.select", ReferenceKernels)
        Stream()
        try:
            with Watching():
                yield ordering
        finally:
            _CURRENT.pop()
