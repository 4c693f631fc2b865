"""The memory of a tier: one piece of bytes, on the host or on a device, cut into slots by offset.

Knows nothing of what lies in it.
"""

import mmap

import numpy as np
import torch

from tiercache.errors import EnvironmentUnsupportedError

# Direct reads into ordinary pages spend more on pinning each 4 KiB page than a fast disk takes to fill it: on one
# machine they reached 0.8-1.7 GB/s, and 1.9-3.0 GB/s into huge pages.
_HUGE_PAGE_BYTES = 2 << 20


class Slab:
    """`nbytes` of uint8 memory whose first byte lies at a multiple of 4096.

    On the host it is made of huge pages where the system has them. Its memory goes when the last tensor over it does.

    Args:
        nbytes: its size.
        device: where it lies.
        pinned: page-locked, so that a GPU can copy from it at full speed and without waiting.

    Raises:
        EnvironmentUnsupportedError: the memory is not to be had.
    """

    def __init__(self, nbytes: int, device: torch.device, *, pinned: bool = False) -> None:
        self._registered: int | None = None
        try:
            raw = _mapped(nbytes) if device.type == "cpu" else _allocated(nbytes, device)
            if pinned and nbytes:
                self._registered = _register(raw)
        except (RuntimeError, OSError) as error:
            kind = "pinned host memory" if pinned else f"memory on {device}"
            raise EnvironmentUnsupportedError(
                f"{nbytes} bytes of {kind} are not to be had ({str(error).splitlines()[0]}); ask for a smaller budget"
            ) from error
        start = -raw.data_ptr() % _HUGE_PAGE_BYTES
        self.bytes = raw[start : start + nbytes]

    def close(self) -> None:
        """Unlock pinned memory; harmless when done twice."""
        if self._registered is not None:
            torch.cuda.cudart().cudaHostUnregister(self._registered)
            self._registered = None

    def slot(self, offset: int, nbytes: int) -> torch.Tensor:
        """The bytes [offset, offset + nbytes), as uint8."""
        return self.bytes[offset : offset + nbytes]


def _register(raw: torch.Tensor) -> int:
    """Page-lock memory that is there already: torch's own pinned allocator rounds up and keeps what it once had."""
    code = torch.cuda.cudart().cudaHostRegister(raw.data_ptr(), raw.nbytes, 0)
    if int(code) != 0:
        raise RuntimeError(f"cudaHostRegister gives error {int(code)}")
    return raw.data_ptr()


def _mapped(nbytes: int) -> torch.Tensor:
    region = mmap.mmap(-1, nbytes + _HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= _HUGE_PAGE_BYTES:
        region.madvise(mmap.MADV_HUGEPAGE)
    return torch.from_numpy(np.frombuffer(region, np.uint8))


def _allocated(nbytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(nbytes + _HUGE_PAGE_BYTES, dtype=torch.uint8, device=device)
