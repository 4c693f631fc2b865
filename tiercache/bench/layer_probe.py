"""Measures what layers take on this machine: passes of small models of several sizes, opened as any other model is.

A layer takes a part that is there whatever its size, one that grows with its width, and one that grows with its
weights; sizes from the smallest to those of 1.1B tell these apart. So whatever happens in a pass is in one of them:
Python, hooks, launches, threads that wake up, norms, transforms, products.
"""

import shutil
import tempfile
from collections.abc import Mapping
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
from tiercache.bench.undisturbed import Watch
from tiercache.config.options import OffloadConfig, of_planes
from tiercache.config.sizes import Budget
from tiercache.engine.compute_dtype import capability_of
from tiercache.engine.offload import offload
from tiercache.engine.workload import imagined_workload
from tiercache.tiers.device import Device

KINDS = ("int3", "int4", "int8", "source")
# Tokens of a pass, and how often it is run. Above 3 tokens kernels of planes go another way; on a card above 65.
ROUNDS = {1: 7, 3: 5, 4: 5, 64: 3, 512: 2}
CARD_ROUNDS = {1: 7, 8: 5, 32: 5, 65: 3, 66: 3, 512: 2}
SHARE = 0.6  # of the weights, that main memory holds where the SSD is read
_CONTEXT = 512
_SEED = 0
_MEMORY_BYTES = 2 << 30

Seconds = dict[int, list[float]]


