"""`quality`: what each mode loses."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tiercache.commands.base import Device, Dram, Hbm, Json, Quiet, StoreFolder, app, begin, progress, tell
from tiercache.config.options import STORE_PRECISION


@app.command("quality")
def quality_command(
    model: Annotated[str, typer.Argument(help="A checkpoint, GGUF file, plane store or Hub id.", show_default=False)],
    text: Annotated[Path, typer.Argument(help="A UTF-8 text file to measure on.", show_default=False)],
    modes: Annotated[
        list[str],
        typer.Option("--mode", help="source, int8, int4, int3, mixed:0.5, mixed:1.2GB/int4, 'mixed:<=0.01'; several."),
    ] = ["int8", "int4", "int3"],  # noqa: B006 - typer copies it
    reference: Annotated[
        str,
        typer.Option(help="What the others are held against: int8, or source (of MODEL, a checkpoint; add --store)."),
    ] = STORE_PRECISION,
    tokens: Annotated[int, typer.Option(help="Tokens of the text to use, at most.")] = 8192,
    window: Annotated[int, typer.Option(help="Tokens of a window; windows do not overlap.")] = 512,
    batch: Annotated[int, typer.Option(help="Windows of a pass.")] = 1,
    decode: Annotated[int, typer.Option(help="Tokens to decode for the speed; 0 measures none.")] = 16,
    hbm: Hbm = "auto",
    dram: Dram = "auto",
    store: StoreFolder = None,
    device: Device = "auto",
    tasks: Annotated[Path | None, typer.Option(help="Folder of lm-evaluation-harness tasks to run as well.")] = None,
    limit: Annotated[int | None, typer.Option(help="With --tasks: items of each task.")] = None,
    length: Annotated[int, typer.Option(help="With --tasks: tokens of a request at most.")] = 2048,
    plot: Annotated[Path | None, typer.Option(help="Draw bytes against loss: a .png or .svg.")] = None,
    scratch: Annotated[Path | None, typer.Option(help="Where the reference's logits lie meanwhile.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure what each mode loses against exact weights, and what it costs a token."""
    begin("quality", as_json, quiet)
    from tiercache.quality.command import quality
    from tiercache.quality.report import report

    measured: dict[str, Any] = {"tokens": tokens, "window": window, "batch": batch, "decode": decode}
    place: dict[str, Any] = {"hbm": hbm, "dram": dram, "store": store, "device": device, "scratch": scratch}
    more: dict[str, Any] = {"tasks": tasks, "limit": limit, "length": length, "plot": plot}
    shown = progress(as_json, quiet)
    result = quality(model, text, modes=modes, reference=reference, **measured, **place, **more, show_progress=shown)
    tell(report(result), result, as_json, quiet)
