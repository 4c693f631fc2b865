"""Where kernels are timed on a GPU: weights in its own memory, and weights that it reads over the link."""

import time
from collections.abc import Callable

import torch
from torch import Tensor

from tiercache.bench.timing_device import Effort, TimingDevice
from tiercache.bench.torch_peers import CUDA_PEERS, Peer
from tiercache.kernels.contract import Kernels
from tiercache.kernels.select import select
from tiercache.tiers.slab import Slab

_UNKNOWN_CACHE_BYTES = 64 << 20
_ROOF_REPEATS = 8


def devices() -> tuple[TimingDevice, ...]:
    """Those of the current GPU; none without one."""
    if not torch.cuda.is_available():
        return ()
    device = torch.device("cuda", torch.cuda.current_device())
    kernels = select(device)
    return CudaDevice(device, kernels), PinnedDevice(device, kernels)


class CudaDevice:
    """A GPU and its own memory. See `TimingDevice`."""

    batch = 16  # a look at the clock waits for the GPU, which takes about as long as a small product

    def __init__(self, device: torch.device, kernels: Kernels) -> None:
        self.torch_device, self.kernels, self.label = device, kernels, str(device)
        self.peers: tuple[Peer, ...] = CUDA_PEERS
        properties = torch.cuda.get_device_properties(device)
        self.cache_bytes = int(getattr(properties, "L2_cache_size", _UNKNOWN_CACHE_BYTES))

    def memory(self, nbytes: int) -> Tensor:
        """See `TimingDevice`."""
        return Slab(nbytes, self.torch_device).bytes

    def roof_gbps(self, effort: Effort, memory: Tensor) -> float:
        """The better of a copy within the device, which moves each byte twice, and a sum."""
        source = torch.ones(effort.roof_bytes // 4, device=self.torch_device)
        target = torch.empty_like(source)
        copied = 2 * self._rate(lambda: target.copy_(source), source.nbytes)
        return max(copied, self._rate(source.sum, source.nbytes))

    def wait(self) -> None:
        """See `TimingDevice`."""
        torch.cuda.synchronize(self.torch_device)

    def close(self) -> None:
        """See `TimingDevice`."""

    def _rate(self, work: Callable[[], object], nbytes: int) -> float:
        """GB/s of the fastest repeat, after one that warms up."""
        best = float("inf")
        for _ in range(1 + _ROOF_REPEATS):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            best = min(best, time.perf_counter() - begin)
        return nbytes / best / 1e9


class PinnedDevice(CudaDevice):
    """A GPU whose kernels read weights from pinned main memory themselves, over the link. See `TimingDevice`."""

    def __init__(self, device: torch.device, kernels: Kernels) -> None:
        super().__init__(device, kernels)
        self.label = f"{device}, weights in pinned memory"
        self.peers = ()
        self._slab: Slab | None = None

    def memory(self, nbytes: int) -> Tensor:
        """Pinned; what was handed out before is not pinned any more."""
        self.close()
        self._slab = Slab(nbytes, torch.device("cpu"), pinned=True)
        return self._slab.bytes

    def roof_gbps(self, effort: Effort, memory: Tensor) -> float:
        """One large copy of `memory`, which is pinned, to the device."""
        source = memory[: effort.roof_bytes]
        target = torch.empty_like(source, device=self.torch_device)
        return self._rate(lambda: target.copy_(source, non_blocking=True), source.nbytes)

    def close(self) -> None:
        """Unlock the memory handed out; harmless when done twice."""
        if self._slab is not None:
            self.wait()
            self._slab.close()
            self._slab = None
