"""The deprecated spelling of `bench`, whose three benchmarks were flags: `tiercache bench --kernels`."""

import shlex
from typing import Any

from typer.core import TyperGroup

from tiercache.commands.base import say
from tiercache.errors import UsageError

_FLAGS = {"--kernels": "kernels", "--drafters": "drafters"}


class OldSpelling(TyperGroup):
    """A group of commands that also takes the old spelling, and says how to write it now."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Translate arguments that name no command."""
        if args == ["--help"] or (args and not args[0].startswith("-")):
            return super().parse_args(ctx, args)
        args = translated(args)
        say(f"deprecated; write: tiercache bench {shlex.join(args)}", quiet=bool({"--quiet", "-q"} & set(args)))
        return super().parse_args(ctx, args)


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
