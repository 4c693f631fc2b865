"""`tiercache-profile probe` and `validate`: what this machine does, and how far predictions are off on it."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from profiler.hardware import Hardware
from tiercache.commands.base import Json, Quiet, begin, console, progress, tell
from tiercache.commands.predicting import profile
from tiercache.config.sizes import human
from tiercache.errors import UsageError

_Folder = Annotated[Path, typer.Option(help="On the disk that stores lie on.")]
_Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1; auto is the first card if there is one.")]
_Noisy = Annotated[bool, typer.Option("--noisy", help="Keep figures of a machine that other programs use.")]


@profile.command("probe")
def probe_command(
    folder: _Folder = Path(),
    device: _Device = "auto",
    noisy: _Noisy = False,
    quick: Annotated[bool, typer.Option("--quick", help="Less than a minute: fewer sizes and repeats.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure this machine, for predict --gpu this. Takes one to three minutes; leaves one file in the cache."""
    begin("probe", as_json, quiet)
    from tiercache.bench.machine_probe import probe_machine
    from tiercache.engine import probe_cache
    from tiercache.engine.machine import resolve_device

    at = resolve_device(device)
    show = progress(as_json, quiet)
    machine = probe_machine(folder.expanduser(), at, noisy=noisy, quick=quick, show_progress=show)
    path = probe_cache.keep(machine, at)
    if not quiet and not as_json:
        console().print(_figures(machine))
    found = {"schema": "tiercache.probe/1", "cache": str(path), **probe_cache.to_dict(machine)}
    tell(f"kept in {path}", found, as_json, quiet)


@profile.command("validate")
def validate_command(
    models: Annotated[list[str], typer.Argument(help="Folders of stores or checkpoints, or named shapes.")],
    precisions: Annotated[str, typer.Option(help="A list with commas.")] = "source,int8,int4",
    token_counts: Annotated[str, typer.Option(help="Tokens of a pass; a list with commas.")] = "1,16,64,512",
    folder: Annotated[Path, typer.Option(help="Where random models are made.")] = Path("tiercache-bench"),
    device: _Device = "auto",
    drafted: Annotated[bool, typer.Option(help="Also rounds that verify a tree.")] = True,
    refit: Annotated[bool, typer.Option("--refit", help="Then fit a few terms to all passes that were kept.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict passes by what the probe measured, run them, compare, and keep the pairs."""
    begin("validate", as_json, quiet)
    from tiercache.bench.validation import validate
    from tiercache.engine import probe_cache
    from tiercache.engine.machine import resolve_device

    counts, at = _numbers(token_counts), resolve_device(device)
    machine = probe_cache.this_machine(at)
    show = progress(as_json, quiet)
    options: dict[str, Any] = {"folder": folder.expanduser(), "device": at, "drafted": drafted, "show_progress": show}
    result, pairs = validate(models, precisions.split(","), counts, machine, **options)
    probe_cache.add_pairs(pairs, at)
    if refit:
        result["fitted"] = {name: asdict(figure) for name, figure in probe_cache.refit(at).fitted.items()}
    if not quiet and not as_json:
        console().print(_table(result))
    told = f"off by {result['median_error']:.0%} in the median, {result['worst_error']:.0%} at worst"
    if refit:
        parts = [f"{name} x {each['value']:.2f}" for name, each in result["fitted"].items()]
        told += f"; fitted: {', '.join(parts) or 'nothing, for the passes kept are few'}"
    tell(told, result, as_json, quiet)


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"{text!r} is no list of token counts; give one such as 1,16") from error
    if min(found) < 1:
        raise UsageError(f"a pass of {min(found)} tokens cannot be run; give counts from 1 up")
    return found


def _figures(machine: Hardware) -> Table:
    shown = Table(title=f"This machine, {human(machine.dram.capacity_bytes)} of memory free", title_justify="left")
    for heading in ("figure", "value", "spread", "source"):
        shown.add_column(heading)
    for name, figure in machine.figures.items():
        shown.add_row(name, f"{figure.value:.4g}", f"{figure.spread:.0%}", figure.source)
    return shown


def _table(result: dict[str, Any]) -> Table:
    shown = Table(title="Predicted against measured", title_justify="left")
    for heading in ("pass", "predicted ms", "measured ms", "pace", "spread", "off by", "bound by"):
        shown.add_column(heading)
    for case in result["cases"]:
        times = [f"{1e3 * case[name]:.1f}" for name in ("predicted_s", "measured_s")]
        shown.add_row(
            case["name"],
            *times,
            f"{case['pace']:.2f}",
            f"{case['spread']:.0%}",
            f"{case['error']:+.0%}",
            case["binding"],
        )
    return shown
