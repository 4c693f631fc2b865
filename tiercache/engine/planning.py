"""The plan of a run, as people keep it: made from a placement, read from a file, and held against what comes out.

Knows options, placements and the JSON of plans; places nothing itself.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from policies.plan import Plan, PlanInputs
from policies.run_plan import RunPlan
from profiler.cost_model import Prediction
from profiler.planner import Ranked
from tiercache.config.drafting import DraftConfig
from tiercache.config.options import STORE_PRECISION, OffloadConfig
from tiercache.config.sizes import Budget
from tiercache.engine.drafting_choice import NGRAMS, NOBODY, OWN_PLANES
from tiercache.engine.placement import ExactPlacement, Placement
from tiercache.engine.probe_cache import identity
from tiercache.errors import UsageError

PlanLike = RunPlan | Path | str
_PLAIN = (
    "precision",
    "kernels",
    "compute_dtype",
    "context",
    "logits",
    "cpu_tokens",
    "mode",
    "max_loss",
    "policy",
    "max_fetches",
    "link_gbps",
)
IMAGINED = "imagined"  # in a plan's machine: it was not there
_UNSET = OffloadConfig(hbm=Budget(), dram=Budget())


def read_plan(given: PlanLike) -> RunPlan | Literal["auto", "default"]:
    """What `offload`'s option `plan` means.

    Raises:
        UsageError: it names a file that cannot be read, or is no plan.
    """
    if isinstance(given, RunPlan):
        return given
    if given == "auto" or given == "default":
        return "auto" if given == "auto" else "default"
    if not isinstance(given, str | Path):
        raise UsageError(f"plan={given!r} is none of 'auto', 'default', a plan's file and a plan")
    path = Path(given).expanduser()
    try:
        return RunPlan.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(
            f"plan={str(given)!r}: {error.strerror}; name a file that 'tiercache-profile plan --out' wrote, or 'auto'"
        ) from error
    except (ValueError, RecursionError) as error:  # PlanError, and what is no JSON or no text
        raise UsageError(f"{path} is no plan: {error}; make it again with 'tiercache-profile plan --out'") from error


def write_plan(plan: RunPlan, path: Path) -> None:
    """Keep a plan as JSON.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(plan.to_dict() | {"hash": plan.hash}) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; name another file") from error


def with_plan(config: OffloadConfig, plan: RunPlan) -> OffloadConfig:
    """The options that a plan was made with, where the caller has left them open.

    Raises:
        UsageError: the caller gave something else than the plan has, or the plan has something that cannot be meant.
    """
    try:
        return _with_plan(config, plan)
    except UsageError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(f"the plan's options have another form ({error!r}); make the plan again") from error


def _with_plan(config: OffloadConfig, plan: RunPlan) -> OffloadConfig:
    planned = _options_of(plan.options)
    draft = planned.pop("draft")
    for name, value in planned.items():
        given = getattr(config, name)
        unset = {STORE_PRECISION, _UNSET.precision} if name == "precision" else (getattr(_UNSET, name),)
        if given != value and given not in unset:
            raise UsageError(f"{name}={_shown(given)} is not what the plan has, {_shown(value)}; leave {name}= out")
    if draft is not None and draft["drafter"] is None and config.draft is None:
        raise UsageError("the plan's drafter was an object of the caller's; give drafter= with such a one")
    if config.draft is not None and (draft is None or _draft_of(config.draft) != draft):
        raise UsageError("the options of drafting are not the plan's; leave them out, or make a plan with them")
    own = config.draft if config.draft is not None or draft is None else DraftConfig(**draft)
    return replace(config, **planned, draft=own, plan=plan, settings=plan.settings)


def refuse_another_machine(config: OffloadConfig, device: torch.device) -> None:
    """Refuse a plan that was made elsewhere, unless it is forced.

    Raises:
        UsageError: what differs.
    """
    if not isinstance(config.plan, RunPlan):
        return
    if config.plan.machine.get(IMAGINED):
        raise UsageError("the plan is for a machine that was not there when it was made; make one on that machine")
    if config.force_plan:
        return
    here, there = identity(device), config.plan.machine
    for name, value in here.items():
        if there.get(name) != value:
            raise UsageError(
                f"the plan was made for another machine: its {name} is {there.get(name)!r}, this one's is {value!r}; "
                "make a plan here, or take it all the same with force_plan=True (--force-plan)"
            )


