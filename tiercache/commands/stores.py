"""`convert`, `verify`, `inspect`: plane stores."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from tiercache.commands import summary
from tiercache.commands.base import Json, Quiet, Store, app, begin, progress, say, tell
from tiercache.config.options import CALIBRATION_TOKENS
from tiercache.config.sizes import human


@app.command("convert")
def convert_command(
    checkpoint: Annotated[str, typer.Argument(help="A checkpoint: folder, GGUF file or Hub id.", show_default=False)],
    store: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    group: Annotated[int, typer.Option(help="Weights that share a scale: 32, 64 or 128.")] = 64,
    compress: Annotated[str, typer.Option(help="zstd: on, off, or auto where it saves more than it costs.")] = "auto",
    calibrate: Annotated[
        Path | None, typer.Option(help="Text that codes are calibrated on; the package's own by default.")
    ] = None,
    tokens: Annotated[
        int, typer.Option(help="Tokens of it, at most, in whole windows of 512. Fewer save little time.")
    ] = CALIBRATION_TOKENS,
    plain: Annotated[bool, typer.Option("--plain", help="Round each weight by itself: fast, less exact.")] = False,
    tune: Annotated[
        int, typer.Option(metavar="STEPS", help="Also learn the rounding of each layer in so many steps; slow.")
    ] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what it would take; write nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Discard what an interrupted run left.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make the plane store of a checkpoint; goes on where an interrupted conversion stopped."""
    begin("convert", as_json, quiet)
    from tiercache.store.convert import convert

    partial = store.expanduser().with_name(store.name + ".partial")
    try:
        options: dict[str, Any] = {"group": group, "compress": compress, "dry_run": dry_run, "restart": restart}
        options |= {"calibrate": calibrate, "tokens": tokens, "plain": plain, "tune": tune}
        report = convert(checkpoint, store, **options, show_progress=progress(as_json, quiet))
    except KeyboardInterrupt:
        if partial.exists():
            say(f"what is converted is kept in {partial}; the same command goes on from there", quiet)
        raise
    tell((summary.of_dry_run if dry_run else summary.of_conversion)(report.to_dict()), report.to_dict(), as_json, quiet)


@app.command("verify")
def verify_command(store: Store, as_json: Json = False, quiet: Quiet = False) -> None:
    """Check every byte of a plane store, and of its calibration, against their checksums."""
    begin("verify", as_json, quiet)
    from tiercache.store import calibration
    from tiercache.store.planestore import PlaneStore

    opened = PlaneStore.open(store)
    checked = opened.verify(show_progress=progress(as_json, quiet))
    if (opened.folder / calibration.FILE).exists():
        calibration.Calibration.load(opened)
    text = f"{checked.folder}: {checked.extents} extents, {human(checked.checked_bytes)}, all as written"
    tell(text, {"schema": "tiercache.verify/1", **asdict(checked)}, as_json, quiet)


@app.command("inspect")
def inspect_command(store: Store, as_json: Json = False, quiet: Quiet = False) -> None:
    """Say what is in a plane store."""
    begin("inspect", as_json, quiet)
    from tiercache.store.planestore import PlaneStore

    found = PlaneStore.open(store).describe()
    tell(summary.of_store(found), found, as_json, quiet)
