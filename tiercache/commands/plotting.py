"""`tiercache-profile plot`: a machine's roofs, where the time of a token goes, tokens a second against each budget."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from profiler.cost_model import Prediction
from profiler.explanation import exposed_s
from profiler.figure import ERROR
from profiler.hardware import Hardware
from profiler.workload import Workload
from tiercache import pictures
from tiercache.commands import charts, text_charts
from tiercache.commands.base import Json, Quiet, begin, console, say, tell
from tiercache.commands.machine_options import (
    DRAFT_DEPTH,
    DRAM_KIND,
    SSD,
    Context,
    DraftDepth,
    Drafter,
    DraftNodes,
    DraftS,
    Dram,
    DramKind,
    HardwareFile,
    Lanes,
    Model,
    Past,
    Precision,
    Question,
    Ssd,
    TokensPerPass,
    computing,
    ways_out,
)
from tiercache.commands.predicting import profile
from tiercache.config.sizes import human
from tiercache.errors import DoesNotFitError, UsageError

if TYPE_CHECKING:  # it imports torch, which --help should not cost
    from tiercache.engine.prediction import Case

_PROMPT, _TREE = 512, 64  # tokens of the prefill, and nodes of a tree where none are given, on a roofline
_STEPS, _BEYOND = 40, 1.35  # points of a line, and how far beyond the model's bytes it goes
_GIB = 1 << 30
_WAYS = {"stream": "copied up", "cpu": "the CPU multiplies", "stay": "all on it", "ssd": "from the SSD"}

_Kind = Annotated[
    Literal["roofline", "time", "budgets"],
    typer.Option(help="roofline: limits and operations; time: what a token takes; budgets: speed by memory."),
]
_Out = Annotated[Path | None, typer.Option(help="A .png or .svg; without it the chart is text.")]


@profile.command("plot")
def plot_command(
    ctx: typer.Context,
    model: Model,
    kind: _Kind = "roofline",
    out: _Out = None,
    gpus: Annotated[list[str], typer.Option("--gpu", help="Cards; several, but for a roofline.")] = ["3090"],  # noqa: B006
    dram: Dram = None,
    dram_kind: DramKind = DRAM_KIND,
    ssd: Ssd = SSD,
    lanes: Lanes = None,
    precision: Precision = "int4",
    context: Context = 4096,
    past: Past = 512,
    draft_nodes: DraftNodes = 0,
    tokens_per_pass: TokensPerPass = 1.0,
    draft_s: DraftS = 0.0,
    drafter: Drafter = None,
    draft_depth: DraftDepth = DRAFT_DEPTH,
    file: HardwareFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw a prediction: as a picture with --out, which needs matplotlib, or as text."""
    begin("plot", as_json, quiet)
    if out is not None:
        pictures.check(out, charts.OPTION)
    if kind == "roofline" and len(gpus) > 1:
        raise UsageError(f"a roofline is of one machine, not of {len(gpus)}; give one --gpu, or --kind time")
    show(chart_of(kind, [Question.of({**ctx.params, "gpu": gpu}) for gpu in gpus]), out, as_json, quiet)


def chart_of(kind: str, questions: Sequence[Question]) -> dict[str, Any]:
    """A "roofline", "time" or "budgets" as plain data, which `charts.figure` draws.

    Args:
        kind: of chart; a roofline is of the first question's machine.
        questions: of one model at one precision, each on a machine of its own.

    Raises:
        UsageError, DoesNotFitError: of a question.
    """
    cases = list(_cases(questions))
    make = {"roofline": _roofline, "time": _time, "budgets": _budgets}[kind]
    machine, asked = cases[0].case.machine, questions[0]
    basis, size = machine.basis, human(machine.dram.capacity_bytes)
    where = f"{size}, {machine.dram.gbps.value:.3g} GB/s; SSD {machine.ssd_gbps.value:.3g} GB/s"
    title = f"{asked.model} at {asked.precision}; main memory {where}; {basis} figures, +-{ERROR[basis]:.0%}"
    made = {"schema": "tiercache.plot/1", "kind": kind, "model": asked.model, "title": title, "basis": basis}
    return made | make(cases)


def show(chart: dict[str, Any], out: Path | None, as_json: bool, quiet: bool) -> None:
    """Draw a chart into a file, or print it as text."""
    if out is not None:
        charts.draw(chart, out)
        say(f"drawn in {out}", quiet)
    elif not quiet and not as_json:
        for part in text_charts.of(chart):
            console().print(part)
    tell("", {**chart, "out": None if out is None else str(out)}, as_json, quiet=True)


