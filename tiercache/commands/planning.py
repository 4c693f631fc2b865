"""`tiercache-profile plan`: the plan of a run, for this machine or for one that need not be here."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from policies.plan import table_of
from policies.run_plan import Decision, RunPlan
from profiler.planner import TIE
from tiercache.commands.base import Json, Quiet, begin, console, progress, tell
from tiercache.commands.machine_options import (
    DRAFT_DEPTH,
    DRAM_KIND,
    SSD,
    Context,
    Dram,
    DramKind,
    HardwareFile,
    Lanes,
    Model,
    Past,
    Question,
    Ssd,
    ways_out,
)
from tiercache.commands.predicting import profile
from tiercache.config.options import OffloadConfig, read_options
from tiercache.config.sizes import Budget, human
from tiercache.errors import DoesNotFitError, UsageError

_Gpu = Annotated[
    str | None,
    typer.Option(help="Plan for a machine with this card, or none, or this as probed; left out, for a run here."),
]
_Hbm = Annotated[str, typer.Option(help="Here: budget of the fastest tier.")]
_Precisions = Annotated[
    str,
    typer.Option("--precision", help="What is good enough: source, int8, int4, int3; a list, the best liked first."),
]
_ComputeDtype = Annotated[str, typer.Option(help="Here: auto, fp32, fp16 or bf16.")]
_Logits = Annotated[int, typer.Option(min=1, help="Here: rows of logits that a pass returns at most.")]
_Drafter = Annotated[str, typer.Option(help="Here: auto, resident, ngram, ..., or none. Elsewhere: a small model.")]
_Out = Annotated[Path | None, typer.Option(help="Where to write the plan; offload(plan=FILE) takes it.")]
_Settle = Annotated[bool, typer.Option("--settle", help="Here: run ways that the model cannot tell apart.")]
_Nodes = Annotated[int, typer.Option(min=0, help="Elsewhere: nodes of a tree of drafts; 0 for none.")]
_PAST = 512
_UNPROBED = "; nobody measured this machine, 'tiercache-profile probe' does"
_PerPass = Annotated[float, typer.Option(min=1, help="Elsewhere: tokens that a drafted pass emits.")]


@profile.command("plan")
def plan_command(
    ctx: typer.Context,
    model: Model,
    gpu: _Gpu = None,
    hbm: _Hbm = "auto",
    dram: Dram = None,
    dram_kind: DramKind = DRAM_KIND,
    ssd: Ssd = SSD,
    lanes: Lanes = None,
    precisions: _Precisions = "int4",
    compute_dtype: _ComputeDtype = "auto",
    context: Context = 4096,
    logits: _Logits = 512,
    past: Past = _PAST,
    drafter: _Drafter = "none",
    draft_nodes: _Nodes = 0,
    tokens_per_pass: _PerPass = 1.0,
    settle: _Settle = False,
    out: _Out = None,
    file: HardwareFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose how to run a model: precision, drafting, who multiplies, prefetch and reads; and say why."""
    begin("plan", as_json, quiet)
    from tiercache.engine.planning import write_plan

    wanted = precisions.split(",")
    if gpu is None:
        given = (dram_kind, ssd, lanes, draft_nodes, tokens_per_pass, file, past)
        if given != (DRAM_KIND, SSD, None, 0, 1.0, None, _PAST):
            raise UsageError(
                "--dram-kind, --ssd, --lanes, --draft-nodes, --past and --hardware are for another machine: add --gpu"
            )
        config = _config(wanted[0], hbm, dram or "auto", drafter, context=context, logits=logits)
        config = replace(config, compute_dtype=compute_dtype)  # type: ignore[arg-type]
        plan = _plan_here(model, config, wanted, settle, progress(as_json, quiet))
    else:
        if settle or hbm != "auto" or compute_dtype != "auto":
            raise UsageError("--settle, --hbm and --compute-dtype are for a run on this machine; leave --gpu out")
        drafts = {"draft_s": 0.0, "draft_depth": DRAFT_DEPTH, "drafter": None if drafter == "none" else drafter}
        plan = plan_elsewhere(Question.of({**ctx.params, **drafts, "precision": wanted[0]}), wanted)
    if out is not None:
        write_plan(plan, out.expanduser())
    if not quiet and not as_json:
        if plan.decisions:
            console().print(_table(plan))
        console().print(_memory(plan))
    tell(_summary(plan, out, here=gpu is None), plan.to_dict() | {"hash": plan.hash}, as_json, quiet)


