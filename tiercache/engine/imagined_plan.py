"""The plan of a run on a machine that need not be here: every way is enumerated, and the fastest is taken.

Knows workloads and the planner; prints nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from policies.run_plan import RunPlan
from profiler import planner
from profiler.hardware import Hardware
from profiler.planner import Refused, Way
from profiler.workload import Workload
from tiercache.config.options import OffloadConfig
from tiercache.engine.budgets import fitted
from tiercache.engine.planning import IMAGINED, model_identity, options_of, told
from tiercache.engine.prediction import Case, PredictedDrafting
from tiercache.errors import DoesNotFitError

_STREAMED, _ON_CPU = "copied up", "multiplied by the CPU (cpu_tokens=)"


def imagined_plan(
    workload_at: Callable[[str], Workload],
    precisions: Sequence[str],
    machine: Hardware,
    identity: dict[str, Any],
    config: OffloadConfig,
    *,
    past: int = 0,
    drafts: PredictedDrafting | None = None,
) -> RunPlan:
    """The fastest way, with the second best and the reasons.

    Args:
        workload_at: the model's workload at a precision.
        precisions: that are good enough, the one that is liked best first: of two that tie it is taken.
        machine: may be another than this one.
        identity: of it, for the plan.
        config: the options beside precision and budgets.
        past: tokens in the KV cache.
        drafts: how it may draft; None for plain decoding alone.

    Raises:
        DoesNotFitError: nothing fits.
    """
    ways, refused = _enumerated(workload_at, precisions, machine, drafts)
    ranked = planner.rank(ways, machine, past=past)
    best = ranked[0].way
    precision = best.choices["precision"]
    chosen = replace(config, precision=precision)  # type: ignore[arg-type]
    return RunPlan(
        machine={**identity, IMAGINED: True},
        model=model_identity(best.workload.needs, precision),
        options=options_of(chosen, best.plan) | {"cpu_tokens": best.cpu_tokens or None},
        settings=best.settings,
        placement=best.plan.to_dict(),
        decisions=planner.decisions(ranked, refused),
        predicted=told(ranked[0]) | {"basis": machine.basis},
        runner_up=told(ranked[1]) if len(ranked) > 1 else None,
    )


def _enumerated(
    workload_at: Callable[[str], Workload],
    precisions: Sequence[str],
    machine: Hardware,
    drafts: PredictedDrafting | None,
) -> tuple[list[Way], list[Refused]]:
    """Every way that fits, and those that do not."""
    ways: list[Way] = []
    refused: list[Refused] = []
    errors: list[DoesNotFitError] = []
    drafting_or_not: list[PredictedDrafting | None] = [None] if drafts is None else [None, drafts]
    for precision in precisions:
        workload = workload_at(precision)
        for drafting in drafting_or_not:
            found = _ways(precision, workload, machine, drafting)
            if isinstance(found, DoesNotFitError):
                choices = {"precision": precision, "drafting": _named(drafting)}
                refused.append(Refused(choices, found.tier or "memory", found.missing_bytes))
                errors.append(found)
            else:
                ways += found
    if not ways:
        raise min(errors, key=lambda error: error.missing_bytes)
    return ways, refused


def _ways(
    precision: str, workload: Workload, machine: Hardware, drafts: PredictedDrafting | None
) -> list[Way] | DoesNotFitError:
    """The ways at one precision, drafting or not; why there is none."""
    case = fitted(partial(Case.of, workload, machine, 0, drafts))
    if isinstance(case, DoesNotFitError):
        return case
    drafting = None if drafts is None else drafts.on(machine)
    tokens = 1 if drafting is None else 1 + drafting.nodes
    found = []
    for cpu_tokens in (0, tokens) if case.plan.copied else (0,):
        choices = {
            "precision": precision,
            "drafting": _named(drafts),
            "weights beyond the card": _ON_CPU if cpu_tokens else _STREAMED,
        }
        found.append(Way(choices, case.workload, case.plan, cpu_tokens=cpu_tokens, drafting=drafting))
    return found


def _named(drafts: PredictedDrafting | None) -> str:
    return "none" if drafts is None else f"a tree of {drafts.drafting.nodes}"
