"""Measures what layers take on this machine: passes of small models of three sizes, opened as any other model is.

A layer takes a part that is there whatever its size, one that grows with its width, and one that grows with its
weights; three sizes tell these apart. So whatever happens in a pass is in one of them: Python, hooks, threads that wake
up, norms, transforms, products. Only machines whose CPU computes.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any

import numpy as np
import torch

from policies.plan import fill_tiers
from profiler.figure import Figure, measured
from profiler.matmul_rates import MatmulRates
from profiler.workload import Workload
from tiercache.bench import shapes
from tiercache.bench.shapes import GROUP, Shape
from tiercache.bench.undisturbed import Watch, seconds_of
from tiercache.config.options import OffloadConfig, of_planes
from tiercache.config.sizes import Budget
from tiercache.engine.offload import offload
from tiercache.engine.workload import imagined_workload

KINDS = ("int3", "int4", "int8", "source")
# Tokens of a pass, and how often it is run. The kernels go another way above 8 tokens.
ROUNDS = {1: 9, 8: 7, 16: 7, 64: 5, 256: 3}
SHARE = 0.6  # of the weights, that main memory holds where the SSD is read
_UNIT_TOKENS = 16  # so many that no pass waits for the SSD, and what each unit costs beside its bytes is left
_CONTEXT = 512
_SEED = 0
_MEMORY_BYTES = 2 << 30

Seconds = dict[int, list[float]]


def _shape(heads: int, layers: int) -> Shape:
    return Shape(heads * GROUP, 11 * heads // 4 * GROUP, layers, heads, heads, 4 * GROUP)


TINY = (_shape(2, 2), _shape(2, 10))  # no bytes to speak of
# Weights of each are more than a cache holds, those of int3 in the first of them about as much.
SIZED = {True: (_shape(8, 24), _shape(24, 4)), False: (_shape(8, 12), _shape(24, 4))}


@dataclass(frozen=True)
class Sample:
    """Passes of one model.

    Attributes:
        workload: of the model.
        seconds: of passes by their tokens, in order of length.
    """

    workload: Workload
    seconds: Mapping[int, list[float]]


class LayerProbe(AbstractContextManager["LayerProbe"]):
    """Makes models in a folder for as long as it is open.

    Args:
        dram_gbps, cpu_gflops: of main memory and of the processor, which no product outruns.
        attention_gflops: of attention, whose part in a pass is told apart by it.
        watch: looks for what disturbs.
        folder: on the disk that stores lie on.
    """

    def __init__(
        self, dram_gbps: float, cpu_gflops: float, attention_gflops: float, watch: Watch, folder: Path
    ) -> None:
        self._watch = watch
        self._dram_gbps, self._cpu_gflops, self._attention_gflops = dram_gbps, cpu_gflops, attention_gflops
        self._folder = Path(tempfile.mkdtemp(dir=folder, prefix=".tiercache-probe-"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def rates(self, precision: str) -> MatmulRates:
        """What layers with weights of a precision take."""
        samples = [self._sample(shape, precision) for shape in (*TINY, *SIZED[of_planes(precision)])]
        source = f"passes of models of {len(samples)} sizes, {precision}"
        passes, layers, activations, gbps = {}, {}, {}, {}
        for tokens in ROUNDS:
            spread = max(measured(sample.seconds[tokens], "").spread for sample in samples)
            whole, fixed, by_width, by_byte = (
                Figure(each, "measured", source, spread) for each in self._parts(samples, tokens)
            )
            passes[tokens], layers[tokens] = whole, fixed
            activations[tokens] = by_width.scaled(1e9 / tokens)
            gbps[tokens] = replace(by_byte, value=1e-9 / by_byte.value)
        unit_s = self._unit_s(precision, samples[-2])
        return MatmulRates(samples[-1].workload.bytes_per_weight, gbps, activations, layers, passes, unit_s)

    def _parts(self, samples: list[Sample], tokens: int) -> tuple[float, ...]:
        """Seconds of a pass, of a layer, of each row or column, and of each byte; none is below what it can be."""
        per_byte = 2 * tokens / samples[-1].workload.bytes_per_weight  # operations
        roof_s = max(1 / self._dram_gbps, per_byte / self._cpu_gflops) / 1e9
        rows, taken, least = [], [], []
        for sample in samples:
            work = sample.workload
            nbytes = sum(work.payload[key] for matmul in work.matmuls for key in matmul.units)
            attention = 4 * work.attention_width * tokens * (tokens + 1) / 2 / self._attention_gflops / 1e9
            least.append(attention + nbytes * roof_s)
            rows.append([1, work.layers, sum(matmul.width for matmul in work.matmuls), nbytes])
            taken.append(median(sample.seconds[tokens]))
        seconds = np.array(taken)
        found = not_negative(np.array(rows, float), seconds - np.array(least), 1 / seconds)
        return (*found[:-1], found[-1] + roof_s)

    def _unit_s(self, precision: str, resident: Sample) -> Figure:
        """What each unit that is read costs beside its bytes: bookkeeping, and a reading thread's share of the CPU."""
        shape, needs = SIZED[of_planes(precision)][0], resident.workload.needs
        dram_bytes = starved_bytes(resident.workload)
        streamed = len(fill_tiers(needs, hbm_bytes=None, dram_bytes=dram_bytes).streamed)
        read = self._run(shape, precision, {_UNIT_TOKENS: ROUNDS[_UNIT_TOKENS]}, dram_bytes)[_UNIT_TOKENS]
        # In order of length: the same place in both is a pass that was disturbed as little in the one as in the other.
        beyond = [b - a for a, b in zip(resident.seconds[_UNIT_TOKENS], read, strict=True)]
        source = f"a model of {shape.layers} layers, {precision}, {streamed} units from the SSD"
        return measured([max(each, 0.0) / streamed for each in beyond], source)

    def _sample(self, shape: Shape, precision: str) -> Sample:
        return Sample(_workload(shape, precision), self._run(shape, precision, ROUNDS))

    def _run(self, shape: Shape, precision: Any, rounds: Mapping[int, int], dram_bytes: int = _MEMORY_BYTES) -> Seconds:
        """Seconds of passes by their tokens, in order of length; token counts by turns."""
        make = shapes.make_store if of_planes(precision) else shapes.make_checkpoint
        place = self._folder / f"{shape.hidden}-{shape.layers}-{'planes' if of_planes(precision) else 'bf16'}"
        make(shape, place, _SEED, show_progress=False)
        options = {
            "dram": str(dram_bytes),
            "context": _CONTEXT,
            "logits": max(rounds),
            "show_progress": False,
            "plan": "default",
        }
        with offload(place, precision=precision, **options) as model, torch.inference_mode():  # type: ignore[arg-type]
            once = {
                tokens: partial(model, input_ids=torch.ones(1, tokens, dtype=torch.long), use_cache=True)
                for tokens in rounds
            }
            for tokens in rounds:
                once[tokens]()
            return self._watch.undisturbed(partial(by_turns, once, rounds))


