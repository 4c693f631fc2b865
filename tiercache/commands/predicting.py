"""`tiercache-profile`: what a model would do on a machine, before anybody waits or buys.

The numbers are `profiler.cost_model`'s; this file reads options and tells people.
"""

from typing import Any

import typer
from rich.table import Table

from profiler.energy import G_PER_KWH, LIFETIME_YEARS
from profiler.figure import ERROR
from profiler.hardware import Catalogue
from tiercache.commands.base import Commands, Json, Quiet, begin, console, options_of_all, tell
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
    Model,
    Past,
    Precision,
    Question,
    Ssd,
    TokensPerPass,
    known_hardware,
)
from tiercache.config.sizes import human

profile = typer.Typer(cls=Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
profile.callback(help="Predict what a model would do on a machine that need not be here.")(options_of_all)


@profile.command("hardware")
def hardware_command(file: HardwareFile = None, as_json: Json = False, quiet: Quiet = False) -> None:
    """Print the table of known hardware."""
    known = known_hardware(file)
    if not quiet and not as_json:
        console().print(_hardware_table(known))
    tell("", {"schema": "tiercache.hardware/1", **known.entries}, as_json, quiet=True)


@profile.command("predict")
def predict_command(
    ctx: typer.Context,
    model: Model,
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
    """Predict tokens a second of a model on a machine, from data sheets or from what probe measured here."""
    begin("predict", as_json, quiet)
    result = Question.of(ctx.params).answer()
    tell(report(result), result, as_json, quiet)


def report(result: dict[str, Any]) -> str:
    """What a person reads."""
    busy = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in result["busy_s"].items() if seconds)
    where = {
        "stay": "all weights stay in the fastest tier",
        "ssd": "what main memory does not hold is read from the SSD",
        "stream": "what the card does not hold is copied up",
        "cpu": "with --cpu-tokens 1 the CPU multiplies by what the card does not hold",
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
            *_energy(result["energy"]),
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


def _energy(energy: dict[str, Any]) -> list[str]:
    parts = ", ".join(f"{name} {joules:.0f}" for name, joules in energy["joules"].items() if joules)
    grams, used = energy["g_co2e_per_token"], energy["assumptions"]
    making = used["embodied_kg"]
    return [
        f"energy, {energy['how']}: {energy['joules_per_token']:.0f} J a token ({parts})",
        f"CO2e: {grams['operational']:.4f} g a token of electricity at {used['g_per_kwh']['value']:g} g/kWh, and "
        f"{grams['embodied']:.4f} g of making the card ({making['value']:g} kg over "
        f"{used['lifetime_years']['value']:g} years; {making['source']})",
    ]


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
