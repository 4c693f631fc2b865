"""Measures this machine as the cost model wants it: its memory, its disk, its card if it has one, and its layers.

Every figure is a median with its spread.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from policies.settings import DEFAULT
from profiler import probe
from profiler.figure import Figure, measured
from profiler.hardware import Hardware, Memory
from profiler.host_memory import host_memory
from profiler.hugepages import map_huge_pages
from profiler.matmul_rates import MatmulRates
from profiler.read_rates import ReadRate
from tiercache.bench.card_probe import REPEATS as CARD_REPEATS
from tiercache.bench.card_probe import CardProbe
from tiercache.bench.layer_probe import KINDS, LayerProbe, Roofs
from tiercache.bench.memory_roof import dram_roof
from tiercache.bench.overlap import REPEATS as OVERLAP_REPEATS
from tiercache.bench.overlap import overlap_of, together
from tiercache.bench.undisturbed import FasterError, Watch
from tiercache.config.sizes import human
from tiercache.errors import EnvironmentUnsupportedError
from tiercache.progress import bar, note
from tiercache.tiers.device import Device, device_of

REPEATS = 5
TOO_DISTURBED = 0.5  # of the measurements, above which no figure means anything
TOO_NOISY = 0.3  # spread of the memory's rate above which no figure means anything
_DRAM_BYTES, _DISK_BYTES = 512 << 20, 256 << 20
_LOADER = (DEFAULT.read_threads, DEFAULT.read_bytes)
# Threads and bytes of reads: sizes that the loader asks for, then other ways to ask for large ones; and one row of a
# token embedding after another.
_READS = (
    *((DEFAULT.read_threads, size) for size in (4 << 10, 64 << 10, 256 << 10, 1 << 20, DEFAULT.read_bytes, 4 << 20)),
    *((threads, DEFAULT.read_bytes) for threads in (1, 2, 8)),
    *((8, 1 << 20), (1, 4 << 10)),
)
_TYPICAL = "int8"  # whose overheads stand where a kind is not asked for
_FIRST = ("int8", "int4", "source", "int3")  # where there may be no time for all
_LEAST_READS = 256  # of one measurement of small reads; large ones read the file once
_HEADS, _HEAD_DIM, _ATTENDED = 16, 64, 512
_GEMM = 2048  # rows, columns and tokens of a product that operations bind, not bytes


def probe_machine(
    folder: Path,
    device: torch.device,
    *,
    noisy: bool = False,
    quick: bool = False,
    show_progress: bool | None = None,
) -> Hardware:
    """Measure for one to three minutes.

    Args:
        folder: on the disk that stores lie on; a file is written there and removed again.
        device: that computes.
        noisy: keep the figures of a machine that is never quiet; their spread tells how far they may be off.
        quick: in less than a minute, with fewer sizes and repeats, and little patience with other programs.
        show_progress: draw a bar, and tell what each step took; None draws it where standard error is a terminal.

    Raises:
        EnvironmentUnsupportedError: the folder takes no file, or other programs make the figures worthless.
    """
    effort, usual, restart = QUICK if quick else FULL, None, not quick
    while True:  # it ends: each time the usual pace is a quarter faster than before
        in_all_s, look_on_s = effort.patience_in_all_s, effort.look_on_s
        watch = Watch(effort.patience_s, usual, may_restart=restart, in_all_s=in_all_s, look_on_s=look_on_s)
        try:
            return _Probe(folder, device_of(device), watch, effort, noisy, show_progress).measure()
        except FasterError as error:
            usual = error.pace
            note("the machine has become faster; measuring again", show=show_progress)


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        repeats: of each measurement; None as many as this file says.
        read_s: that one measurement of reads may take.
        patience_s, patience_in_all_s, look_on_s: see `Watch`.
        layers_s: after which no more kinds of weights are begun; those left out go by the nearest.
        quick: see `LayerProbe`.
    """

    repeats: int | None = None
    read_s: float = 1.0
    patience_s: float = 4.0
    patience_in_all_s: float = 90.0
    look_on_s: float | None = None
    layers_s: float = float("inf")
    quick: bool = False


