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
from tiercache.bench.layer_probe import SHARE, starved_bytes
from tiercache.bench.undisturbed import Pace, Sample, Watch, seconds_of
from tiercache.config.options import OffloadConfig, of_planes
from tiercache.config.sizes import Budget
from tiercache.engine.compute_dtype import capability_of
from tiercache.engine.workload import imagined_workload
from tiercache.errors import UsageError
from tiercache.progress import bar
from tiercache.store.format import CATALOG_FILE
from tiercache.tiers.device import Device, device_of

SCHEMA = "tiercache.validation/1"
REPEATS = 5
_CONTEXT = 1024
_WARM = 2
_PATIENCE_S = 30.0  # of each measurement
_DRAFTER_BYTES = 32 << 20  # tables of n-grams and what verifying a tree takes beside a pass
_NODES, _NEW = 16, 24  # of a tree; tokens of a text
_NO_TOKEN = -1  # that would end it
_PROMPT = [*range(5, 21)] * 4


@dataclass(frozen=True)
class Case:
    """A prediction and what came of it.

    Attributes:
        name: model, precision, budget, tokens.
        predicted_s, measured_s: seconds of a pass, of a drafted run of a round: of five, the one whose error is the
            median.
        bound_s: the least that the model says it could take.
        binding: the resource that binds, by the model.
        pace: how many times as long a loop of plain Python took then as in the probe; what the prediction allows for.
        spread: half the range of predicted over measured, as a share of the median.
        error: predicted over measured, less one.
        pair: for fits; None of drafted runs, in which not only passes take time.
    """

    name: str
    predicted_s: float
    measured_s: float
    bound_s: float
    binding: str
    pace: float
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
    device: torch.device,
    drafted: bool = True,
    show_progress: bool | None = None,
) -> tuple[dict[str, Any], list[Pair]]:
    """Compare on every combination, with all weights in the fastest tier and with a share of them; and keep nothing.

    Args:
        models: folders of stores or checkpoints, or names of shapes, whose weights are random then.
        precisions: of the weights; a folder that has no weights of one is left out.
        token_counts: of a pass.
        machine: as measured.
        folder: where random models are made.
        device: that computes.
        drafted: also rounds that verify a tree.
        show_progress: draw a bar; None means where standard error is a terminal.

    Returns:
        The result, and the pairs of predicted and actual passes that later fits are made of.
    """
    loop, handover = machine.loop_s, machine.handover_s
    watch = Watch(_PATIENCE_S, None if loop is None or handover is None else Pace(loop.value, handover.value))
    total = len(models) * len(precisions) * 2
    with bar("predicting and running", total, show=show_progress) as advance:
        cases: list[Case] = []
        for model in models:
            for precision in precisions:
                if (place := _place(model, precision, folder)) is not None:
                    setting = _Setting(model, place, precision, machine, watch, device_of(device), drafted)
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
        "disturbed": watch.share_disturbed,
    }
    return result, [case.pair for case in cases if case.pair is not None]


@dataclass(frozen=True)
class _Try:
    """A pass, and what takes time beside it, as predicted at a pace and as measured."""

    made: PassTime
    beside_s: float
    measured_s: float
    pace: float

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return (self.made.total_s + self.beside_s) / self.measured_s


