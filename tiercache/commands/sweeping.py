"""`tiercache-profile sweep`: tokens a second of a model on many machines, as a table and as a heat map."""

import itertools
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from profiler.figure import ERROR
from profiler.hardware import Hardware
from profiler.workload import Workload
from tiercache import pictures
from tiercache.commands import charts, text_charts
from tiercache.commands.base import Json, Quiet, begin, console, say, tell
from tiercache.commands.machine_options import (
    DRAM,
    DRAM_KIND,
    SSD,
    Context,
    DramKind,
    HardwareFile,
    Model,
    Past,
    computing,
    known_hardware,
    machine_of,
    workload_of_name,
)
from tiercache.commands.predicting import profile
from tiercache.config.sizes import human
from tiercache.errors import DoesNotFitError


@profile.command("sweep")
def sweep_command(
    model: Model,
    gpus: Annotated[list[str], typer.Option("--gpu", help="Cards; several.")] = ["3090"],  # noqa: B006 - typer copies it
    drams: Annotated[list[str], typer.Option("--dram", help="Sizes of main memory; several.")] = [DRAM],  # noqa: B006
    ssds: Annotated[list[str], typer.Option("--ssd", help="Kinds or rates of SSDs; several.")] = [SSD],  # noqa: B006
    precisions: Annotated[list[str], typer.Option("--precision", help="Precisions; several.")] = ["int4"],  # noqa: B006
    dram_kind: DramKind = DRAM_KIND,
    context: Context = 4096,
    past: Past = 512,
    file: HardwareFile = None,
    out: Annotated[Path | None, typer.Option(help="A .png or .svg of the heat map.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict tokens a second on every combination of some cards, memories, SSDs and precisions."""
    begin("sweep", as_json, quiet)
    if out is not None:
        pictures.check(out, charts.OPTION)
    known, rows = known_hardware(file), []
    for precision in precisions:
        workloads: dict[Any, Workload] = {}  # by what computes
        for gpu, dram, ssd in itertools.product(gpus, drams, ssds):
            machine = machine_of(known, gpu, dram, dram_kind, ssd, None)
            if (kind := computing(machine)) not in workloads:
                workloads[kind] = workload_of_name(model, machine, precision, context, past)
            rows.append(_swept(workloads[kind], machine, past) | {"gpu": gpu, "dram": dram, "ssd": ssd})
    if not quiet and not as_json:
        console().print(_sweep_table(model, rows))
    chart = {"kind": "sweep", "maps": _heat_maps(model, rows)}
    if out is not None:
        charts.draw(chart, out)
        say(f"drawn in {out}", quiet)
    elif not quiet and not as_json and len(rows) > 1:
        for part in text_charts.of(chart):
            console().print(part)
    tell("", {"schema": "tiercache.sweep/1", "model": model, "rows": rows}, as_json, quiet=True)


def _swept(workload: Workload, machine: Hardware, past: int) -> dict[str, Any]:
    """A row of a sweep; without a speed where the model does not fit."""
    from tiercache.engine.prediction import predicted

    try:
        found = predicted(workload, machine, past, None)
    except DoesNotFitError as error:
        nothing: dict[str, Any] = dict.fromkeys(("tokens_per_s", "low", "high", "binding_tier"))
        return {"precision": workload.precision, **nothing, "missing_bytes": error.missing_bytes}
    kept = ("precision", "tokens_per_s", "low", "high", "binding_tier")
    return {name: found[name] for name in kept} | {"missing_bytes": 0}


def _heat_maps(model: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A map for each precision: main memory across, and down it the cards, the SSDs, or each pair of them."""
    several = {axis for axis in ("gpu", "ssd") if len({row[axis] for row in rows}) > 1}

    def machine(row: dict[str, Any]) -> str:
        return ", ".join(row[axis] for axis in ("gpu", "ssd") if axis in several or (axis == "gpu" and not several))

    found = []
    for precision in dict.fromkeys(row["precision"] for row in rows):
        speeds = {(machine(row), row["dram"]): row["tokens_per_s"] for row in rows if row["precision"] == precision}
        names, sizes = list(dict.fromkeys(name for name, _ in speeds)), list(dict.fromkeys(size for _, size in speeds))
        fixed = {axis: rows[0][axis] for axis in ("gpu", "ssd") if axis not in several}
        beside = "".join(f", {axis} {name}" for axis, name in fixed.items())
        title = f"{model} at {precision}{beside}: tokens a second"
        found.append(
            {"title": title, "rows": names, "columns": sizes, "cells": [[speeds[n, s] for s in sizes] for n in names]}
        )
    return found


def _sweep_table(model: str, rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"{model}, by data sheets (+-{ERROR['spec']:.0%})", title_justify="left")
    for heading in ("precision", "gpu", "dram", "ssd", "tokens/s", "between", "bound by"):
        shown.add_column(heading)
    for row in rows:
        where = (row["precision"], row["gpu"], row["dram"], row["ssd"])
        if row["tokens_per_s"] is None:
            shown.add_row(*where, "-", f"{human(row['missing_bytes'])} are missing", "memory")
        else:
            between = f"{row['low']:.2f} to {row['high']:.2f}"
            shown.add_row(*where, f"{row['tokens_per_s']:.2f}", between, row["binding_tier"])
    return shown
