"""What the halves of layers share on one card: who launches, and scratch memory.

Knows torch's memory; nothing of planes or layers.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.kernels.contract import Kernels
from tiercache.kernels.cuda.driver import Driver
from tiercache.kernels.cuda.mma_launches import LEAST_CAPABILITY

KINDS: Mapping[torch.dtype, int] = MappingProxyType({torch.float32: 0, torch.float16: 1, torch.bfloat16: 2})
"""Numbers of the dtypes in the kernels."""

_ALIGNMENT = 256


class Scratch:
    """Memory that lasts for one half of a layer, on one stream; all halves on that stream have the same.

    A stream does one call after another, so the next half may write where the last one still reads when the call is
    made. A block that has become too small is kept: calls made ready, and CUDA graphs, hold its address. Each is twice
    its predecessor at least, so that all of them take less than twice the last one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: dict[int, list[Tensor]] = {}

    def pieces(self, stream: int, sizes: Sequence[int]) -> list[int]:
        """Addresses of pieces of so many bytes; `stream` is torch's current one."""
        starts, end = [], 0
        for size in sizes:
            starts.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        blocks = self._blocks.setdefault(stream, [])
        if not blocks or blocks[-1].numel() < end:
            least = 2 * blocks[-1].numel() if blocks else 0
            blocks.append(torch.empty(max(end, least), dtype=torch.uint8, device=self._device))
        return [blocks[-1].data_ptr() + start for start in starts]

    @property
    def nbytes(self) -> int:
        """What all blocks take."""
        return sum(block.numel() for blocks in self._blocks.values() for block in blocks)


class SharedScratch:
    """The scratch of all halves that there are; it goes with the last of them, so a closed model leaves none.

    Args:
        device: where it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._live: Callable[[], Scratch | None] = lambda: None

    def of_halves(self) -> Scratch:
        """For a half to keep."""
        scratch = self._live()
        if scratch is None:
            scratch = Scratch(self._device)
            self._live = weakref.ref(scratch)
        return scratch

    @property
    def nbytes(self) -> int:
        """What it takes now."""
        scratch = self._live()
        return 0 if scratch is None else scratch.nbytes


@dataclass(frozen=True)
class Card:
    """What a half of a layer works with.

    Attributes:
        launcher: runs calls.
        device: where tensors are.
        switch: tokens up to which a half keeps its calls ready.
        kernels: of the same card, for passes of more tokens.
        scratch: see `SharedScratch`.
        lock: held while addresses are written and calls enqueued, so that the calls of two threads do not mix.
    """

    launcher: Driver
    device: torch.device
    switch: int
    kernels: Kernels
    scratch: SharedScratch
    lock: threading.Lock

    @property
    def by_matrix_units(self) -> bool:
        """Whether products along the input are mma.cu's, else they are rows.cu's."""
        return self.launcher.capability >= LEAST_CAPABILITY

    def floats(self, *shape: int) -> Tensor:
        """Memory for fp32 on the card."""
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def vector(self, what: str, given: Tensor | None, size: int, *, fp32: bool = False) -> int:
        """The address of `size` numbers in one piece; 0 for none.

        Raises:
            UsageError: they are something else.
        """
        if given is None:
            return 0
        known = given.dtype == torch.float32 if fp32 else given.dtype in KINDS
        if given.shape != (size,) or not given.is_contiguous() or not known:
            wanted = "fp32" if fp32 else "fp32, fp16 or bf16"
            raise UsageError(f"{what} is {given.dtype} {list(given.shape)}, expected {wanted} [{size}] in one piece")
        return self.launcher.address(given)


def bytes_of_floats(*shape: int) -> int:
    """Bytes of an fp32 tensor."""
    count = 4
    for size in shape:
        count *= size
    return count
