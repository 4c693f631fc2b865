"""Measures this machine as the cost model wants it: its memory, its disk, its attention, and its layers.

Only machines whose CPU computes; a card's figures are `make gpu`'s. Every figure is a median with its spread.
"""

import threading
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
from tiercache.bench.layer_probe import KINDS, LayerProbe
from tiercache.bench.undisturbed import Watch, seconds_of
from tiercache.config.sizes import human
from tiercache.errors import EnvironmentUnsupportedError
from tiercache.progress import bar

REPEATS = 7
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


def probe_machine(folder: Path, *, noisy: bool = False, show_progress: bool | None = None) -> Hardware:
    """Measure for about a minute.

    Args:
        folder: on the disk that stores lie on; a file is written there and removed again.
        noisy: keep the figures of a machine that is never quiet; their spread tells how far they may be off.
        show_progress: draw a bar; None means where standard error is a terminal.

    Raises:
        EnvironmentUnsupportedError: the folder takes no file, or other programs make the figures worthless.
    """
    with bar("measuring this machine", 3 + len(KINDS), show=show_progress) as advance:
        watch = Watch()
        reads, overlap = _disk(folder, watch)
        advance(2)
        dram, attention, gemm = (watch.undisturbed(measure) for measure in (_dram, _attention, _gemm))
        advance(1)
        with LayerProbe(dram.value, gemm.value, attention.value, watch, folder) as layers:
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
    return Hardware(
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
        handover_s=Figure(watch.handover_s, "measured", "a small matrix, turned on its side"),
    )


def _dram() -> Figure:
    """Once more where other programs were in the way."""
    memory = map_huge_pages(_DRAM_BYTES)
    torch.frombuffer(memory, dtype=torch.uint8).fill_(1)
    for _ in range(2):
        rates = [probe.dram_read(repeats=1, memory=memory) for _ in range(REPEATS)]
        found = measured(rates, "vector reads on all cores")
        if found.spread <= TOO_NOISY:
            return found
    raise EnvironmentUnsupportedError(
        f"reads of main memory vary by {found.spread:.0%} around {found.value:.1f} GB/s, {TOO_NOISY:.0%} are allowed: "
        "other programs use it; probe again when they are done"
    )


def _disk(folder: Path, watch: Watch) -> tuple[tuple[ReadRate, ...], Figure]:
    """The rates of direct reads, and what of them overlaps with products."""
    try:
        with probe.sample_file(folder, _DISK_BYTES) as file:
            reads = [watch.undisturbed(partial(_reads, file, *setting)) for setting in _READS]
            return tuple(reads), watch.undisturbed(partial(_overlap, file))
    except OSError as error:
        raise EnvironmentUnsupportedError(
            f"{folder} takes no file of {human(_DISK_BYTES)} to read ({error.strerror}); name another with --folder"
        ) from error


def _reads(file: Path, threads: int, block_bytes: int) -> ReadRate:
    limit = min(_DISK_BYTES, max(_LEAST_READS * block_bytes, _DISK_BYTES // 8))
    if block_bytes < _DISK_BYTES // 4096:
        limit = _LEAST_READS * block_bytes
    once = partial(probe.disk_read, file, settings=((threads, block_bytes),), limit_bytes=limit)
    source = f"direct reads, {threads} threads, {block_bytes >> 10} KiB each"
    return ReadRate(threads, block_bytes, measured([once().gbps for _ in range(REPEATS)], source))


def _overlap(file: Path) -> Figure:
    """w of: reading and computing at once take w max + (1 - w) sum of what each takes alone."""
    left, right = (torch.randn(768, 768) for _ in range(2))

    def compute() -> None:
        for _ in range(24):
            left @ right

    def read() -> None:
        probe.disk_read(file, settings=(_LOADER,))

    def both() -> None:
        thread = threading.Thread(target=read)
        thread.start()
        compute()
        thread.join()

    alone, together = [], []
    for _ in range(REPEATS):
        alone.append((seconds_of(compute), seconds_of(read)))
        together.append(seconds_of(both))
    computed, taken = (min(each) for each in zip(*alone, strict=True))  # the least: what disturbs one of three is no w
    share = (computed + taken - min(together)) / min(computed, taken)
    return Figure(min(max(share, 0.0), 1.0), "measured", "direct reads beside products of the CPU")


def _attention() -> Figure:
    """1e9 operations a second of attention over a prompt, each token to those before it."""
    query, key, value = torch.randn(3, 1, _HEADS, _ATTENDED, _HEAD_DIM).bfloat16()
    once = partial(scaled_dot_product_attention, query, key, value, is_causal=True)
    operations = 4 * _HEADS * _HEAD_DIM * _ATTENDED * (_ATTENDED + 1) / 2
    once()
    return measured([operations / seconds_of(once) / 1e9 for _ in range(2 * REPEATS)], "torch, bf16, causal")


def _gemm() -> Figure:
    """1e9 operations a second of a product that operations bind: the fastest, for it is to bound others."""
    left, right = torch.randn(2, _GEMM, _GEMM).bfloat16()
    once = partial(torch.mm, left, right)
    once()
    rates = [2 * _GEMM**3 / seconds_of(once) / 1e9 for _ in range(REPEATS)]
    return replace(measured(rates, "torch, bf16"), value=max(rates))