class _Placed(NamedTuple):
    """A machine's name, and the model placed in it: with the drafting that is asked for, and without."""

    name: str
    case: "Case"
    plain: "Case"


def _cases(questions: Sequence[Question]) -> Iterator[_Placed]:
    """Each machine's. Building a model takes seconds, so that machines share it."""
    from tiercache.engine.prediction import Case

    workloads: dict[Any, Workload] = {}  # by what computes
    for question in questions:
        machine = question.machine
        if (kind := computing(machine)) not in workloads:
            workloads[kind] = question.workload(machine)
        with ways_out(machine):
            plain = Case.of(workloads[kind], machine, question.past, None)
            drafts = question.drafts(machine)
            case = plain if drafts is None else Case.of(workloads[kind], machine, question.past, drafts)
        yield _Placed(question.gpu, case, plain)


def _roofline(cases: Sequence[_Placed]) -> dict[str, Any]:
    from profiler.roofline import Phase, operations, roofs

    name, case, _ = cases[0]
    nodes = _TREE if case.drafts is None else case.drafts.drafting.nodes
    phases = {
        "decode": Phase(1, case.past),
        f"verify {nodes} nodes": Phase(1 + nodes, case.past),
        f"prefill of {_PROMPT}": Phase(_PROMPT, 0),
    }
    done = operations(case.workload, case.plan, case.machine, phases)
    return {
        "gpu": name,
        "roofs": {resource: asdict(roof) for resource, roof in roofs(case.machine).items()},
        "operations": [asdict(each) for each in done],
    }


def _time(cases: Sequence[_Placed]) -> dict[str, Any]:
    """A bar for each way: weights copied up or multiplied by the CPU, and the better of the two with drafting."""
    bars = []
    for name, case, plain in cases:
        chosen = plain.best()
        found = [(chosen.how, chosen.prediction)]
        if chosen.runner_up is not None:
            found.append(("cpu" if chosen.how == "stream" else "stream", chosen.runner_up))
        bars += [_bar(f"{name}, {_WAYS[how]}", plain, prediction) for how, prediction in found]
        if case.drafts is not None:
            best = case.best()
            bars.append(_bar(f"{name}, drafted, {_WAYS[best.how]}", case, best.prediction))
    return {"bars": bars}


def _bar(name: str, case: "Case", prediction: Prediction) -> dict[str, Any]:
    """What each part adds to a token, in ms."""
    adds, emitted = exposed_s(prediction.pass_time, case.machine.overlap.value), 1.0
    if case.drafts is not None:
        drafting = case.drafts.on(case.machine)
        adds, emitted = adds | {"drafting": drafting.draft_s}, drafting.tokens_per_pass
    ms = {part: 1e3 * seconds / emitted for part, seconds in adds.items()}
    return {"name": name, "tokens_per_s": prediction.tokens_per_s, "ms": ms}


def _budgets(cases: Sequence[_Placed]) -> dict[str, Any]:
    """Tokens a second by the size of main memory, and by the card's, whose other figures stay."""

    def with_dram(machine: Hardware, nbytes: int) -> Hardware:
        return replace(machine, dram=replace(machine.dram, capacity_bytes=nbytes))

    def with_hbm(machine: Hardware, nbytes: int) -> Hardware:
        assert machine.gpu is not None
        memory = replace(machine.gpu.memory, capacity_bytes=nbytes)
        return replace(machine, gpu=replace(machine.gpu, memory=memory))

    panels = []
    cards = [placed for placed in cases if placed.case.machine.gpu is not None]
    for axis, resized, some in (("main memory", with_dram, cases), ("card memory", with_hbm, cards)):
        if not some:
            continue
        lines = []
        for name, case, _ in some:
            machine, card = case.machine, case.machine.gpu
            own = machine.dram.capacity_bytes if axis == "main memory" or card is None else card.memory.capacity_bytes
            most = max(own, _BEYOND * case.workload.pass_bytes)
            sizes = [int(most * step / _STEPS) for step in range(1, _STEPS + 1)]
            points = [(size / _GIB, _speed(case, resized(machine, size))) for size in sizes]
            lines.append({"name": name, "points": points, "own": (own / _GIB, _speed(case, machine))})
        panels.append({"axis": f"{axis}, GiB", "title": f"by {axis}; dots are the machine as it is", "lines": lines})
    return {"panels": panels}


def _speed(case: "Case", machine: Hardware) -> float | None:
    """Tokens a second of a case placed in another machine; None where it does not fit."""
    from tiercache.engine.prediction import Case

    try:
        return Case.of(case.workload, machine, case.past, case.drafts).best().prediction.tokens_per_s
    except DoesNotFitError:
        return None
