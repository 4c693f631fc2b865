"""`tiercache-profile`: what a model would do on a machine, before anybody waits or buys.

The numbers are `profiler.cost_model`'s; this file reads options and tells people.
"""

import itertools
import re
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from profiler.cost_model import Drafting
from profiler.figure import ERROR
from profiler.hardware import Catalogue, Hardware, HardwareError, catalogue
from profiler.workload import Workload
from tiercache.commands.base import Commands, Json, Quiet, console, options_of_all, tell
from tiercache.config.sizes import Budget, human
from tiercache.errors import DoesNotFitError, UsageError

profile = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
profile.callback(help="Predict what a model would do on a machine that need not be here.")(options_of_all)

_NO_GPU, _MEASURED = "none", "this"
_DRAM, _DRAM_KIND, _SSD = "64GiB", "ddr4-3200", "pcie-3"
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*GB/s", re.IGNORECASE)

_Gpu = Annotated[
    str, typer.Option(help="A card of the table, such as 3090; none for the CPU alone; this for what probe measured.")
]
_DramKind = Annotated[str, typer.Option("--dram-kind", help="Kind of main memory, two channels.")]
_Ssd = Annotated[str, typer.Option(help="Kind of SSD, or its rate: 3.5GB/s.")]
_Lanes = Annotated[int | None, typer.Option(min=1, max=16, help="PCIe lanes of the card's slot.")]
_File = Annotated[Path | None, typer.Option("--hardware", help="A TOML file of hardware of your own.")]