FULL = Effort()
QUICK = Effort(repeats=3, read_s=0.1, patience_s=0.3, patience_in_all_s=5.0, look_on_s=3.0, layers_s=25.0, quick=True)


class _Probe:
    """One try; see `probe_machine`."""

    def __init__(
        self, folder: Path, device: Device, watch: Watch, effort: Effort, noisy: bool, show_progress: bool | None
    ) -> None:
        self._folder, self._device, self._watch, self._effort = folder, device, watch, effort
        self._noisy, self._show_progress = noisy, show_progress
        self._repeats = effort.repeats or REPEATS

    def measure(self) -> Hardware:
        """All of it."""
        with bar("measuring this machine", 3 + len(KINDS), show=self._show_progress) as advance:
            with self._step("reads of the disk"):
                reads, overlap = self._disk()
            advance(2)
            with self._step("main memory and the processor"):
                dram, attention, gemm = self._dram(), _attention(self._watch), _gemm(self._watch)
            advance(1)
            card = None
            if not self._device.on_host:
                with self._step("the card and its link"):
                    card = CardProbe(self._device, self._watch, self._effort.repeats or CARD_REPEATS).measure()
            roofs = Roofs(dram.value, gemm.value, attention.value) if card is None else card.roofs
            rates = self._layers(roofs, advance, hbm=card is not None)
        self._refuse_noise()
        typical, watch = rates.get(_TYPICAL) or next(iter(rates.values())), self._watch
        found = Hardware(
            gpu=None,
            dram=Memory(host_memory().free_bytes, dram),
            cpu_gflops=gemm,
            ssd_gbps=next(rate.gbps for rate in reads if (rate.threads, rate.block_bytes) == _LOADER),
            overlap=overlap,
            layer_s=typical.layer_s[1],
            pass_s=typical.pass_s[1],
            unit_s=typical.unit_s or Figure(0.0),
            matmuls=tuple(rates.values()),
            reads=reads,
            attention_gflops=attention,
            loop_s=Figure(watch.usual.loop_s, "measured", "a loop of plain Python"),
            handover_s=Figure(watch.usual.handover_s, "measured", "a small matrix, turned on its side"),
        )
        return found if card is None else card.beside(found)

    @contextmanager
    def _step(self, what: str) -> Iterator[None]:
        """Tell what is measured, and what it took."""
        begin = time.perf_counter()
        note(f"measuring {what}", show=bool(self._show_progress))
        yield
        note(f"measured {what} in {time.perf_counter() - begin:.1f} s", show=bool(self._show_progress))

    def _layers(self, roofs: Roofs, advance: Callable[[int], None], *, hbm: bool) -> dict[str, MatmulRates]:
        """By kind of weights."""
        begin, rates = time.perf_counter(), dict[str, MatmulRates]()
        with LayerProbe(roofs, self._watch, self._folder, self._device, hbm=hbm, quick=self._effort.quick) as layers:
            for kind in sorted(KINDS, key=_FIRST.index) if self._effort.quick else KINDS:
                if rates and time.perf_counter() - begin > self._effort.layers_s:
                    note(f"no time is left for layers at {kind}", show=bool(self._show_progress))
                    continue
                with self._step(f"layers at {kind}"):
                    rates[kind] = layers.rates(kind)
                advance(1)
        return rates

    def _refuse_noise(self) -> None:
        share = self._watch.share_disturbed
        if share > TOO_DISTURBED and not self._noisy:
            raise EnvironmentUnsupportedError(
                f"{share:.0%} of the measurements were disturbed, {TOO_DISTURBED:.0%} are allowed: other "
                "programs, or other guests of this machine's host, use the processor; probe again when they are "
                "done, or keep what was measured all the same with --noisy"
            )

    def _dram(self) -> Figure:
        """Once more where other programs were in the way."""
        memory = map_huge_pages(_DRAM_BYTES)
        torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
        for _ in range(2):
            rates = self._watch.sample(partial(dram_roof, memory, repeats=1), self._repeats)
            found = measured(rates, "vector reads on all cores")
            if found.spread <= TOO_NOISY or self._noisy:
                return found
        raise EnvironmentUnsupportedError(
            f"reads of main memory vary by {found.spread:.0%} around {found.value:.1f} GB/s, {TOO_NOISY:.0%} are "
            "allowed: other programs use it; probe again when they are done"
        )

    def _disk(self) -> tuple[tuple[ReadRate, ...], Figure]:
        """The rates of direct reads, and what of them overlaps with products."""
        try:
            with probe.sample_file(self._folder, _DISK_BYTES) as file:
                reads = [self._reads(file, *setting) for setting in _READS]
                return tuple(reads), self._overlap(file)
        except OSError as error:
            raise EnvironmentUnsupportedError(
                f"{self._folder} takes no file of {human(_DISK_BYTES)} to read ({error.strerror}); name another with "
                "--folder"
            ) from error

    def _reads(self, file: Path, threads: int, block_bytes: int) -> ReadRate:
        limit = min(_DISK_BYTES, max(_LEAST_READS * block_bytes, _DISK_BYTES // 8))
        if block_bytes < _DISK_BYTES // 4096:
            limit = _LEAST_READS * block_bytes
        settings, limit_s = ((threads, block_bytes),), self._effort.read_s
        once = partial(probe.disk_read, file, settings=settings, limit_bytes=limit, limit_s=limit_s)
        source = f"direct reads, {threads} threads, {block_bytes >> 10} KiB each"
        rates = self._watch.sample(lambda: once().gbps, self._repeats)
        return ReadRate(threads, block_bytes, measured(rates, source))

    def _overlap(self, file: Path) -> Figure:
        """What of reads overlaps with products of the CPU."""
        left, right = (torch.randn(768, 768) for _ in range(2))

        def compute() -> None:
            for _ in range(24):
                left @ right

        # As many bytes each time, and no more than the time allows: what is compared must be the same work.
        settings = (_LOADER,)
        quick = probe.disk_read(file, settings=settings, limit_s=self._effort.read_s)
        nbytes = min(_DISK_BYTES, max(_LOADER[1], int(quick.gbps * 1e9 * self._effort.read_s)))
        read = partial(probe.disk_read, file, settings=settings, limit_bytes=nbytes)
        both = partial(together, compute, read)
        source = "direct reads beside products of the CPU"
        return overlap_of(self._watch, compute, read, both, source, self._effort.repeats or OVERLAP_REPEATS)


def _attention(watch: Watch) -> Figure:
    """1e9 operations a second of attention over a prompt, each token to those before it."""
    query, key, value = torch.randn(3, 1, _HEADS, _ATTENDED, _HEAD_DIM).bfloat16()
    once = partial(scaled_dot_product_attention, query, key, value, is_causal=True)
    operations = 4 * _HEADS * _HEAD_DIM * _ATTENDED * (_ATTENDED + 1) / 2
    once()
    seconds = watch.timed({"": once}, {"": 2 * REPEATS})[""]
    return measured([operations / each / 1e9 for each in seconds], "torch, bf16, causal")


def _gemm(watch: Watch) -> Figure:
    """1e9 operations a second of a product that operations bind: the fastest, for it is to bound others."""
    left, right = torch.randn(2, _GEMM, _GEMM).bfloat16()
    once = partial(torch.mm, left, right)
    once()
    rates = [2 * _GEMM**3 / each / 1e9 for each in watch.timed({"": once}, {"": REPEATS})[""]]
    return replace(measured(rates, "torch, bf16"), value=max(rates))
