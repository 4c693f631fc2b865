"""Predicts passes, runs them, and tells by how much the predictions are off.

Knows the cost model and the public way to open a model; prints nothing.
"""

import statistics
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import tiercache
from policies.plan import Plan
from profiler.cost_model import PassTime, pass_time
from profiler.fitting import Pair
from profiler.hardware import Hardware
from profiler.workload import Workload
from tiercache.bench import shapes
from tiercache.bench.layer_probe import SHARE, by_turns, starved_bytes
from tiercache.bench.undisturbed import Watch
from tiercache.config.options import OffloadConfig, of_planes
from tiercache.config.sizes import Budget
from tiercache.engine.workload import imagined_workload
from tiercache.errors import UsageError
from tiercache.progress import bar
from tiercache.store.format import CATALOG_FILE

SCHEMA = "tiercache.validation/1"
REPEATS = 5
_CONTEXT = 1024
_WARM = 2
_PATIENCE_S = 120.0
_DRAFTER_BYTES = 32 << 20  # tables of n-grams and what verifying a tree takes beside a pass
_NODES, _NEW = 16, 12  # of a tree; tokens of a text
_PROMPT = [*range(5, 21)] * 4


@dataclass(frozen=True)
class Case:
    """A prediction and what came of it.

    Attributes:
        name: model, precision, budget, tokens.
        predicted_s, measured_s: seconds of a pass, of a drafted run of a round; the second the median of five.
        bound_s: the least that the model says it could take.
        binding: the resource that binds, by the model.
        spread: half the range of the five, as a share of their median.
        error: predicted over measured, less one.
        pair: for fits; None of drafted runs, in which not only passes take time.
    """

    name: str
    predicted_s: float
    measured_s: float
    bound_s: float
    binding: str
    spread: float
    error: float
    pair: Pair | None = None


def validate(
    models: list[str],
    precisions: list[str],
    token_counts: list[int],
    machine: Hardware,
    *,
    folder: Path,
    drafted: bool = True,
    show_progress: bool | None = None,
) -> tuple[dict[str, Any], list[Pair]]:
    """Compare on every combination, with all weights in main memory and with a share of them; and keep nothing.

    Args:
        models: folders of stores or checkpoints, or names of shapes, whose weights are random then.
        precisions: of the weights; a folder that has no weights of one is left out.
        token_counts: of a pass.
        machine: as measured.
        folder: where random models are made.
        drafted: also rounds that verify a tree.
        show_progress: draw a bar; None means where standard error is a terminal.

    Returns:
        The result, and the pairs of predicted and actual passes that later fits are made of.
    """
    watch = Watch(machine.handover_s.value if machine.handover_s else None, _PATIENCE_S)
    total = len(models) * len(precisions) * 2
    with bar("predicting and running", total, show=show_progress) as advance:
        cases: list[Case] = []
        for model in models:
            for precision in precisions:
                if (place := _place(model, precision, folder)) is not None:
                    setting = _Setting(model, place, precision, machine, watch, drafted)
                    cases += setting.cases(token_counts, advance)
    if not cases:
        raise UsageError(f"{', '.join(models)} cannot be run at {', '.join(precisions)}: give a store, or a checkpoint")
    errors = [abs(case.error) for case in cases]
    result = {
        "schema": SCHEMA,
        "cases": [{name: value for name, value in asdict(case).items() if name != "pair"} for case in cases],
        "median_error": statistics.median(errors),
        "worst_error": max(errors),
        "beyond_bound": [case.name for case in cases if case.measured_s < case.bound_s],
        "disturbed": watch.disturbed,
    }
    return result, [case.pair for case in cases if case.pair is not None]


