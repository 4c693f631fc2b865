"""The memory of a tier: one piece of bytes, on the host or on a device, cut into slots by offset.

Knows nothing of what lies in it.
"""

import torch

from tiercache.errors import EnvironmentUnsupportedError
from tiercache.tiers.device import device_of, pin, unpin


class Slab:
    """`nbytes` of uint8 memory whose first byte lies at a multiple of 4096.

    On the host it is made of huge pages where the system has them. Its memory goes when the last tensor over it does.

    With `pinned` it is page-locked, so that a GPU can copy from it at full speed and without waiting.

    Raises:
        EnvironmentUnsupportedError: the memory is not to be had.
    """

    def __init__(self, nbytes: int, device: torch.device, *, pinned: bool = False) -> None:
        self._pinned_at: int | None = None
        try:
            self.bytes = device_of(device).allocate(nbytes)
            if pinned and nbytes:
                self._pinned_at = pin(self.bytes)
        except (RuntimeError, OSError) as error:
            kind = "pinned host memory" if pinned else f"memory on {device}"
            raise EnvironmentUnsupportedError(
                f"{nbytes} bytes of {kind} are not to be had ({str(error).splitlines()[0]}); ask for a smaller budget"
            ) from error

    def close(self) -> None:
        """Unlock pinned memory; harmless when done twice."""
        if self._pinned_at is not None:
            unpin(self._pinned_at)
            self._pinned_at = None

    def slot(self, offset: int, nbytes: int) -> torch.Tensor:
        """The bytes [offset, offset + nbytes), as uint8."""
        return self.bytes[offset : offset + nbytes]
