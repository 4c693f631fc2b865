"""`cache list`, `cache remove`: what tiercache keeps in its cache folder."""

import sys
from dataclasses import asdict
from datetime import datetime
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from tiercache.commands.base import Json, Quiet, app, begin, console, say, tell
from tiercache.config.environment import home_folder
from tiercache.config.sizes import human
from tiercache.errors import UsageError
from tiercache.progress import COMMAND_PROGRESS

cache = typer.Typer(no_args_is_help=True)
app.add_typer(cache, name="cache", help="What is kept in the cache folder: stores, kernels, measurements.")


@cache.command("list")
def list_command(as_json: Json = False, quiet: Quiet = False) -> None:
    """Name what lies in the cache folder, with kind, size on disk and last use as the file system keeps it."""
    begin("looking into the cache folder", as_json, quiet, library=False)
    from tiercache.store.cache import entries

    found = entries()
    if not quiet:
        table = Table("name", "kind", Column("on disk", justify="right"), "last used", title=str(home_folder()))
        for entry in found:
            used = datetime.fromtimestamp(entry.used_s).strftime("%Y-%m-%d %H:%M")
            table.add_row(entry.name, entry.kind, human(entry.nbytes), used)
        console().print(table)
    total = sum(entry.nbytes for entry in found)
    text = f"{len(found)} entries, {human(total)}; remove one: tiercache cache remove NAME"
    tell(text, _plain("tiercache.cache/1", found), as_json, quiet)


@cache.command("remove")
def remove_command(
    names: Annotated[list[str] | None, typer.Argument(help="As 'cache list' names them.", show_default=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="All that tiercache made.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove entries of the cache folder, but for what is in use, and what tiercache did not make.

    Exit code 2 where something that was named stays.
    """
    begin("removing", as_json, quiet, library=False)
    from tiercache.store import cache

    if bool(names) == everything:
        raise UsageError("give the names of what is to go, as 'tiercache cache list' has them, or --all")
    wanted = cache.found(names) if names else cache.removable()
    if not wanted or not (yes or _agreed(", ".join(f"{each.name} ({human(each.nbytes)})" for each in wanted))):
        tell("nothing was removed", _removed([], []), as_json, quiet)
        return
    removed: list[Any] = []
    kept: list[tuple[Any, str]] = []
    for entry in wanted:
        try:
            cache.remove(entry)
        except UsageError as error:
            kept.append((entry, str(error)))
            say(f"not removed: {error}", quiet and everything)
        else:
            removed.append(entry)
            say(f"removed {entry.name}, {human(entry.nbytes)}", quiet)
    tell("", _removed(removed, kept), as_json, quiet=True)
    if names and kept:
        raise typer.Exit(UsageError.exit_code)


def _agreed(what: str) -> bool:
    """Ask whoever sits at the terminal."""
    if not _at_a_terminal():
        raise UsageError(f"nobody can be asked here whether to remove {what}; add --yes")
    COMMAND_PROGRESS.stop()  # its row would tear the question
    return typer.confirm(f"remove {what}?", err=True)


def _at_a_terminal() -> bool:
    return sys.stdin.isatty()


def _removed(removed: list[Any], kept: list[tuple[Any, str]]) -> dict[str, Any]:
    """What went, and what stays with the reason."""
    stays = [{**asdict(entry), "why": why} for entry, why in kept]
    return {**_plain("tiercache.cache-removed/1", removed), "kept": stays}


def _plain(schema: str, found: list[Any]) -> dict[str, Any]:
    return {"schema": schema, "folder": str(home_folder()), "entries": [asdict(entry) for entry in found]}