@dataclass(frozen=True)
class _Setting:
    """A model at a precision."""

    model: str
    place: Path
    precision: Any
    machine: Hardware
    watch: Watch
    drafted: bool

    def cases(self, token_counts: list[int], advance: Callable[[int], None]) -> Iterator[Case]:
        """Of all its passes."""
        sizes: dict[str, Any] = {"context": _CONTEXT, "logits": max(*token_counts, _NODES + 1)}
        options = OffloadConfig(hbm=None, dram=Budget(), precision=self.precision, **sizes)
        workload: Workload | None = None
        for share in (1.0, SHARE):
            dram = "auto" if workload is None else str(starved_bytes(workload))
            name = f"{_named(self.place, self.model)} {self.precision}, {share:.0%} in memory"
            given: dict[str, Any] = {
                "precision": self.precision,
                "dram": dram,
                "show_progress": False,
                "plan": "default",
                **sizes,
            }
            with tiercache.offload(self.place, **given) as model:
                opened: Any = model
                workload = imagined_workload(opened.config, options, gpu=False)
                seconds = self.watch.undisturbed(partial(_seconds, opened, token_counts))
                plan = opened.tiercache.plan
                for tokens in token_counts:
                    yield self._case(f"{name}, {tokens} tokens", workload, plan, tokens, seconds[tokens])
            if self.drafted:
                if share < 1:
                    given["dram"] = str(starved_bytes(workload) + _DRAFTER_BYTES)
                tree: dict[str, Any] = {"drafter": "ngram", "draft_nodes": _NODES, "draft_fixed": True}
                with tiercache.offload(self.place, **given, **tree) as model:
                    yield self._drafted(f"{name}, drafted", workload, model)
            advance(1)

    def _case(self, name: str, workload: Workload, plan: Plan, tokens: int, seconds: list[float]) -> Case:
        made = pass_time(workload, plan, self.machine, tokens=tokens)
        middle = statistics.median(seconds)
        plain = pass_time(workload, plan, replace(self.machine, fitted={}), tokens=tokens)
        pair = Pair.of(name, plain, self.machine.overlap.value, middle)
        return _compared(name, made.total_s, made, seconds, pair)

    def _drafted(self, name: str, workload: Workload, model: Any) -> Case:
        """A round: the pass is predicted, and drafting takes what it took."""
        rounds = self.watch.undisturbed(partial(_rounds, model))
        nodes, draft_s = rounds[-1].nodes, statistics.median(each.draft_s for each in rounds)
        made = pass_time(workload, model.tiercache.plan, self.machine, tokens=1 + nodes, past=len(_PROMPT))
        seconds = [each.round_s for each in rounds]
        return _compared(f"{name}, trees of {nodes}", made.total_s + draft_s, made, seconds, None)


@dataclass(frozen=True)
class _Round:
    nodes: int
    draft_s: float
    round_s: float


def _rounds(model: Any) -> list[_Round]:
    """The mean round of each of five texts, the first one left out."""
    found = []
    ids = torch.tensor([_PROMPT])
    for _ in range(1 + REPEATS):
        before = copy(model.tiercache.stats().drafting)
        model.generate(ids, max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False, pad_token_id=0)
        after = model.tiercache.stats().drafting
        count = after.rounds - before.rounds
        drafts, verifies = after.draft_s - before.draft_s, after.verify_s - before.verify_s
        nodes = round((after.nodes - before.nodes) / count)
        found.append(_Round(nodes, drafts / count, (drafts + verifies) / count))
    return found[1:]


def _compared(name: str, predicted_s: float, made: PassTime, seconds: list[float], pair: Pair | None) -> Case:
    middle = statistics.median(seconds)
    spread = (max(seconds) - min(seconds)) / 2 / middle
    return Case(name, predicted_s, middle, made.bound_s, made.binding, spread, predicted_s / middle - 1, pair)


def _seconds(model: Any, token_counts: list[int]) -> dict[int, list[float]]:
    """Of passes with nothing before them, by their tokens; the first ones left out."""
    once = {
        tokens: partial(model, input_ids=(torch.arange(tokens) * 7 % 1000)[None], use_cache=True)
        for tokens in token_counts
    }
    with torch.inference_mode():
        by_turns(once, dict.fromkeys(token_counts, _WARM))
        return by_turns(once, dict.fromkeys(token_counts, REPEATS))


def _place(model: str, precision: str, folder: Path) -> Path | None:
    """The model's folder, made where it is a shape's; None where it has no weights of that precision."""
    if model not in shapes.SHAPES:
        place = Path(model).expanduser()
        return place if (place / CATALOG_FILE).is_file() == of_planes(precision) else None
    make, kind = (shapes.make_store, "planes") if of_planes(precision) else (shapes.make_checkpoint, "bf16")
    return make(shapes.find(model), folder / f"{model}-{kind}-0", 0)


def _named(place: Path, model: str) -> str:
    """What people call it: a folder that is called by what it holds goes by the one above it."""
    return (
        model if model in shapes.SHAPES else place.parent.name if place.name in ("store", "checkpoint") else place.name
    )
