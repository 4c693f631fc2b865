"""The rate at which this machine's main memory can be read: by the C library, or by the kernels' own reader.

Knows who reads; not what for.
"""

import torch

from profiler import probe
from tiercache.errors import EnvironmentUnsupportedError
from tiercache.kernels.cpu.backend import CpuKernels
from tiercache.kernels.select import select


def readers() -> list[probe.Reader]:
    """The kernels' reader, of eight places at a time; none where kernels cannot be compiled."""
    try:
        kernels = select(torch.device("cpu"))
    except EnvironmentUnsupportedError:
        return []
    return [kernels.read] if isinstance(kernels, CpuKernels) else []


def dram_roof(memory: memoryview | None = None, *, size_bytes: int = 1 << 30, repeats: int = 5) -> float:
    """See `probe.dram_read`."""
    return probe.dram_read(memory=memory, size_bytes=size_bytes, repeats=repeats, readers=readers())
