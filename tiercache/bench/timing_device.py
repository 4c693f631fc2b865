"""The devices that kernels are timed on: their clock, their roof, and memory laid out as the tiers lay it out.

Knows the kernels' contract; nothing of which matrices are multiplied.
"""

import itertools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from profiler.host_memory import host_memory
from tiercache.bench.memory_roof import dram_roof
from tiercache.config.sizes import human
from tiercache.errors import DoesNotFitError
from tiercache.kernels.contract import Kernels
from tiercache.kernels.select import select
from tiercache.tiers.device import device_of
from tiercache.tiers.slab import Slab

_CACHES = Path("/sys/devices/system/cpu")
_CACHE_FILES = ("level", "shared_cpu_list", "size")
_UNKNOWN_CACHE_BYTES, _UNKNOWN_GPU_CACHE_BYTES = 32 << 20, 64 << 20
_ROOF_REPEATS = 8


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        least_s, least_samples: of each case, whichever takes longer.
        caches: the working set exceeds the last-level cache by this factor, and is `least_bytes` or more.
        roof_bytes: read to measure the roof.
    """

    least_s: float = 0.3
    least_samples: int = 3
    caches: int = 8
    least_bytes: int = 256 << 20
    roof_bytes: int = 1 << 30


class TimingDevice:
    """A device to time kernels on.

    Args:
        device: where activations lie.
        cache_bytes: of the cache that the working set has to exceed.
        kernels: the backend; by default the one that is chosen for the device.

    Attributes:
        label: its name in the results.
    """

    def __init__(self, device: torch.device, cache_bytes: int, kernels: Kernels | None = None) -> None:
        self.torch_device, self.cache_bytes, self.label = device, cache_bytes, str(device)
        self.kernels = kernels or select(device)

    def memory(self, nbytes: int) -> Tensor:
        """Bytes to lay matrices out in."""
        return Slab(nbytes, self.torch_device).bytes

    def roof_gbps(self, effort: Effort, memory: Tensor) -> float:
        """What reading `memory` from the device, or other memory like it, reaches at most, measured now."""
        raise NotImplementedError

    def ready(self, call: Callable[[int], object], copies: int) -> tuple[Callable[[], object], int]:
        """What makes some calls, each of another number, and how many; `call` was made twice before.

        `copies`: after how many numbers the same weights come again.
        """
        numbers = itertools.count(2)
        return lambda: call(next(numbers)), 1

    def wait(self) -> None:
        """Return when all work that was started is done."""
        device_of(self.torch_device).synchronize()


class TimingCpu(TimingDevice):
    """This machine's processor and main memory, in huge pages as the tiers' slabs are."""

    def __init__(self, kernels: Kernels | None = None) -> None:
        super().__init__(torch.device("cpu"), last_level_cache_bytes(), kernels)

    def memory(self, nbytes: int) -> Tensor:
        free = host_memory().free_bytes
        if nbytes > free:
            raise DoesNotFitError(
                f"the matrices to rotate take {human(nbytes)} and {human(free)} of main memory are free: "
                f"{nbytes - free} bytes are missing; close other programs or name a smaller --kernel-shapes",
                missing_bytes=nbytes - free,
            )
        return super().memory(nbytes)

    def roof_gbps(self, effort: Effort, memory: Tensor) -> float:
        return dram_roof(memory.numpy().data)


class TimingCuda(TimingDevice):
    """A GPU and its own memory.

    Calls that are timed are one CUDA graph: their seconds are the card's, without the processor's for each launch.
    """

    _CALLS = 64  # between two looks at the clock, which take about as long as a small product

    def __init__(self, device: torch.device) -> None:
        properties = torch.cuda.get_device_properties(device)
        super().__init__(device, int(getattr(properties, "L2_cache_size", _UNKNOWN_GPU_CACHE_BYTES)))

    def roof_gbps(self, effort: Effort, memory: Tensor) -> float:
        """The better of a copy within the device, which moves each byte twice, and a sum."""
        source = torch.ones(effort.roof_bytes // 4, device=self.torch_device)
        target = torch.empty_like(source)
        copied = 2 * self.best_gbps(lambda: target.copy_(source), source.nbytes)
        return max(copied, self.best_gbps(source.sum, source.nbytes))

    def ready(self, call: Callable[[int], object], copies: int) -> tuple[Callable[[], object], int]:
        graph, count = torch.cuda.CUDAGraph(), max(self._CALLS, copies)  # or the same weights would come from the cache
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for number in range(count):
                call(number)
        graph.replay()  # the first takes its way to the card
        return graph.replay, count

    def best_gbps(self, read: Callable[[], object], nbytes: int) -> float:
        """GB/s of the fastest of some reads of `nbytes`, after one that warms up."""
        best = float("inf")
        for _ in range(1 + _ROOF_REPEATS):
            self.wait()
            begin = time.perf_counter()
            read()
            self.wait()
            best = min(best, time.perf_counter() - begin)
        return nbytes / best / 1e9


def devices() -> tuple[TimingDevice, ...]:
    """The processor and, where there is one, the current GPU."""
    if not torch.cuda.is_available():
        return (TimingCpu(),)
    return TimingCpu(), TimingCuda(torch.device("cuda", torch.cuda.current_device()))


def working_set_bytes(device: TimingDevice, effort: Effort) -> int:
    """Bytes to rotate through so that each call finds none of its weights in a cache."""
    return max(effort.least_bytes, effort.caches * device.cache_bytes)


def median_s(device: TimingDevice, call: Callable[[int], object], effort: Effort, copies: int) -> float:
    """Seconds of one call: the median, after two that warm up. `call` is told its number, and has so many weights."""
    for number in range(2):
        call(number)
    calls, count = device.ready(call, copies)
    device.wait()
    samples: list[float] = []
    begun = time.perf_counter()
    while len(samples) < effort.least_samples or time.perf_counter() - begun < effort.least_s:
        begin = time.perf_counter()
        calls()
        device.wait()
        samples.append((time.perf_counter() - begin) / count)
    return statistics.median(samples)


def last_level_cache_bytes() -> int:
    """Of all processors that this process may run on together; a guess where the system does not say."""
    sizes: dict[tuple[int, str], int] = {}
    for cpu in os.sched_getaffinity(0):
        for folder in (_CACHES / f"cpu{cpu}" / "cache").glob("index*"):
            try:
                level, shared, size = ((folder / name).read_text().strip() for name in _CACHE_FILES)
            except OSError:
                continue
            if size.endswith("K") and level.isdigit():
                sizes[int(level), shared] = int(size[:-1]) << 10
    last = max((level for level, _ in sizes), default=0)
    return sum(size for (level, _), size in sizes.items() if level == last) or _UNKNOWN_CACHE_BYTES