@profile.command("hardware")
def hardware_command(file: _File = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Print the table of known hardware."""
    known = _known(file)
    if not quiet and not as_json:
        console().print(_hardware_table(known))
    tell("", {"schema": "tiercache.hardware/1", **known.entries}, as_json, quiet=True)


@profile.command("predict")
def predict_command(
    model: Annotated[str, typer.Argument(help="A named shape, a config.json, or a folder with one.")],
    gpu: _Gpu = "3090",
    dram: Annotated[str | None, typer.Option(help="Main memory; 64GiB, or what this machine has free.")] = None,
    dram_kind: _DramKind = _DRAM_KIND,
    ssd: _Ssd = _SSD,
    lanes: _Lanes = None,
    precision: Annotated[str, typer.Option(help="source, int8, int4 or int3.")] = "int4",
    context: Annotated[int, typer.Option(min=1, help="Tokens of KV cache.")] = 4096,
    past: Annotated[int, typer.Option(min=0, help="Tokens before the one that is decoded.")] = 512,
    draft_nodes: Annotated[int, typer.Option(min=0, help="Nodes of a tree of drafts; 0 for none.")] = 0,
    tokens_per_pass: Annotated[float, typer.Option(min=1, help="Tokens that a drafted pass emits.")] = 1.0,
    draft_s: Annotated[float, typer.Option(min=0, help="Seconds that making a tree takes.")] = 0.0,
    drafter: Annotated[str | None, typer.Option(help="A small model that drafts, named as MODEL is.")] = None,
    draft_depth: Annotated[int, typer.Option(min=1, help="Passes of it for a tree.")] = 8,
    file: _File = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict tokens a second of a model on a machine, from data sheets or from what probe measured here."""
    from tiercache.engine.prediction import PredictedDrafting, predicted

    machine = _machine(_known(file), gpu, dram, dram_kind, ssd, lanes)
    small = None if drafter is None else _workload(drafter, machine, "source", context, past)
    if (small is not None or draft_s or tokens_per_pass > 1) and not draft_nodes:
        raise UsageError("what drafting brings depends on the tree; give --draft-nodes, such as 64")
    if small is not None and draft_s:
        raise UsageError("--draft-s and --drafter are two ways to say what drafting takes; leave one of them out")
    drafting = Drafting(draft_nodes, tokens_per_pass, draft_s) if draft_nodes else None
    drafts = None if drafting is None else PredictedDrafting(drafting, small, draft_depth)
    result = predicted(_workload(model, machine, precision, context, past), machine, past, drafts)
    size = human(machine.dram.capacity_bytes)
    result = {
        "schema": "tiercache.prediction/1",
        "model": model,
        "gpu": gpu,
        "dram": dram or size,
        "ssd": f"{machine.ssd_gbps.value:.1f}GB/s" if gpu == _MEASURED else ssd,
        **result,
    }
    tell(report(result), result, as_json, quiet)


@profile.command("sweep")
def sweep_command(
    model: Annotated[str, typer.Argument(help="A named shape, a config.json, or a folder with one.")],
    gpus: Annotated[list[str], typer.Option("--gpu", help="Cards; several.")] = ["3090"],  # noqa: B006 - typer copies it
    drams: Annotated[list[str], typer.Option("--dram", help="Sizes of main memory; several.")] = [_DRAM],  # noqa: B006
    ssds: Annotated[list[str], typer.Option("--ssd", help="Kinds or rates of SSDs; several.")] = [_SSD],  # noqa: B006
    precisions: Annotated[list[str], typer.Option("--precision", help="Precisions; several.")] = ["int4"],  # noqa: B006
    dram_kind: _DramKind = _DRAM_KIND,
    context: Annotated[int, typer.Option(min=1, help="Tokens of KV cache.")] = 4096,
    past: Annotated[int, typer.Option(min=0, help="Tokens before the one that is decoded.")] = 512,
    file: _File = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Predict tokens a second on every combination of some cards, memories, SSDs and precisions."""
    known, rows = _known(file), []
    for precision in precisions:
        workloads: dict[bool, Workload] = {}  # a card computes, or the CPU
        for gpu, dram, ssd in itertools.product(gpus, drams, ssds):
            machine = _machine(known, gpu, dram, dram_kind, ssd, None)
            on_card = machine.gpu is not None
            if on_card not in workloads:
                workloads[on_card] = _workload(model, machine, precision, context, past)
            rows.append(_swept(workloads[on_card], machine, past) | {"gpu": gpu, "dram": dram, "ssd": ssd})
    if not quiet and not as_json:
        console().print(_sweep_table(model, rows))
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


def report(result: dict[str, Any]) -> str:
    """What a person reads."""
    busy = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in result["busy_s"].items() if seconds)
    where = {
        "stay": "all weights stay in the fastest tier",
        "ssd": "what main memory does not hold is read from the SSD",
        "stream": "what the card does not hold is copied up",
        "cpu": "with cpu_tokens= the CPU multiplies by what the card does not hold",
    }
    other = result["runner_up_tokens_per_s"]
    beside = "" if other is None else f" (the other way {other:.2f})"
    better = sorted(result["twice_as_fast"].items(), key=lambda pair: -pair[1])
    return "\n".join(
        [
            f"{result['model']}, {result['precision']}, on {result['gpu']} with {result['dram']}: "
            f"{result['tokens_per_s']:.2f} tokens/s, between {result['low']:.2f} and {result['high']:.2f}; at most "
            f"{result['bound']:.2f}",
            f"a pass reads {human(result['pass_bytes'])}; {where[result['weights_beyond_hbm']]}{beside}",
            f"a pass takes {result['pass_s'] * 1e3:.0f} ms: {busy}, overhead {result['overhead_s'] * 1e3:.0f} ms; "
            f"bound by {result['binding_tier']}",
            *_drafting(result["drafting"]),
            "twice as fast would give: " + ", ".join(f"{name} {speed:.2f}" for name, speed in better),
            f"basis: {result['basis']}, +-{ERROR[result['basis']]:.0%}; check it there with: tiercache bench model",
        ]
    )


def _drafting(drafting: dict[str, Any] | None) -> list[str]:
    if drafting is None:
        return []
    tree, emitted = drafting["nodes"], drafting["tokens_per_pass"]
    return [
        f"a tree of {tree} takes {drafting['draft_s'] * 1e3:.0f} ms to draft; {emitted:g} tokens a pass are assumed"
    ]


def _known(file: Path | None) -> Catalogue:
    try:
        return catalogue() if file is None else catalogue().with_file(file)
    except HardwareError as error:
        raise UsageError(str(error)) from error


def _machine(known: Catalogue, gpu: str, dram: str | None, kind: str, ssd: str, lanes: int | None) -> Hardware:
    size = Budget.parse(dram or _DRAM).size_bytes
    if size is None:
        raise UsageError(f"--dram {dram} is no size of a machine's memory; give one such as 64GiB")
    if gpu == _MEASURED:
        from tiercache.engine.probe_cache import this_machine

        if (kind, ssd, lanes) != (_DRAM_KIND, _SSD, None):
            raise UsageError(f"--gpu {_MEASURED} is as it was measured; leave out --dram-kind, --ssd and --lanes")
        measured = this_machine()
        return measured if dram is None else replace(measured, dram=replace(measured.dram, capacity_bytes=size))
    rate = _RATE.fullmatch(ssd)
    try:
        reads = float(rate[1]) if rate else ssd
        return known.machine(None if gpu == _NO_GPU else gpu, dram_bytes=size, dram=kind, ssd=reads, lanes=lanes)
    except HardwareError as error:
        raise UsageError(str(error)) from error


def _workload(model: str, machine: Hardware, precision: str, context: int, past: int) -> Workload:
    from tiercache.bench.shapes import SHAPES
    from tiercache.config.options import OffloadConfig
    from tiercache.engine.workload import imagined_workload
    from tiercache.model import meta_model

    if past >= context:
        raise UsageError(f"--past {past} leaves no room in --context {context}; raise the second")
    options = OffloadConfig(hbm=None, dram=Budget(), precision=precision, context=context)  # type: ignore[arg-type]
    if model in SHAPES:
        config: Any = SHAPES[model].config()
    else:
        path = Path(model).expanduser()
        folder = path.parent if path.name == "config.json" else path
        if not folder.is_dir():
            raise UsageError(
                f"{model!r} is no folder, no file called config.json and none of {', '.join(SHAPES)}; name one of these"
            )
        config = meta_model.read_config(folder)
    return imagined_workload(config, options, gpu=machine.gpu is not None)


def _hardware_table(known: Catalogue) -> Table:
    shown = Table(title="Cards by their data sheets", title_justify="left")
    for heading in ("name", "memory", "GB/s", "computes in", "TFLOPS", "link GB/s", "W", "source"):
        shown.add_column(heading, no_wrap=True)
    for key, entry in known.entries["gpu"].items():
        card = known.gpu(key)
        numbers = [human(card.memory.capacity_bytes), f"{entry['memory_gbps']:g}", card.compute_type]
        rates = [f"{card.tflops.value:g}", f"{card.link_gbps.value:g}", f"{card.power_w:g}"]
        shown.add_row(key, *numbers, *rates, str(entry.get("source", "given")))
    return shown
