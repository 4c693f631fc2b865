"""Predicts passes, runs them, and tells by how much the predictions are off.

Knows the cost model and the public way to open a model; prints nothing.
"""

import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import tiercache
from policies.plan import Plan, PlanInputs
from profiler.cost_model import pass_time
from profiler.hardware import Hardware
from profiler.workload import Workload
from tiercache.bench import shapes
from tiercache.config.options import OffloadConfig, of_planes
from tiercache.config.sizes import Budget
from tiercache.engine.workload import imagined_workload
from tiercache.progress import bar

SCHEMA = "tiercache.validation/1"
SHARE = 0.6  # of the weights, that main memory holds where the SSD is to bind
REPEATS = 5
_CONTEXT = 1024
_WARM = 2


@dataclass(frozen=True)
class Case:
    """A prediction and what came of it.

    Attributes:
        name: model, precision, budget, tokens.
        predicted_s, measured_s: seconds of a pass; the second the median of five.
        bound_s: the least that the model says it could take.
        binding: the resource that binds, by the model.
        spread: half the range of the five, as a share of their median.
        error: predicted over measured, less one.
    """

    name: str
    predicted_s: float
    measured_s: float
    bound_s: float
    binding: str
    spread: float
    error: float


def validate(
    models: list[str],
    precisions: list[str],
    token_counts: list[int],
    machine: Hardware,
    *,
    folder: Path,
    show_progress: bool | None = None,
) -> dict[str, Any]:
    """Compare on every combination, with all weights in main memory and with a share of them.

    Args:
        models: folders of stores or checkpoints, or names of shapes, whose weights are random then.
        precisions: of the weights.
        token_counts: of a pass.
        machine: as measured.
        folder: where random models are made.
        show_progress: draw a bar; None means where standard error is a terminal.
    """
    total = len(models) * len(precisions) * 2
    with bar("predicting and running", total, show=show_progress) as advance:
        cases: list[Case] = []
        for model in models:
            for precision in precisions:
                cases += _cases(model, precision, token_counts, machine, folder, advance)
    errors = [abs(case.error) for case in cases]
    return {
        "schema": SCHEMA,
        "cases": [asdict(case) for case in cases],
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "beyond_bound": [case.name for case in cases if case.measured_s < case.bound_s],
    }


def _cases(
    model: str, precision: str, token_counts: list[int], machine: Hardware, folder: Path, advance: Any
) -> Iterator[Case]:
    place = _place(model, precision, folder)
    options = OffloadConfig(
        hbm=None,
        dram=Budget(),
        precision=precision,  # type: ignore[arg-type]
        context=_CONTEXT,
        logits=max(token_counts),
    )
    workload: Workload | None = None
    for share in (1.0, SHARE):
        dram = "auto" if workload is None else str(starved_bytes(workload.needs))
        with tiercache.offload(
            place,
            precision=precision,  # type: ignore[arg-type]
            dram=dram,
            context=_CONTEXT,
            logits=max(token_counts),
            show_progress=False,
        ) as model_open:
            opened: Any = model_open
            workload = imagined_workload(opened.config, options, gpu=False)
            for tokens in token_counts:
                name = f"{Path(model).name} {precision}, {share:.0%} in memory, {tokens} tokens"
                yield _compared(name, opened, workload, opened.tiercache.plan, machine, tokens)
        advance(1)


def starved_bytes(needs: PlanInputs) -> int:
    """A budget of main memory that holds what is reserved and a share of the weights, so that the rest is read."""
    weights = sum(needs.sizes.values())
    return sum(needs.compute.values()) + sum(needs.dram.values()) + int(SHARE * weights)


def _compared(name: str, model: Any, workload: Workload, plan: Plan, machine: Hardware, tokens: int) -> Case:
    made = pass_time(workload, plan, machine, tokens=tokens)
    seconds = _seconds(model, tokens)
    middle = statistics.median(seconds)
    spread = (max(seconds) - min(seconds)) / 2 / middle
    return Case(name, made.total_s, middle, made.bound_s, made.binding, spread, made.total_s / middle - 1)


def _seconds(model: Any, tokens: int) -> list[float]:
    """Of passes with nothing before them, the first ones left out."""
    ids = (torch.arange(tokens) * 7 % 1000)[None]
    found = []
    with torch.inference_mode():
        for _ in range(_WARM + REPEATS):
            begin = time.perf_counter()
            model(input_ids=ids, use_cache=True)
            found.append(time.perf_counter() - begin)
    return found[_WARM:]


def _place(model: str, precision: str, folder: Path) -> Path:
    if model not in shapes.SHAPES:
        return Path(model).expanduser()
    make, kind = (shapes.make_store, "planes") if of_planes(precision) else (shapes.make_checkpoint, "bf16")
    return make(shapes.find(model), folder / f"{model}-{kind}-0", 0)
