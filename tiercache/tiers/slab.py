"""The memory of a tier: one piece of bytes, on the host or on a device, cut into slots by offset.

Knows nothing of what lies in it.
"""

import torch

from tiercache.errors import EnvironmentUnsupportedError
from tiercache.tiers.device import PinnedMemory, device_of


class Slab:
    """`nbytes` of uint8 memory whose first byte lies at a multiple of 4096.

    On the host it is made of huge pages where the system has them. Its memory goes when the last tensor over it does.

    With `pinned_for` it is page-locked, so that this device can copy from it at full speed and without waiting, until
    `close` or, without one, as long as the memory is there.

    Raises:
        EnvironmentUnsupportedError: the memory is not to be had.
    """

    def __init__(self, nbytes: int, device: torch.device, *, pinned_for: torch.device | None = None) -> None:
        self._pinned: PinnedMemory | None = None
        try:
            if pinned_for is not None and device_of(pinned_for).wants_pinned:
                self._pinned = PinnedMemory(nbytes, device_of(pinned_for))
                self.bytes = self._pinned.bytes
            else:
                self.bytes = device_of(device).allocate(nbytes)
        except (RuntimeError, OSError) as error:
            kind = f"memory on {device}" if pinned_for is None else f"main memory, pinned for {pinned_for},"
            raise EnvironmentUnsupportedError(
                f"{nbytes} bytes of {kind} are not to be had ({str(error).splitlines()[0]}); ask for a smaller budget"
            ) from error

    def close(self) -> None:
        """Unlock pinned memory, once the device has done all that it was asked for; harmless when done twice."""
        if self._pinned is not None:
            self._pinned.unlock()
            self._pinned = None

    def slot(self, offset: int, nbytes: int) -> torch.Tensor:
        """The bytes [offset, offset + nbytes), as uint8."""
        return self.bytes[offset : offset + nbytes]