def _shape(heads: int, layers: int) -> Shape:
    return Shape(heads * GROUP, 11 * heads // 4 * GROUP, layers, heads, heads, 4 * GROUP)


# The first two have no bytes to speak of, and tell a pass from its layers.
SHAPES = (_shape(2, 2), _shape(2, 10), _shape(6, 12), _shape(12, 8), _shape(24, 4), _shape(32, 2))
_READ = 2  # of these, the one that is also read from the SSD: many units, and next to no bytes
_QUICK_SHAPES, _QUICK_ROUNDS = (0, 1, 2, 4), 3  # four sizes tell four parts apart; passes of each token count


@dataclass(frozen=True)
class ModelPasses:
    """Passes of one model.

    Attributes:
        workload: of the model.
        seconds: of passes by their tokens, in order of length.
    """

    workload: Workload
    seconds: Mapping[int, list[float]]


@dataclass(frozen=True)
class Roofs:
    """Of what multiplies: the bytes of its memory, 1e9 a second, and operations of products and of attention, too.

    No product outruns the first two; what attention takes of a pass is told apart by the third.
    """

    gbps: float
    gflops: float
    attention_gflops: float


class LayerProbe(AbstractContextManager["LayerProbe"]):
    """Makes models in a folder for as long as it is open.

    Args:
        roofs: of the device.
        watch: looks for what disturbs.
        folder: on the disk that stores lie on.
        device: that computes.
        hbm: it has an HBM tier above main memory: the card's own memory, or a region of main memory that stands in.
        quick: fewer sizes, fewer passes.
    """

    def __init__(
        self, roofs: Roofs, watch: Watch, folder: Path, device: Device, *, hbm: bool, quick: bool = False
    ) -> None:
        self._roofs, self._watch, self._device, self._hbm = roofs, watch, device, hbm
        self._rounds = CARD_ROUNDS if hbm else ROUNDS
        self._shapes: tuple[Shape, ...] = SHAPES
        if quick:
            self._rounds = {tokens: min(count, _QUICK_ROUNDS) for tokens, count in self._rounds.items()}
            self._shapes = tuple(SHAPES[place] for place in _QUICK_SHAPES if place < len(SHAPES))
        self._folder = Path(tempfile.mkdtemp(dir=folder, prefix=".tiercache-probe-"))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def rates(self, precision: str) -> MatmulRates:
        """What layers with weights of a precision take."""
        samples = [self._sample(shape, precision) for shape in self._shapes]
        source = f"passes of models of {len(samples)} sizes, {precision}"
        passes, layers, activations, gbps = {}, {}, {}, {}
        for tokens in self._rounds:
            spread = max(measured(sample.seconds[tokens], "").spread for sample in samples)
            whole, fixed, by_width, by_byte = (
                Figure(each, "measured", source, spread) for each in self._parts(samples, tokens)
            )
            passes[tokens], layers[tokens] = whole, fixed
            activations[tokens] = by_width.scaled(1e9 / tokens)
            gbps[tokens] = replace(by_byte, value=1e-9 / by_byte.value)
        unit_s = self._unit_s(precision, samples[_READ])
        return MatmulRates(samples[-1].workload.bytes_per_weight, gbps, activations, layers, passes, unit_s)

    def _parts(self, samples: list[ModelPasses], tokens: int) -> tuple[float, ...]:
        """Seconds of a pass, of a layer, of each row or column, and of each byte; none is below what it can be."""
        per_byte = 2 * tokens / samples[-1].workload.bytes_per_weight  # operations
        roof_s = max(1 / self._roofs.gbps, per_byte / self._roofs.gflops) / 1e9
        rows, taken, least = [], [], []
        for sample in samples:
            work = sample.workload
            nbytes = sum(work.payload[key] for matmul in work.matmuls for key in matmul.units)
            attention = 4 * work.attention_width * tokens * (tokens + 1) / 2 / self._roofs.attention_gflops / 1e9
            least.append(attention + nbytes * roof_s)
            rows.append([1, work.layers, sum(matmul.width for matmul in work.matmuls), nbytes])
            taken.append(median(sample.seconds[tokens]))
        seconds = np.array(taken)
        found = not_negative(np.array(rows, float), seconds - np.array(least), 1 / seconds)
        return (*found[:-1], found[-1] + roof_s)

    def _unit_s(self, precision: str, resident: ModelPasses) -> Figure:
        """What each unit that is brought costs beside its bytes: bookkeeping, and a thread's share of the CPU.

        Found with so many tokens that the units are there before they are wanted.
        Brought to the fastest tier: read from the SSD or, with an HBM tier, copied up.
        """
        shape, needs = self._shapes[_READ], resident.workload.needs
        nbytes = starved_bytes(resident.workload, hbm=self._hbm)
        tiers = (nbytes, _MEMORY_BYTES) if self._hbm else (None, nbytes)
        plan = fill_tiers(needs, hbm_bytes=tiers[0], dram_bytes=tiers[1])
        streamed = len(plan.fastest.passing)
        tokens = next(count for count in self._rounds if count > 1)
        rounds, unpaced_s = {tokens: self._rounds[tokens]}, self._unpaced_s(resident.workload)
        read = self._run(shape, precision, rounds, nbytes, unpaced_s)[tokens]
        # In order of length: the same place in both is a pass that was disturbed as little in the one as in the other.
        beyond = [b - a for a, b in zip(resident.seconds[tokens], read, strict=True)]
        where = "copied up" if self._hbm else "from the SSD"
        source = f"a model of {shape.layers} layers, {precision}, {streamed} units {where}"
        return measured([max(each, 0.0) / streamed for each in beyond], source)

    def _sample(self, shape: Shape, precision: str) -> ModelPasses:
        workload = self._workload(shape, precision)
        return ModelPasses(workload, self._run(shape, precision, self._rounds, unpaced_s=self._unpaced_s(workload)))

    def _unpaced_s(self, workload: Workload) -> float:
        """What no pace of the CPU changes: bytes on their way from memory; all of it where a card computes."""
        return workload.pass_bytes / self._roofs.gbps / 1e9 if self._device.on_host else float("inf")

    def _workload(self, shape: Shape, precision: Any) -> Workload:
        options = OffloadConfig(
            hbm=None, dram=Budget(), precision=precision, context=_CONTEXT, logits=max(self._rounds)
        )
        card = capability_of(self._device.at)
        return imagined_workload(shape.config(), options, gpu=not self._device.on_host, capability=card)

    def _run(
        self,
        shape: Shape,
        precision: Any,
        rounds: Mapping[int, int],
        nbytes: int = _MEMORY_BYTES,
        unpaced_s: float = 0.0,
    ) -> Seconds:
        """Seconds of passes by their tokens, in order of length; token counts by turns; so much in the fastest tier."""
        make = shapes.make_store if of_planes(precision) else shapes.make_checkpoint
        place = self._folder / f"{shape.hidden}-{shape.layers}-{'planes' if of_planes(precision) else 'bf16'}"
        make(shape, place, _SEED, show_progress=False)
        options = {
            "device": str(self._device.at),
            "hbm": str(nbytes) if self._hbm else "auto",
            "dram": str(_MEMORY_BYTES if self._hbm else nbytes),
            "context": _CONTEXT,
            "logits": max(rounds),
            "show_progress": False,
            "plan": "default",
        }
        with offload(place, precision=precision, **options) as model, torch.inference_mode():  # type: ignore[arg-type]
            once = {tokens: partial(self._pass, model, tokens) for tokens in rounds}
            for tokens in rounds:
                once[tokens]()
            return self._watch.timed(once, rounds, unpaced_s)

    def _pass(self, model: Any, tokens: int) -> None:
        model(input_ids=torch.ones(1, tokens, dtype=torch.long, device=self._device.at), use_cache=True)
        self._device.synchronize()


def starved_bytes(workload: Workload, *, hbm: bool = False) -> int:
    """A budget of the fastest tier that holds what is reserved and a share of the weights, so that the rest comes up.

    Args:
        workload: the model's.
        hbm: the fastest tier is not main memory, where some is reserved as well.
    """
    needs = workload.needs
    reserved = sum(needs.compute.values()) + (0 if hbm else sum(needs.dram.values()))
    return reserved + int(SHARE * sum(needs.sizes.values()))


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
