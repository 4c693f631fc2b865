"""`doctor`: what will not work on this machine."""

from pathlib import Path
from typing import Annotated

import typer

from tiercache.commands.base import ENVIRONMENT, Json, Quiet, app, begin, console, tell


@app.command("doctor")
def doctor_command(
    store: Annotated[Path | None, typer.Option(help="Where stores are; by default the current folder.")] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Look at this machine; exit code 5 if something will not work."""
    begin("doctor", as_json, quiet, library=False)  # which may not be here
    from tiercache.doctor import report

    checks = report.diagnose(store)
    if not quiet:
        console().print(report.table(checks))
    tell("", report.to_dict(checks), as_json, quiet=True)
    if not report.works(checks):
        raise typer.Exit(ENVIRONMENT)