@dataclass(frozen=True)
class _Setting:
    """A model at a precision."""

    model: str
    place: Path
    precision: Any
    machine: Hardware
    watch: Watch
    device: Device
    drafted: bool

    @property
    def has_card(self) -> bool:
        """Whether its own memory is the fastest tier."""
        return not self.device.on_host

    def _budget(self, nbytes: int) -> dict[str, str]:
        """Of the fastest tier; 0 for as much as there is."""
        return {"hbm" if self.has_card else "dram": str(nbytes) if nbytes else "auto"}

    def cases(self, token_counts: list[int], advance: Callable[[int], None]) -> Iterator[Case]:
        """Of all its passes."""
        sizes: dict[str, Any] = {"context": _CONTEXT, "logits": max(*token_counts, _NODES + 1)}
        options = OffloadConfig(hbm=None, dram=Budget(), precision=self.precision, **sizes)
        workload: Workload | None = None
        for share in (1.0, SHARE):
            nbytes = 0 if workload is None else starved_bytes(workload, hbm=self.has_card)
            name = f"{_named(self.place, self.model)} {self.precision}, {share:.0%} in memory"
            given: dict[str, Any] = {
                "precision": self.precision,
                "device": str(self.device.at),
                **self._budget(nbytes),
                "show_progress": False,
                "plan": "default",
                **sizes,
            }
            with tiercache.offload(self.place, **given) as model:
                opened: Any = model
                workload = imagined_workload(
                    opened.config, options, gpu=self.has_card, capability=capability_of(self.device.at)
                )
                seconds = _seconds(opened, token_counts, self.watch, self.device)
                plan = opened.tiercache.plan
                for tokens in token_counts:
                    yield self._passes(f"{name}, {tokens} tokens", workload, plan, tokens, seconds[tokens])
            if self.drafted:
                if share < 1:
                    given |= self._budget(nbytes + _DRAFTER_BYTES)
                tree: dict[str, Any] = {"drafter": "ngram", "draft_nodes": _NODES, "draft_fixed": True}
                with tiercache.offload(self.place, **given, **tree) as model:
                    yield self._drafted(f"{name}, drafted", workload, model)
            advance(1)

    def _passes(self, name: str, workload: Workload, plan: Plan, tokens: int, samples: list[Sample[float]]) -> Case:
        made = partial(pass_time, workload, plan, tokens=tokens)
        case = _middle(name, [self._try(made, sample, sample.what) for sample in samples])
        plain = made(replace(self.machine, fitted={}, pace=case.pace))
        return replace(case, pair=Pair.of(name, plain, self.machine.overlap.value, case.measured_s))

    def _drafted(self, name: str, workload: Workload, model: Any) -> Case:
        """A round: the pass is predicted, and drafting takes what it took."""
        rounds = _rounds(model, self.watch, self.device)
        nodes = rounds[0].what.nodes
        made = partial(pass_time, workload, model.tiercache.plan, tokens=1 + nodes, past=len(_PROMPT))
        tried = [self._try(made, each, each.what.round_s, each.what.draft_s) for each in rounds]
        return _middle(f"{name}, trees of {nodes}", tried)

    def _try(
        self, made: Callable[[Hardware], PassTime], sample: Sample[Any], took_s: float, beside_s: float = 0.0
    ) -> _Try:
        pace = sample.loop_s / self.machine.loop_s.value if self.machine.loop_s else 1.0
        return _Try(made(replace(self.machine, pace=pace)), beside_s, took_s, pace)


@dataclass(frozen=True)
class _Round:
    nodes: int
    draft_s: float
    round_s: float


def _rounds(model: Any, watch: Watch, device: Device) -> list[Sample[_Round]]:
    """The mean round of each of five texts, the first one left out."""
    ids = torch.tensor([_PROMPT], device=device.at)

    def once() -> _Round:
        before = copy(model.tiercache.stats().drafting)
        model.generate(ids, max_new_tokens=_NEW, do_sample=False, pad_token_id=0, eos_token_id=_NO_TOKEN)
        after = model.tiercache.stats().drafting
        count = after.rounds - before.rounds
        drafts, verifies = after.draft_s - before.draft_s, after.verify_s - before.verify_s
        nodes = round((after.nodes - before.nodes) / count)
        return _Round(nodes, drafts / count, (drafts + verifies) / count)

    once()
    return watch.by_turns({0: once}, {0: REPEATS})[0]


def _middle(name: str, tried: list[_Try]) -> Case:
    """The one whose error is the median."""
    tried = sorted(tried, key=lambda each: each.ratio)
    one = tried[len(tried) // 2]
    spread = (tried[-1].ratio - tried[0].ratio) / 2 / one.ratio
    predicted_s = one.made.total_s + one.beside_s
    return Case(name, predicted_s, one.measured_s, one.made.bound_s, one.made.binding, one.pace, spread, one.ratio - 1)


def _seconds(model: Any, token_counts: list[int], watch: Watch, device: Device) -> dict[int, list[Sample[float]]]:
    """Of passes with nothing before them, by their tokens; the first ones left out."""

    def run(tokens: int) -> None:
        model(input_ids=(torch.arange(tokens, device=device.at) * 7 % 1000)[None], use_cache=True)
        device.synchronize()

    once = {tokens: partial(seconds_of, partial(run, tokens)) for tokens in token_counts}
    with torch.inference_mode():
        for _ in range(_WARM):
            for work in once.values():
                work()
        return watch.by_turns(once, dict.fromkeys(token_counts, REPEATS))


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
