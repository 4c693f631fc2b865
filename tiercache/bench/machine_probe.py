"""Measures this machine as the cost model wants it: its memory, its disk, its kernels, and a layer without bytes.

Only machines whose CPU computes; a card's figures are `make gpu`'s. Every figure is a median with its spread.
"""

import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from policies.plan import fill_tiers
from profiler import probe
from profiler.cost_model import pass_time
from profiler.figure import Figure, measured
from profiler.hardware import Hardware, Memory
from profiler.host_memory import host_memory
from profiler.hugepages import map_huge_pages
from profiler.matmul_rates import MatmulRates
from profiler.workload import Workload
from tiercache.bench import shapes, workset
from tiercache.bench.shapes import GROUP, Shape
from tiercache.bench.timing_device import Effort, TimingCpu
from tiercache.bench.validation import starved_bytes
from tiercache.config.options import OffloadConfig, of_planes
from tiercache.config.sizes import Budget, human
from tiercache.engine.offload import offload
from tiercache.engine.workload import imagined_workload
from tiercache.errors import EnvironmentUnsupportedError
from tiercache.progress import bar

TOKEN_COUNTS = (1, 4, 16, 64, 256)
PRECISIONS = ("int3", "int4", "int8")
SIDES = (1024, 4096)  # rows and columns of what is multiplied by
REPEATS = 7
TOO_NOISY = 0.3  # spread of the memory's rate above which no figure means anything
_DRAM_BYTES, _DISK_BYTES, _SOURCE_BYTES = 512 << 20, 256 << 20, 512 << 20
_DISK_SETTING = (4, 2 << 20)  # threads, bytes of a read: as the loader's
_LAYERS = (2, 10)  # of models so small that their bytes take no time
_WIDE_LAYERS, _WIDE_TOKENS = (2, 6), (16, 64, 256)  # of models large enough that work on activations counts
_CONTEXT = 256
_SEED = 0


def probe_machine(folder: Path, *, show_progress: bool | None = None) -> Hardware:
    """Measure for under a minute.

    Args:
        folder: on the disk that stores lie on; a file is written there and removed again.
        show_progress: draw a bar; None means where standard error is a terminal.

    Raises:
        EnvironmentUnsupportedError: the folder takes no file, or other programs make the figures worthless.
    """
    with bar("measuring this machine", 5 + len(SIDES), show=show_progress) as advance:
        disk, overlap = _disk(folder)
        advance(2)
        dram = _dram()
        advance(1)
        planes: list[MatmulRates] = []
        sources: list[MatmulRates] = []
        for side in SIDES:
            planes += [_planes(precision, side) for precision in PRECISIONS]
            sources.append(_source(side))
            advance(1)
        overheads = _overheads()
        advance(1)
        machine = Hardware(
            gpu=None,
            dram=Memory(host_memory().free_bytes, dram),
            cpu_gflops=_fastest([*planes, *sources]),
            ssd_gbps=disk,
            overlap=overlap,
            layer_s=overheads["layer_s"],
            pass_s=overheads["pass_s"],
            unit_s=overheads["unit_s"],
            matmuls=(*planes, *sources),
        )
        of_planes_ns, of_source_ns = _activations("int8", machine), _activations("source", machine)
        advance(1)
    beside = [replace(each, activation_ns=of_planes_ns) for each in planes]
    return replace(machine, matmuls=(*beside, *(replace(each, activation_ns=of_source_ns) for each in sources)))


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


def _disk(folder: Path) -> tuple[Figure, Figure]:
    """The rate of direct reads, and what of them overlaps with products."""
    try:
        with probe.sample_file(folder, _DISK_BYTES) as file:
            rates = [probe.disk_read(file, settings=(_DISK_SETTING,)).gbps for _ in range(REPEATS)]
            threads, chunk_bytes = _DISK_SETTING
            return measured(rates, f"direct reads, {threads} threads, {chunk_bytes >> 20} MiB each"), _overlap(file)
    except OSError as error:
        raise EnvironmentUnsupportedError(
            f"{folder} takes no file of {human(_DISK_BYTES)} to read ({error.strerror}); name another with --folder"
        ) from error


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


def _planes(precision: str, side: int) -> MatmulRates:
    """Products by planes, quantized activations included, from memory and not from a cache."""
    device = TimingCpu()
    kernels = device.kernels
    units = workset.make(device, Effort(caches=2), workset.random_codes(_SEED), (side, side, 1), precision)
    matrices = [unit[0] for unit in units]

    def call(number: int, x: Tensor) -> None:
        out = torch.zeros(len(x), side)
        kernels.matmul(kernels.quantize_activations(x, GROUP), matrices[number % len(matrices)], out)

    return _rates(call, workset.nbytes(matrices[0]), f"kernels {kernels.name}, {precision}", side)


