"""The memory of a tier: one piece of bytes, on the host or on a device, cut into slots by offset.

Knows nothing of what lies in it.
"""

import torch

from tiercache.errors import EnvironmentUnsupportedError
from tiercache.store.format import BLOCK_BYTES


class Slab:
    """`nbytes` of uint8 memory whose first byte lies at a multiple of 4096.

    Args:
        nbytes: its size.
        device: where it lies.
        pinned: page-locked, so that a GPU can copy from it at full speed and without waiting.

    Raises:
        EnvironmentUnsupportedError: the memory is not to be had.
    """

    def __init__(self, nbytes: int, device: torch.device, *, pinned: bool = False) -> None:
        try:
            raw = torch.empty(nbytes + BLOCK_BYTES, dtype=torch.uint8, device=device, pin_memory=pinned)
        except RuntimeError as error:
            kind = "pinned host memory" if pinned else f"memory on {device}"
            raise EnvironmentUnsupportedError(
                f"{nbytes} bytes of {kind} are not to be had ({str(error).splitlines()[0]}); ask for a smaller budget"
            ) from error
        start = -raw.data_ptr() % BLOCK_BYTES
        self.bytes = raw[start : start + nbytes]

    def slot(self, offset: int, nbytes: int) -> torch.Tensor:
        """The bytes [offset, offset + nbytes), as uint8."""
        return self.bytes[offset : offset + nbytes]
