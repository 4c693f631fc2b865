"""Measures a card and the link to it: its memory, its products, its attention, and copies of each kind.

Everything goes through `Device`, so the processor can stand in for a card. Knows no models.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from profiler.figure import Figure, measured
from profiler.hardware import Gpu, Hardware, Memory, catalogue
from tiercache.bench.layer_probe import Roofs
from tiercache.bench.overlap import overlap_of
from tiercache.bench.undisturbed import Watch, seconds_of
from tiercache.tiers.device import Device
from tiercache.tiers.slab import Slab

REPEATS = 7
BYTES = 256 << 20  # more than any card's cache
BLOCKS = (64 << 10, 1 << 20, 16 << 20)
GEMM = 4096  # rows, columns and tokens of a product that operations bind
_QUEUED = 16  # calls before the card is waited for, so that launches and waiting do not show in roofs
_LARGE, _SMALL = 2, 32  # copies of large and of small blocks before they are waited for
_HEADS, _HEAD_DIM, _ATTENDED = 32, 128, 1024
_TYPES = {"fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class CardFigures:
    """What was measured.

    Attributes:
        gpu: the card, its memory and its link.
        copies: 1e9 bytes a second of copies, by what is copied and how.
        overlap: what of copies up overlaps with products.
        attention_gflops: 1e9 operations a second of attention over a prompt.
    """

    gpu: Gpu
    copies: dict[str, Figure]
    overlap: Figure
    attention_gflops: Figure

    @property
    def roofs(self) -> Roofs:
        """Of the card."""
        return Roofs(self.gpu.memory.gbps.value, self.gpu.tflops.value * 1e3, self.attention_gflops.value)

    def beside(self, machine: Hardware) -> Hardware:
        """The machine with its card. What a copy costs beside its bytes is in what each unit costs that is copied."""
        return replace(
            machine,
            gpu=self.gpu,
            copies=self.copies,
            link_latency_s=0.0,
            overlap=self.overlap,
            attention_gflops=self.attention_gflops,
        )


class CardProbe:
    """Measures one card; takes 512 MiB of it meanwhile, and 768 MiB of main memory.

    Args:
        device: the card.
        watch: looks for what disturbs.
        repeats: of each measurement.
    """

    def __init__(self, device: Device, watch: Watch, repeats: int = REPEATS) -> None:
        self._device, self._watch, self._repeats = device, watch, repeats

    def measure(self) -> CardFigures:
        """All of it, in some seconds.

        Raises:
            EnvironmentUnsupportedError: the memory is not to be had.
        """
        known = catalogue().gpu_or_likely(self._device.name)
        dtype = _TYPES[known.compute_type]
        free = self._device.free_bytes()
        capacity = known.memory.capacity_bytes if free is None else free[1]
        copies, overlap = self._copies(dtype)
        memory, products, attention = self._memory(), self._products(dtype), self._attention(dtype)
        gpu = replace(
            known,
            memory=Memory(capacity, memory),
            tflops=products.scaled(1e-3),
            link_gbps=copies["pinned, up"],
        )
        self._device.release_cache()
        return CardFigures(gpu, copies, overlap, attention)

    def _copies(self, dtype: torch.dtype) -> tuple[dict[str, Figure], Figure]:
        """Of large blocks in both directions, from pinned and pageable memory, and of small ones; and what overlaps."""
        host = torch.device("cpu")
        with ExitStack() as open_slabs:

            def slab(at: torch.device, *, pinned: bool = False) -> torch.Tensor:
                made = Slab(BYTES, at, pinned_for=self._device.at if pinned else None)
                open_slabs.callback(made.close)
                return made.bytes.fill_(1)

            there, other = slab(self._device.at), slab(self._device.at)
            fast, landing, pageable = slab(host, pinned=True), slab(host, pinned=True), slab(host)
            up, down = _Lane(self._device, there, fast), _Lane(self._device, landing, other)
            slow = _Lane(self._device, there, pageable)
            self._device.synchronize()  # what fills the memory runs on another stream
            found = {
                "pinned, up": self._gbps((up,)),
                "pinned, down": self._gbps((down,)),
                "pinned, each way at once": self._gbps((up, down)),
                "pageable, up": self._gbps((slow,), copies=1),
            }
            for block in BLOCKS:
                found[f"pinned, up, {block >> 10} KiB"] = self._gbps((up.of(block),), _SMALL)
            beside = "copies up beside products of the card"
            product = self._product(dtype)
            compute, bring = self._queued(product), partial(_all_at_once, (up,), _LARGE)

            def both() -> None:
                up.queue(_LARGE)
                for _ in range(_QUEUED):
                    product()
                up.wait()
                self._device.synchronize_stream()

            both()
            return found, overlap_of(self._watch, compute, bring, both, beside, self._repeats)

    def _memory(self) -> Figure:
        """The card's own, as a sum reads it."""
        memory = torch.ones(BYTES // 4, device=self._device.at)
        found = self._rates(memory.sum, BYTES)
        return measured(found, "sums")

    def _products(self, dtype: torch.dtype) -> Figure:
        """1e9 operations a second; the fastest, for it is to bound others."""
        rates = self._rates(self._product(dtype), 2 * GEMM**3)
        return replace(measured(rates, f"torch, {dtype}"), value=max(rates))

    def _product(self, dtype: torch.dtype) -> Callable[[], object]:
        left, right = torch.randn(2, GEMM, GEMM, device=self._device.at).to(dtype)
        return partial(torch.mm, left, right)

    def _attention(self, dtype: torch.dtype) -> Figure:
        """1e9 operations a second of attention over a prompt, each token to those before it."""
        query, key, value = torch.randn(3, 1, _HEADS, _ATTENDED, _HEAD_DIM, device=self._device.at).to(dtype)
        attend = partial(scaled_dot_product_attention, query, key, value, is_causal=True)
        operations = 4 * _HEADS * _HEAD_DIM * _ATTENDED * (_ATTENDED + 1) // 2
        return measured(self._rates(attend, operations), f"torch, {dtype}, causal")

    def _rates(self, work: Callable[[], object], amount: int) -> list[float]:
        """1e9 of what a call reads or computes, a second."""
        once = self._queued(work)
        once()
        return self._watch.sample(lambda: _QUEUED * amount / seconds_of(once) / 1e9, self._repeats)

    def _queued(self, work: Callable[[], object]) -> Callable[[], None]:
        def once() -> None:
            for _ in range(_QUEUED):
                work()
            self._device.synchronize_stream()

        return once

    def _gbps(self, lanes: Sequence["_Lane"], copies: int = _LARGE) -> Figure:
        """1e9 bytes a second of each lane, all at once."""
        once = partial(_all_at_once, lanes, copies)
        once()
        rates = self._watch.sample(lambda: copies * lanes[0].nbytes / seconds_of(once) / 1e9, self._repeats)
        return measured(rates, f"{copies} copies of {lanes[0].nbytes >> 10} KiB, one wait")


class _Lane:
    """Copies from one piece of memory to another, in an order of their own."""

    def __init__(self, device: Device, target: torch.Tensor, source: torch.Tensor) -> None:
        self._device, self._target, self._source, self._order = device, target, source, device.copies()
        self.nbytes = source.nbytes

    def of(self, nbytes: int) -> "_Lane":
        """Of the first bytes alone."""
        return _Lane(self._device, self._target[:nbytes], self._source[:nbytes])

    def queue(self, copies: int = 1) -> None:
        """So many more."""
        with self._order.after():
            for _ in range(copies):
                self._target.copy_(self._source, non_blocking=True)

    def wait(self) -> None:
        """Until all copies are done."""
        self._order.wait()


def _all_at_once(lanes: Sequence[_Lane], copies: int) -> None:
    """So many copies of each lane, all queued before any is waited for."""
    for lane in lanes:
        lane.queue(copies)
    for lane in lanes:
        lane.wait()
