"""Deprecated spellings of `bench`: `tiercache bench --kernels`, and options that moved to `benchmarks/`."""

import importlib
import shlex
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from tiercache.commands.base import say
from tiercache.errors import EnvironmentUnsupportedError, UsageError

CHECKOUT = Path(__file__).parents[2]  # holds benchmarks/, unless this is an installed wheel
_FLAGS = {"--kernels": "kernels", "--drafters": "drafters"}
_MOVED = ("--cap", "--widen", "--folder")  # of `bench drafters`


class OldSpelling(TyperGroup):
    """A group of commands that also takes the old spellings, and says how to write them now."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Translate arguments that name no command; hand those that moved to the benchmarks."""
        if args == ["--help"]:
            return super().parse_args(ctx, args)
        names_command = bool(args) and not args[0].startswith("-")
        command, *others = args if names_command else translated(args)
        moved = command == "drafters" and any(arg.partition("=")[0] in _MOVED for arg in others)
        if moved or not names_command:
            program = "python -m benchmarks.drafters" if moved else f"tiercache bench {command}"
            say(
                f"deprecated; write: {shlex.join([*program.split(), *others])}", quiet=bool({"--quiet", "-q"} & {*args})
            )
        if moved:
            run_benchmark("benchmarks.drafters", others)
            raise typer.Exit
        return super().parse_args(ctx, [command, *others])


def translated(args: list[str]) -> list[str]:
    """`["--kernels", "--seed", "1"]` as `["kernels", "--seed", "1"]`; without a flag it is a model that is timed.

    Raises:
        UsageError: both flags are there.
    """
    flags = {flag for flag in _FLAGS if flag in args}
    if len(flags) > 1:
        raise UsageError("--kernels and --drafters are two benchmarks; leave one of them out")
    command = _FLAGS[flags.pop()] if flags else "model"
    return [command, *(arg for arg in args if arg not in _FLAGS)]


def run_benchmark(module: str, args: list[str]) -> None:
    """Run a module of `benchmarks/`, which the installed package does not have.

    Raises:
        EnvironmentUnsupportedError: this is no checkout.
    """
    if not (CHECKOUT / "benchmarks").is_dir():
        raise EnvironmentUnsupportedError(
            f"{', '.join(_MOVED)} are options of `python -m {module}`, which is not installed with tiercache; run it "
            "in a checkout of tiercache's source"
        )
    if str(CHECKOUT) not in sys.path:
        sys.path.append(str(CHECKOUT))
    importlib.import_module(module).run(args)
