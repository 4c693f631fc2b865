"""Measures a card and the link to it: its memory, its products, its attention, and copies of each kind.

Everything goes through `Device`, so the processor can stand in for a card. Knows no models.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from profiler.figure import Figure, measured
from profiler.hardware import Gpu, Hardware, Memory, catalogue
from tiercache.bench.layer_probe import Roofs
from tiercache.bench.undisturbed import Watch, seconds_of
from tiercache.tiers.device import CpuDevice, Device, pin, unpin

REPEATS = 7
BYTES = 256 << 20  # more than any card's cache
BLOCKS = (64 << 10, 1 << 20, 16 << 20)
GEMM = 4096  # rows, columns and tokens of a product that operations bind
_HEADS, _HEAD_DIM, _ATTENDED = 32, 128, 1024
_LIKELY = "3090"  # whose power and data type a card has that no table knows
_TYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class CardFigures:
    """What was measured.

    Attributes:
        gpu: the card, its memory and its link.
        copies: 1e9 bytes a second of copies, by what is copied and how.
        latency_s: what a copy takes beside its bytes.
        attention_gflops: 1e9 operations a second of attention over a prompt.
    """

    gpu: Gpu
    copies: dict[str, Figure]
    latency_s: float
    attention_gflops: Figure

    @property
    def roofs(self) -> Roofs:
        """Of the card."""
        return Roofs(self.gpu.memory.gbps.value, self.gpu.tflops.value * 1e3, self.attention_gflops.value)

    def beside(self, machine: Hardware) -> Hardware:
        """The machine with its card."""
        return replace(
            machine,
            gpu=self.gpu,
            copies=self.copies,
            link_latency_s=self.latency_s,
            attention_gflops=self.attention_gflops,
        )


class CardProbe:
    """Measures one card; takes 512 MiB of it and of main memory meanwhile.

    Args:
        device: the card.
        watch: looks for what disturbs.
    """

    def __init__(self, device: Device, watch: Watch) -> None:
        self._device, self._watch = device, watch

    def measure(self) -> CardFigures:
        """All of it, in some seconds."""
        name = self._device.name
        known = catalogue().gpu_of_driver(name) or replace(catalogue().gpu(_LIKELY), name=name)
        dtype = _TYPES[known.compute_type]
        free = self._device.free_bytes()
        capacity = known.memory.capacity_bytes if free is None else free[1]
        copies, latency_s = self._copies()
        gpu = replace(
            known,
            memory=Memory(capacity, self._memory()),
            tflops=self._products(dtype).scaled(1e-3),
            link_gbps=copies["pinned, up"],
        )
        self._device.release_cache()
        return CardFigures(gpu, copies, latency_s, self._attention(dtype))

    def _copies(self) -> tuple[dict[str, Figure], float]:
        """Of large blocks in both directions, from pinned and from pageable memory, and of small blocks up."""
        there, other = self._device.allocate(BYTES), self._device.allocate(BYTES)
        host = CpuDevice(torch.device("cpu"))
        pinned, landing, pageable = host.allocate(BYTES), host.allocate(BYTES), host.allocate(BYTES)
        for memory in (pinned, landing, pageable):
            memory.fill_(1)
        locked = [pin(memory) for memory in (pinned, landing)] if self._device.wants_pinned else []
        up, down = partial(self._copy, there, pinned), partial(self._copy, landing, other)
        try:
            found = {
                "pinned, up": self._gbps(up, BYTES),
                "pinned, down": self._gbps(down, BYTES),
                "pinned, each way at once": self._gbps(partial(_together, up, down), BYTES),
                "pageable, up": self._gbps(partial(self._copy, there, pageable), BYTES),
            }
            for block in BLOCKS:
                found[f"pinned, up, {block >> 10} KiB"] = self._gbps(
                    partial(self._copy, there[:block], pinned[:block]), block
                )
        finally:
            for address in locked:
                unpin(address)
        smallest, gbps = BLOCKS[0], found["pinned, up"].value
        taken_s = smallest / (found[f"pinned, up, {smallest >> 10} KiB"].value * 1e9)
        return found, max(0.0, taken_s - smallest / (gbps * 1e9))

    def _memory(self) -> Figure:
        """The card's own: a copy reads and writes every byte."""
        source, target = self._device.allocate(BYTES), self._device.allocate(BYTES)
        source.fill_(1)
        found = self._gbps(partial(self._done, partial(target.copy_, source)), 2 * BYTES)
        return replace(found, source="copies within it, read and written bytes")

    def _products(self, dtype: torch.dtype) -> Figure:
        """1e9 operations a second; the fastest, for it is to bound others."""
        left, right = torch.randn(2, GEMM, GEMM, device=self._device.at).to(dtype)
        once = partial(self._done, partial(torch.mm, left, right))
        once()
        rates = [2 * GEMM**3 / each / 1e9 for each in self._watch.timed({"": once}, {"": REPEATS})[""]]
        return replace(measured(rates, f"torch, {dtype}"), value=max(rates))

    def _attention(self, dtype: torch.dtype) -> Figure:
        """1e9 operations a second of attention over a prompt, each token to those before it."""
        query, key, value = torch.randn(3, 1, _HEADS, _ATTENDED, _HEAD_DIM, device=self._device.at).to(dtype)
        attend = partial(scaled_dot_product_attention, query, key, value, is_causal=True)
        operations = 4 * _HEADS * _HEAD_DIM * _ATTENDED * (_ATTENDED + 1) / 2
        once = partial(self._done, attend)
        once()
        seconds = self._watch.timed({"": once}, {"": REPEATS})[""]
        return measured([operations / each / 1e9 for each in seconds], f"torch, {dtype}, causal")

    def _gbps(self, once: Callable[[], object], nbytes: int) -> Figure:
        once()
        rates = self._watch.sample(lambda: nbytes / seconds_of(once) / 1e9, REPEATS)
        return measured(rates, f"copies of {nbytes >> 10} KiB")

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with self._device.copies().after(None):
            target.copy_(source, non_blocking=True)

    def _done(self, work: Callable[[], object]) -> None:
        work()
        self._device.synchronize()


def _together(first: Callable[[], None], second: Callable[[], None]) -> None:
    beside = threading.Thread(target=second)
    beside.start()
    first()
    beside.join()
