"""`calibrate`: what a text teaches about a store's neurons."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tiercache.commands.base import Device, Dram, Hbm, Json, Quiet, Store, app, begin, progress, say, tell
from tiercache.config.options import STORE_PRECISION


@app.command("calibrate")
def calibrate_command(
    store: Store,
    text: Annotated[Path, typer.Option(help="A UTF-8 text like what the model will be used for.")],
    tokens: Annotated[int, typer.Option(help="Tokens of it to learn from, at most.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens of a pass.")] = 512,
    measure_tokens: Annotated[int, typer.Option(help="Tokens to measure settings on, in pieces of 64.")] = 1024,
    precision: Annotated[str, typer.Option(help="Precision of what is no neuron: int8 or int4.")] = STORE_PRECISION,
    objective: Annotated[str, typer.Option(help="Of the search: loss, or entropy as M2Cache has it.")] = "loss",
    predictor_rank: Annotated[int | None, typer.Option(help="Train low-rank predictors, for the report.")] = None,
    hbm: Hbm = "auto",
    dram: Dram = "auto",
    context: Annotated[int | None, typer.Option(min=1, help="Tokens that the budgets are laid out for.")] = None,
    device: Device = "auto",
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an interrupted run left.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Learn from a text what a store's neurons are worth, for mixed mode; goes on where it was interrupted."""
    begin("calibrate", as_json, quiet)
    from tiercache.calibrate.command import calibrate
    from tiercache.calibrate.report import report

    learnt: dict[str, Any] = {"tokens": tokens, "window": window, "measure_tokens": measure_tokens, "context": context}
    chosen: dict[str, Any] = {"precision": precision, "objective": objective, "predictor_rank": predictor_rank}
    place: dict[str, Any] = {"hbm": hbm, "dram": dram, "device": device, "restart": restart, "once": True}
    try:
        result = calibrate(store, text, **learnt, **chosen, **place, show_progress=progress(as_json, quiet))
    except KeyboardInterrupt:
        say(f"what is measured is kept in {store}; the same command goes on from there", quiet)
        raise
    tell(report(result), result, as_json, quiet)