def _config(precision: Any, hbm: str, dram: str, drafter: str, **sizes: Any) -> OffloadConfig:
    options: Any = {} if drafter == "none" else {"drafter": drafter}
    budgets: Any = {"hbm": Budget.parse(hbm), "dram": Budget.parse(dram)}
    return OffloadConfig(**budgets, **sizes, precision=precision, **read_options(options))


def _plan_here(model: str, config: OffloadConfig, precisions: list[str], settle: bool, show: bool | None) -> RunPlan:
    """The plan that `offload` would make, at the fastest of the precisions."""
    from tiercache.bench.settling import settle as settled
    from tiercache.engine.session import plan_model
    from tiercache.store.checkpoint import resolve

    folder, plans, errors = resolve(model), {}, {}
    precision: Any
    for precision in precisions:
        try:
            plans[precision] = plan_model(folder, replace(config, precision=precision), show_progress=show)
        except DoesNotFitError as error:
            errors[precision] = error
    if not plans:
        raise min(errors.values(), key=lambda error: error.missing_bytes)
    speeds = {name: each.predicted["tokens_per_s"] if each.predicted else 0.0 for name, each in plans.items()}
    ranked = sorted(speeds, key=lambda name: -speeds[name])
    liked = next(name for name in plans if speeds[name] * (1 + TIE) >= speeds[ranked[0]])  # the order of the option
    ranked = [liked, *(name for name in ranked if name != liked)]
    best, plan = liked, plans[liked]
    if len(precisions) > 1:
        other = ranked[1] if len(ranked) > 1 else next(iter(errors))
        gain, reason = None, "it is predicted to be faster"
        if other in errors:
            reason = f"the other lacks {errors[other].missing_bytes} bytes"
        elif (gain := speeds[best] / speeds[other] - 1) <= 0:
            reason = f"it is liked better, and within {TIE:.0%} as fast"
        plan = replace(plan, decisions=(Decision("precision", best, other, gain, reason), *plan.decisions))
    chosen: Any = best
    return settled(folder, replace(config, precision=chosen), plan, show_progress=show) if settle else plan


def plan_elsewhere(question: Question, precisions: list[str]) -> RunPlan:
    """How to run a model on a machine that need not be here, at one of some precisions, the one liked best first.

    Raises:
        UsageError, DoesNotFitError: of the question.
    """
    from tiercache.engine.imagined_plan import imagined_plan

    machine = question.machine
    memory = question.dram or human(machine.dram.capacity_bytes)
    identity = {"gpu": question.gpu, "dram": memory, "dram_kind": question.dram_kind, "ssd": question.ssd}
    with ways_out(machine):
        return imagined_plan(
            lambda precision: replace(question, precision=precision).workload(machine),
            precisions,
            machine,
            identity,
            OffloadConfig(hbm=Budget(), dram=Budget(), context=question.context),
            past=question.past,
            drafts=question.drafts(machine),
        )


def _table(plan: RunPlan) -> Table:
    shown = Table(title="What was decided", title_justify="left")
    for heading in ("what", "choice", "instead of", "faster by", "why"):
        shown.add_column(heading)
    for each in plan.decisions:
        gain = "" if each.gain is None else f"{each.gain:+.0%}"
        shown.add_row(each.what, each.choice, each.alternative or "", gain, each.reason)
    return shown


def _memory(plan: RunPlan) -> Table:
    """What each tier's bytes are for."""
    found = table_of(plan.placement)
    shown = Table(title=found.title, title_justify="left")
    for heading in found.headings:
        shown.add_column(heading)
    for row in found.rows:
        shown.add_row(*row)
    return shown


def _summary(plan: RunPlan, out: Path | None, *, here: bool) -> str:
    card = plan.machine.get("gpu")
    on = "the CPU" if card in (None, "cpu") else card
    written = "" if out is None else f", written to {out}"
    lines = [f"plan {plan.hash}{written}: {plan.model['precision']} on {on}"]
    if (made := plan.predicted) is not None:
        lines.append(
            f"{made['tokens_per_s']:.2f} tokens/s, between {made['low']:.2f} and {made['high']:.2f}; bound by "
            f"{made['binding_tier']}"
        )
        lines.append(f"basis: {made['basis']}" + (_UNPROBED if here and made["basis"] == "spec" else ""))
    if not plan.decisions:
        lines.append("nothing was left to decide: the rules of thumb hold")
    if (second := plan.runner_up) is not None:
        named = ", ".join(f"{what} {choice}" for what, choice in second["choices"].items())
        lines.append(f"second best, {second['tokens_per_s']:.2f} tokens/s: {named}")
    return "\n".join(lines)