def refuse_another_placement(config: OffloadConfig, placed: Placement) -> None:
    """Refuse a plan that was made for another model, or that comes out otherwise.

    Raises:
        UsageError: what differs.
    """
    if not isinstance(config.plan, RunPlan):
        return
    if config.plan.model != model_identity(placed.asked.needs, config.precision):
        raise UsageError(
            "the plan was made for another model, or by a version that cuts it otherwise: units have other names or "
            "sizes; make the plan again"
        )
    if not config.plan.places_as(placed.plan):
        raise UsageError(
            "the plan places units otherwise than this version of tiercache does with its budgets; make the plan again"
        )


def plan_of(placed: Placement) -> RunPlan:
    """The plan of a placement."""
    config, ranked = placed.config, placed.ranked
    options = options_of(config, placed.plan)
    if placed.opened.memory is not None:  # the caller's own weights lie beside the budget
        options["dram"] -= sum(placed.asked.needs.sizes[key] for key in placed.asked.needs.order)
    if isinstance(placed, ExactPlacement) and placed.drafter_spec is not None:
        options |= {"draft": _draft_of(placed.drafter_spec.config), "drafts": placed.drafts}
    return RunPlan(
        machine=identity(placed.machine.device),
        model=model_identity(placed.asked.needs, config.precision),
        options=options,
        settings=config.settings,
        placement=placed.plan.to_dict(),
        decisions=placed.decisions,
        predicted=told(ranked[0]) if ranked else None,
        runner_up=told(ranked[1]) if len(ranked) > 1 else None,
    )


def options_of(config: OffloadConfig, plan: Plan) -> dict[str, Any]:
    """The options that a placement depends on, as plain data."""
    share = config.bytes_per_token
    return {
        **{name: getattr(config, name) for name in _PLAIN},
        "hbm": plan.fastest.capacity_bytes if plan.has_hbm else None,
        "dram": plan.dram.capacity_bytes,
        "bytes_per_token": None if share is None else asdict(share),
        "draft": None if config.draft is None else _draft_of(config.draft),
        "drafts": config.drafts,
    }


def told(ranked: Ranked) -> dict[str, Any]:
    """A way and its prediction as plain data."""
    made: Prediction = ranked.prediction
    numbers = {name: getattr(made, name) for name in ("tokens_per_s", "low", "high", "bound")}
    return {
        "choices": dict(ranked.way.choices),
        "settings": asdict(ranked.way.settings),
        **numbers,
        "basis": made.basis,
        "binding_tier": made.pass_time.binding,
        "pass_s": made.pass_time.total_s,
        "busy_s": dict(made.pass_time.busy_s),
        "overhead_s": made.pass_time.overhead_s,
    }


def model_identity(needs: PlanInputs, precision: str) -> dict[str, Any]:
    """What identifies a model's units."""
    listed = json.dumps([[needs.names[key], size] for key, size in sorted(needs.sizes.items())])
    return {"precision": precision, "units": hashlib.sha256(listed.encode()).hexdigest()}


def _options_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `OffloadConfig` from a plan's options; "draft" still as plain data."""
    options: dict[str, Any] = {name: found[name] for name in _PLAIN}
    options["hbm"] = None if found["hbm"] is None else _bytes(found["hbm"])
    options["dram"] = _bytes(found["dram"])
    share, draft = found["bytes_per_token"], found["draft"]
    options["bytes_per_token"] = None if share is None else _share(share)
    if found["drafts"] not in ("", OWN_PLANES, NGRAMS, NOBODY):
        raise ValueError(f"drafts is {found['drafts']!r}")
    options["drafts"] = found["drafts"]
    if draft is not None and not isinstance(draft, dict):
        raise ValueError(f"draft is {draft!r}")
    return {**options, "draft": draft}


def _share(found: Mapping[str, Any]) -> Budget:
    return _bytes(found["size_bytes"]) if found["fraction"] is None else Budget.parse(float(found["fraction"]))


def _bytes(value: object) -> Budget:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{value!r} is no number of bytes")
    return Budget(size_bytes=value)


def _draft_of(draft: DraftConfig) -> dict[str, Any]:
    """Options of drafting as plain data; without a drafter where that is an object."""
    named = str(draft.drafter) if isinstance(draft.drafter, str | Path) else None
    learned = None if draft.learned is None else str(draft.learned)
    own = {item.name: getattr(draft, item.name) for item in fields(draft)}
    return {**own, "drafter": named, "learned": learned}


def _shown(value: object) -> object:
    return value.size_bytes or value.fraction or "auto" if isinstance(value, Budget) else repr(value)