def by_turns(once: Mapping[int, Callable[[], object]], rounds: Mapping[int, int]) -> Seconds:
    """Seconds by tokens, in order of length."""
    found: Seconds = {tokens: [] for tokens in rounds}
    for number in range(max(rounds.values())):
        for tokens in rounds:
            if number < rounds[tokens]:
                found[tokens].append(seconds_of(once[tokens]))
    return {tokens: sorted(each) for tokens, each in found.items()}


def starved_bytes(workload: Workload) -> int:
    """A budget of main memory that holds what is reserved and a share of the weights, so that the rest is read."""
    needs = workload.needs
    weights = sum(needs.sizes.values())
    return sum(needs.compute.values()) + sum(needs.dram.values()) + int(SHARE * weights)


def not_negative(
    rows: "np.typing.NDArray[np.float64]",
    wanted: "np.typing.NDArray[np.float64]",
    weights: "np.typing.NDArray[np.float64]",
) -> tuple[float, ...]:
    """The factors, none below zero, of the columns of `rows` that come nearest to `wanted`: weighted least squares.

    By trying every set of columns, for there are few (Lawson and Hanson's method is for many).
    """
    best: tuple[float, ...] = (0.0,) * rows.shape[1]
    least = float(np.sum((wanted * weights) ** 2))
    for count in range(1, rows.shape[1] + 1):
        for columns in combinations(range(rows.shape[1]), count):
            chosen = rows[:, columns] * weights[:, None]
            scale = np.linalg.norm(chosen, axis=0)
            found = np.linalg.lstsq(chosen / scale, wanted * weights, rcond=None)[0] / scale
            off = float(np.sum((chosen @ found - wanted * weights) ** 2))
            if (found >= 0).all() and off < least:
                by_column = dict(zip(columns, found, strict=True))
                best, least = tuple(float(by_column.get(n, 0.0)) for n in range(rows.shape[1])), off
    return best


def _workload(shape: Shape, precision: Any) -> Workload:
    options = OffloadConfig(hbm=None, dram=Budget(), precision=precision, context=_CONTEXT, logits=max(ROUNDS))
    return imagined_workload(shape.config(), options, gpu=False)
