"""Measures this machine as the cost model wants it: its memory, its disk, its kernels, and a layer without bytes.

Only machines whose CPU computes; a card's figures are `make gpu`'s. Every figure is a median with its spread.
"""

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from profiler import probe
from profiler.figure import Figure, measured
from profiler.hardware import Hardware, Memory
from profiler.host_memory import host_memory
from profiler.hugepages import map_huge_pages
from profiler.matmul_rates import MatmulRates
from tiercache.bench import shapes, workset
from tiercache.bench.shapes import GROUP, Shape
from tiercache.bench.timing_device import Effort, TimingCpu
from tiercache.engine.offload import offload
from tiercache.errors import EnvironmentUnsupportedError, permissions_named
from tiercache.progress import bar

TOKEN_COUNTS = (1, 4, 16, 64, 256)
PRECISIONS = ("int3", "int4", "int8")
MATRIX = 4096  # rows and columns of what is multiplied by
REPEATS = 7
TOO_NOISY = 0.3  # spread of the memory's rate above which no figure means anything
_DRAM_BYTES, _DISK_BYTES, _SOURCE_BYTES = 512 << 20, 256 << 20, 512 << 20
_DISK_SETTING = (4, 2 << 20)  # threads, bytes of a read: as the loader's
_LAYERS = (2, 10)  # of models so small that their bytes take no time
_SEED = 0


@dataclass(frozen=True)
class _Parts:
    """What is measured one after the other."""

    rates: list[MatmulRates]
    gflops: list[float]


def probe_machine(folder: Path, *, show_progress: bool | None = None) -> Hardware:
    """Measure for half a minute or so.

    Args:
        folder: on the disk that stores lie on; a file is written there and removed again.
        show_progress: draw a bar; None means where standard error is a terminal.

    Raises:
        EnvironmentUnsupportedError: the folder takes no file, or other programs make the figures worthless.
    """
    with bar("measuring this machine", 5 + len(PRECISIONS), show=show_progress) as advance:
        dram = _dram()
        advance(1)
        with permissions_named(folder), probe.sample_file(folder, _DISK_BYTES) as file:
            disk = _disk(file)
            advance(1)
            overlap = _overlap(file)
        advance(1)
        found = _Parts([], [])
        for precision in PRECISIONS:
            _planes(precision, found)
            advance(1)
        _source(found)
        advance(1)
        layer, whole = _overheads()
        advance(1)
    return Hardware(
        gpu=None,
        dram=Memory(host_memory().free_bytes, dram),
        cpu_gflops=Figure(max(found.gflops), "measured", "the fastest of the kernels' calls"),
        ssd_gbps=disk,
        overlap=overlap,
        layer_s=layer,
        pass_s=whole,
        matmuls=tuple(found.rates),
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


def _disk(file: Path) -> Figure:
    rates = [probe.disk_read(file, settings=(_DISK_SETTING,)).gbps for _ in range(REPEATS)]
    return measured(rates, f"direct reads, {_DISK_SETTING[0]} threads, {_DISK_SETTING[1] >> 20} MiB each")


def _overlap(file: Path) -> Figure:
    """w of: reading and computing at once take w max + (1 - w) sum of what each takes alone."""
    left, right = (torch.randn(768, 768) for _ in range(2))

    def compute() -> None:
        for _ in range(24):
            left @ right

    def read() -> None:
        probe.disk_read(file, settings=(_DISK_SETTING,))

    def both() -> None:
        thread = threading.Thread(target=read)
        thread.start()
        compute()
        thread.join()

    shares = []
    for _ in range(REPEATS):
        alone = [_seconds(compute), _seconds(read)]
        shares.append((sum(alone) - _seconds(both)) / min(alone))
    return Figure(min(max(median(shares), 0.0), 1.0), "measured", "direct reads beside products of the CPU")


def _planes(precision: str, found: _Parts) -> None:
    """Products by planes, quantized activations included, from memory and not from a cache."""
    device, kernels = TimingCpu(), TimingCpu().kernels
    units = workset.make(device, Effort(caches=2), workset.random_codes(_SEED), (MATRIX, MATRIX, 1), precision)
    matrices = [unit[0] for unit in units]

    def call(number: int, x: Tensor) -> None:
        out = torch.zeros(len(x), MATRIX)
        kernels.matmul(kernels.quantize_activations(x, GROUP), matrices[number % len(matrices)], out)

    _rates(call, workset.nbytes(matrices[0]), f"kernels {kernels.name}, {precision}", found)


def _source(found: _Parts) -> None:
    nbytes = 2 * MATRIX * MATRIX
    matrices = [torch.full((MATRIX, MATRIX), 0.5, dtype=torch.bfloat16) for _ in range(_SOURCE_BYTES // nbytes)]

    def call(number: int, x: Tensor) -> None:
        linear(x, matrices[number % len(matrices)])

    _rates(call, nbytes, "torch, bf16", found)


def _rates(call: Callable[[int, Tensor], None], nbytes: int, source: str, found: _Parts) -> None:
    """A median for each number of tokens."""
    generator = torch.Generator().manual_seed(_SEED)
    inputs = torch.randn(max(TOKEN_COUNTS), MATRIX, generator=generator).bfloat16()
    gbps = {}
    for tokens in TOKEN_COUNTS:
        x = inputs[:tokens]
        with torch.inference_mode():
            call(0, x)
            seconds = [_seconds(lambda n=n, x=x: call(n, x)) for n in range(1, 1 + 2 * REPEATS)]  # type: ignore[misc]
        gbps[tokens] = measured([nbytes / each / 1e9 for each in seconds], f"{source}, {MATRIX} x {MATRIX}")
        found.gflops.append(2 * tokens * MATRIX * MATRIX / min(seconds) / 1e9)
    found.rates.append(MatmulRates(nbytes / MATRIX**2, gbps))


def _overheads() -> tuple[Figure, Figure]:
    """Seconds of a layer without bytes, and of a pass without layers: a line through two tiny models."""
    times = []
    with tempfile.TemporaryDirectory(prefix="tiercache-probe-") as folder:
        for layers in _LAYERS:
            tiny = Shape(2 * GROUP, 2 * GROUP, layers, 2, 2, 4 * GROUP)
            store = shapes.make_store(tiny, Path(folder) / str(layers), _SEED, show_progress=False)
            with offload(store, precision="int4", dram="1GiB", context=64, logits=1, show_progress=False) as model:
                times.append(_passes(model))
    (few, many), (low, high) = times, _LAYERS
    layers_s = [(b - a) / (high - low) for a, b in zip(few, many, strict=True)]
    whole_s = median(few) - low * median(layers_s)
    source = f"models of {low} and {high} layers without bytes"
    return measured(layers_s, source), Figure(max(whole_s, 0.0), "measured", source)


def _passes(model: Any) -> list[float]:
    """Seconds of passes of one token; the fastest first, so that runs of two models can be paired."""
    ids = torch.ones(1, 1, dtype=torch.long)
    with torch.inference_mode():
        seconds = [_seconds(lambda: model(input_ids=ids, use_cache=True)) for _ in range(5 * REPEATS)]
    return sorted(seconds)[: 4 * REPEATS : 4]


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
