"""Measures this machine as the cost model wants it: its memory, its disk, its card if it has one, and its layers.

Every figure is a median with its spread.
"""

from dataclasses import replace
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
from tiercache.bench.card_probe import CardProbe
from tiercache.bench.layer_probe import KINDS, LayerProbe, Roofs
from tiercache.bench.overlap import overlap_of
from tiercache.bench.undisturbed import FasterError, Pace, Watch
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
_TYPICAL = KINDS.index("int8")  # whose overheads stand where a kind is not asked for
_LEAST_READS = 256  # of one measurement of small reads; large ones read the file once
_HEADS, _HEAD_DIM, _ATTENDED = 16, 64, 512
_GEMM = 2048  # rows, columns and tokens of a product that operations bind, not bytes


def probe_machine(
    folder: Path, device: torch.device, *, noisy: bool = False, show_progress: bool | None = None
) -> Hardware:
    """Measure for one to three minutes.

    Args:
        folder: on the disk that stores lie on; a file is written there and removed again.
        device: that computes.
        noisy: keep the figures of a machine that is never quiet; their spread tells how far they may be off.
        show_progress: draw a bar; None means where standard error is a terminal.

    Raises:
        EnvironmentUnsupportedError: the folder takes no file, or other programs make the figures worthless.
    """
    usual: Pace | None = None
    while True:  # it ends: each time the usual pace is a quarter faster than before
        watch = Watch(usual=usual, may_restart=True)
        try:
            return _measured(folder, device_of(device), watch, noisy, show_progress)
        except FasterError as error:
            usual = error.pace
            note("the machine has become faster; measuring again", show=show_progress)


def _measured(folder: Path, device: Device, watch: Watch, noisy: bool, show_progress: bool | None) -> Hardware:
    with bar("measuring this machine", 3 + len(KINDS), show=show_progress) as advance:
        reads, overlap = _disk(folder, watch)
        advance(2)
        dram, attention, gemm = _dram(watch, noisy), _attention(watch), _gemm(watch)
        advance(1)
        card = None if device.on_host else CardProbe(device, watch).measure()
        roofs = Roofs(dram.value, gemm.value, attention.value) if card is None else card.roofs
        with LayerProbe(roofs, watch, folder, device, hbm=card is not None) as layers:
            rates: list[MatmulRates] = []
            for kind in KINDS:
                rates.append(layers.rates(kind))
                advance(1)
    if watch.share_disturbed > TOO_DISTURBED and not noisy:
        raise EnvironmentUnsupportedError(
            f"{watch.share_disturbed:.0%} of the measurements were disturbed, {TOO_DISTURBED:.0%} are allowed: other "
            "programs, or other guests of this machine's host, use the processor; probe again when they are "
            "done, or keep what was measured all the same with --noisy"
        )
    found = Hardware(
        gpu=None,
        dram=Memory(host_memory().free_bytes, dram),
        cpu_gflops=gemm,
        ssd_gbps=next(rate.gbps for rate in reads if (rate.threads, rate.block_bytes) == _LOADER),
        overlap=overlap,
        layer_s=rates[_TYPICAL].layer_s[1],
        pass_s=rates[_TYPICAL].pass_s[1],
        unit_s=rates[_TYPICAL].unit_s or Figure(0.0),
        matmuls=tuple(rates),
        reads=reads,
        attention_gflops=attention,
        loop_s=Figure(watch.usual.loop_s, "measured", "a loop of plain Python"),
        handover_s=Figure(watch.usual.handover_s, "measured", "a small matrix, turned on its side"),
    )
    return found if card is None else card.beside(found)


def _dram(watch: Watch, noisy: bool) -> Figure:
    """Once more where other programs were in the way."""
    memory = map_huge_pages(_DRAM_BYTES)
    torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
    for _ in range(2):
        rates = watch.sample(partial(probe.dram_read, repeats=1, memory=memory), REPEATS)
        found = measured(rates, "vector reads on all cores")
        if found.spread <= TOO_NOISY or noisy:
            return found
    raise EnvironmentUnsupportedError(
        f"reads of main memory vary by {found.spread:.0%} around {found.value:.1f} GB/s, {TOO_NOISY:.0%} are allowed: "
        "other programs use it; probe again when they are done"
    )


def _disk(folder: Path, watch: Watch) -> tuple[tuple[ReadRate, ...], Figure]:
    """The rates of direct reads, and what of them overlaps with products."""
    try:
        with probe.sample_file(folder, _DISK_BYTES) as file:
            reads = [_reads(watch, file, *setting) for setting in _READS]
            return tuple(reads), _overlap(watch, file)
    except OSError as error:
        raise EnvironmentUnsupportedError(
            f"{folder} takes no file of {human(_DISK_BYTES)} to read ({error.strerror}); name another with --folder"
        ) from error


def _reads(watch: Watch, file: Path, threads: int, block_bytes: int) -> ReadRate:
    limit = min(_DISK_BYTES, max(_LEAST_READS * block_bytes, _DISK_BYTES // 8))
    if block_bytes < _DISK_BYTES // 4096:
        limit = _LEAST_READS * block_bytes
    once = partial(probe.disk_read, file, settings=((threads, block_bytes),), limit_bytes=limit)
    source = f"direct reads, {threads} threads, {block_bytes >> 10} KiB each"
    return ReadRate(threads, block_bytes, measured(watch.sample(lambda: once().gbps, REPEATS), source))


def _overlap(watch: Watch, file: Path) -> Figure:
    """What of reads overlaps with products of the CPU."""
    left, right = (torch.randn(768, 768) for _ in range(2))

    def compute() -> None:
        for _ in range(24):
            left @ right

    read = partial(probe.disk_read, file, settings=(_LOADER,))
    return overlap_of(watch, compute, read, "direct reads beside products of the CPU")


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
