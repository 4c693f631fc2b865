"""What benchmarks that extend a command of `tiercache bench` share: that command's options, and errors' exit codes."""

import sys
from collections.abc import Callable
from typing import Any

import typer

from tiercache.commands.bench import bench
from tiercache.errors import TiercacheError

_ArgumentError: Any = typer.BadParameter.__base__  # typer's name for it has moved between versions


def parameters(command: str, args: list[str]) -> dict[str, Any]:
    """What `tiercache bench COMMAND` makes of its arguments."""
    group: Any = typer.main.get_command(bench)
    found: dict[str, Any] = group.commands[command].make_context(command, list(args)).params
    return found


def main(run: Callable[[list[str]], None]) -> None:
    """Run a benchmark with this process's arguments; an error is a line, and its exit code the process's."""
    try:
        run(sys.argv[1:])
    except (TiercacheError, _ArgumentError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
