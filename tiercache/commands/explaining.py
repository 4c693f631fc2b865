"""`tiercache-profile explain`: where the milliseconds of a token go, what binds, and what would bind next."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from profiler.energy import G_PER_KWH, LIFETIME_YEARS
from profiler.figure import ERROR
from tiercache.commands.base import Json, Quiet, begin, console, tell
from tiercache.commands.machine_options import (
    DRAFT_DEPTH,
    DRAM_KIND,
    SSD,
    CarbonIntensity,
    Context,
    DraftDepth,
    Drafter,
    DraftNodes,
    DraftS,
    Dram,
    DramKind,
    EmbodiedKg,
    Gpu,
    HardwareFile,
    Lanes,
    LifetimeYears,
    Past,
    Precision,
    Question,
    Ssd,
    TokensPerPass,
)
from tiercache.commands.predicting import profile
from tiercache.config.sizes import human
from tiercache.errors import UsageError, permissions_named

_Subject = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|FILE.json",
        help="A model, as predict takes it; or a file with what predict --json or tiercache run --json printed.",
    ),
]
_COLUMNS = {
    "compute": "device",
    "cpu": "cpu",
    "link": "link",
    "dram": "main memory",
    "ssd": "ssd",
}


@profile.command("explain")
def explain_command(
    ctx: typer.Context,
    model: _Subject,
    gpu: Gpu = "3090",
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
    carbon_intensity: CarbonIntensity = G_PER_KWH,
    embodied_kg: EmbodiedKg = None,
    lifetime_years: LifetimeYears = LIFETIME_YEARS,
    file: HardwareFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Explain a prediction or a run: where each millisecond of a token goes, what binds, and what would bind next."""
    begin("explain", as_json, quiet, library=False)  # a file needs none of it
    from tiercache.engine.explanation import explanation

    path = Path(model).expanduser()
    given = path.is_file() and path.suffix == ".json" and path.name != "config.json"
    result = explanation(_read(path) if given else Question.of(ctx.params).answer())
    if not quiet and not as_json:
        _show(result)
    tell("\n".join(_lines(result)), result, as_json, quiet)


def _read(path: Path) -> dict[str, Any]:
    from tiercache.engine.explanation import WANTED

    try:
        with permissions_named(path):
            found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise UsageError(f"{path} is no JSON ({error}); give {WANTED}") from error
    if not isinstance(found, dict):
        raise UsageError(f"{path} holds a {type(found).__name__}; give {WANTED}")
    return found


def _show(result: dict[str, Any]) -> None:
    """Two tables; titles stand beside them, since a narrow table would break them."""
    whole, busy = result["token_ms"], result["busy_ms"] or {}
    console().print(f"{result['subject']}: {whole:.1f} ms a token")
    adds = Table("what", *(Column(heading, justify="right") for heading in ("adds ms", "of a token", "busy ms")))
    for name, each in sorted(result["adds_ms"].items(), key=lambda pair: -pair[1]):
        if each:
            shown = f"{busy[name]:.1f}" if name in busy else ""
            adds.add_row(_COLUMNS.get(name, name), f"{each:.1f}", f"{each / whole:.0%}", shown)
    console().print(adds)
    if (kinds := result["by_kind_ms"]) is None:
        return
    used = [name for name in _COLUMNS if any(each.get(name) for each in kinds.values())]
    console().print("busy milliseconds of a token, by kind of layer; main memory's lie within the others'")
    table = Table("layers", *(Column(_COLUMNS[name], justify="right") for name in used))
    for kind, each in kinds.items():
        table.add_row(kind, *(f"{each[name]:.1f}" if each.get(name) else "" for name in used))
    console().print(table)


def _lines(result: dict[str, Any]) -> list[str]:
    nbytes = ", ".join(f"{human(value)} {name}" for name, value in result["bytes_per_token"].items() if value)
    basis = result["basis"]
    sure = "" if result["of"] == "run" else f", +-{ERROR[basis]:.0%}; check it there with: tiercache bench model"
    return [
        f"{result['tokens_per_s']:.2f} tokens/s, {result['tokens_per_pass']:.2g} tokens a pass; a token needs {nbytes}",
        *(_step(place, each) for place, each in enumerate(result["bottlenecks"])),
        f"basis: {basis}{sure}",
    ]


def _step(place: int, step: dict[str, Any]) -> str:
    name, twice, gone = step["binding_tier"], step["twice_as_fast"], step["infinitely_fast"]
    who = _COLUMNS.get(name, name)
    first = f"bound by {who}" if not place else f"then by {who}, at {step['tokens_per_s']:.2f} tokens/s"
    end = "; nothing else is left" if gone is None else f"; infinitely fast, {gone['tokens_per_s']:.2f}"
    by = _COLUMNS.get(twice["binding_tier"], twice["binding_tier"])
    return f"{first}: twice as fast it would be {twice['tokens_per_s']:.2f} tokens/s, bound by {by}{end}"