def _source(side: int) -> MatmulRates:
    nbytes = 2 * side * side
    matrices = [torch.full((side, side), 0.5, dtype=torch.bfloat16) for _ in range(_SOURCE_BYTES // nbytes)]

    def call(number: int, x: Tensor) -> None:
        linear(x, matrices[number % len(matrices)])

    return _rates(call, nbytes, "torch, bf16", side)


def _rates(call: Callable[[int, Tensor], None], nbytes: int, source: str, side: int) -> MatmulRates:
    """A median for each number of tokens."""
    generator = torch.Generator().manual_seed(_SEED)
    inputs = torch.randn(max(TOKEN_COUNTS), side, generator=generator).bfloat16()
    gbps = {}
    for tokens in TOKEN_COUNTS:
        x = inputs[:tokens]
        with torch.inference_mode():
            call(0, x)
            seconds = [_seconds(partial(call, number, x)) for number in range(1, 1 + 2 * REPEATS)]
        gbps[tokens] = measured([nbytes / each / 1e9 for each in seconds], f"{source}, {side} x {side}")
    return MatmulRates(nbytes / side**2, side**2, gbps)


def _fastest(rates: Sequence[MatmulRates]) -> Figure:
    """1e9 operations a second of the best call: its median and what it spread above that."""
    found = (
        2 * tokens / each.bytes_per_weight * figure.value * (1 + figure.spread)
        for each in rates
        for tokens, figure in each.gbps.items()
    )
    return Figure(max(found), "measured", "the fastest of the kernels' calls")


def _overheads() -> dict[str, Figure]:
    """Seconds of a layer without bytes, of a pass without layers, of a unit that is read: by tiny models."""
    (few, many), (low, high) = [_passes(_tiny(layers), "int4", [1])[1] for layers in _LAYERS], _LAYERS
    layers_s = [(b - a) / (high - low) for a, b in zip(few, many, strict=True)]
    whole_s = median(few) - low * median(layers_s)
    source = f"models of {low} and {high} layers without bytes"
    found = {
        "layer_s": measured(layers_s, source),
        "pass_s": Figure(max(whole_s, 0.0), "measured", source),
    }
    needs = _workload(_tiny(high), "int4", 1).needs
    least_bytes = starved_bytes(needs)
    streamed = len(fill_tiers(needs, hbm_bytes=None, dram_bytes=least_bytes).streamed)
    read = _passes(_tiny(high), "int4", [1], dram_bytes=least_bytes)[1]
    units_s = [max(b - a, 0.0) / streamed for a, b in zip(many, read, strict=True)]
    return {**found, "unit_s": measured(units_s, f"a model of {high} layers, {streamed} units from the SSD")}


def _activations(precision: Any, machine: Hardware) -> dict[int, Figure]:
    """Nanoseconds a token and a row or column: what passes of many tokens take beyond products and overheads."""
    runs = [_passes(_wide(layers), precision, _WIDE_TOKENS) for layers in _WIDE_LAYERS]
    source = f"models of {_WIDE_LAYERS[0]} and {_WIDE_LAYERS[1]} layers, {precision}"
    found = {}
    for tokens in _WIDE_TOKENS:
        predicted, widths = [], []
        for layers in _WIDE_LAYERS:
            workload = _workload(_wide(layers), precision, tokens)
            plan = fill_tiers(workload.needs, hbm_bytes=None, dram_bytes=machine.dram.capacity_bytes)
            predicted.append(pass_time(workload, plan, machine, tokens=tokens).total_s)
            widths.append(sum(matmul.width for matmul in workload.matmuls))
        few, many = (run[tokens] for run in runs)
        beyond_s = [b - a - (predicted[1] - predicted[0]) for a, b in zip(few, many, strict=True)]
        per = tokens * (widths[1] - widths[0])
        found[tokens] = measured([max(each, 0.0) / per * 1e9 for each in beyond_s], source)
    return found


def _workload(shape: Shape, precision: Any, tokens: int) -> Workload:
    options = OffloadConfig(hbm=None, dram=Budget(), precision=precision, context=_CONTEXT, logits=tokens)
    return imagined_workload(shape.config(), options, gpu=False)


def _tiny(layers: int) -> Shape:
    return Shape(2 * GROUP, 2 * GROUP, layers, 2, 2, 4 * GROUP)


def _wide(layers: int) -> Shape:
    return Shape(16 * GROUP, 44 * GROUP, layers, 16, 16, 4 * GROUP)


def _passes(
    shape: Shape, precision: Any, token_counts: Sequence[int], dram_bytes: int = 1 << 30
) -> dict[int, list[float]]:
    """Seconds of passes by their tokens, in order of length, without the fastest and the slowest few.

    In order, so that the same place in two lists is a pass that was disturbed as little in the one as in the other.
    """
    make = shapes.make_store if of_planes(precision) else shapes.make_checkpoint
    found = {}
    with tempfile.TemporaryDirectory(prefix="tiercache-probe-") as folder:
        place = make(shape, Path(folder), _SEED, show_progress=False)
        options = {"dram": str(dram_bytes), "context": _CONTEXT, "logits": max(token_counts), "show_progress": False}
        with offload(place, precision=precision, **options) as model, torch.inference_mode():  # type: ignore[arg-type]
            for tokens in token_counts:
                once = partial(model, input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=True)
                found[tokens] = sorted(_seconds(once) for _ in range(4 * REPEATS))[REPEATS : 3 * REPEATS]
    return found


def _seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
