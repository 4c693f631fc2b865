"""What all commands share: how they tell people and programs, how errors become exit codes, options of several.

Standard output carries data only: generated text, or one line of JSON. What went wrong ends in the exit code of
`tiercache.errors`.
"""

import json
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from tiercache import __version__
from tiercache.commands import loading
from tiercache.errors import DoesNotFitError, TiercacheError, UsageError
from tiercache.progress import COMMAND_PROGRESS, DISPLAY, note, step

# The commands import the library when they run, since torch and transformers take seconds that `--help` and a mistyped
# option should not cost.

_UNEXPECTED, ENVIRONMENT, INTERRUPTED = 1, 5, 130
# Arguments of `offload` that the commands have as options, as the library's messages name them.
_ARGUMENT = re.compile(
    r"(?<![\w.])(hbm|dram|context|precision|store|device|plan|mode|bytes_per_token|max_loss|policy|max_fetches|cpu_tokens|"
    r"compute_dtype|link_gbps|drafter|draft_nodes|draft_depth)=('[^']*'|\"[^\"]*\"|\w[\w.%-]*\w|\w|)"
)
_FILE_WIDTH = 140  # columns of tables in a file
# typer's own complaints about arguments; its name for the class has moved between versions.
_ArgumentError = cast("type[Exception]", typer.BadParameter.__base__)

memory_option = partial(typer.Option, rich_help_panel="Memory")  # the heading that `--help` shows it under

Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON to standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no summary; errors only.")]
Hbm = Annotated[str, memory_option(help="Budget of the fastest tier: 22GiB, 90%, auto.")]
Dram = Annotated[str, memory_option(help="Budget of main memory: 48GiB, 50%, auto.")]
LinkGbps = Annotated[float | None, memory_option(help="Throttle copies to HBM to this rate: emulated.")]
StoreFolder = Annotated[Path | None, typer.Option(help="Where the checkpoint's plane store is, or is made.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Store = Annotated[Path, typer.Argument(help="Folder of a plane store.", show_default=False)]


class Commands(TyperGroup):
    """Turns what a command raises into a line on standard error, JSON where it was asked for, and an exit code.

    Contexts are typed Any: typer brings click's classes under names that change with its version.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Note early whether JSON is wanted: a complaint about other arguments must know."""
        ctx.obj = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            with _log(ctx.params["log"]):
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except _ArgumentError as error:
            _print_error(error, str(error), 2, ctx.obj)
            raise  # typer shows it beside the command's usage
        except KeyboardInterrupt as error:
            raise _failed(error, "interrupted", INTERRUPTED, ctx.obj, False) from error
        except TiercacheError as error:
            message = _by_option(str(error))
            raise _failed(error, message, error.exit_code, ctx.obj, ctx.params["debug"]) from error
        except Exception as error:
            message = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            message += "" if ctx.params["debug"] else "; for the traceback: tiercache --debug COMMAND ..."
            raise _failed(error, message, _UNEXPECTED, ctx.obj, ctx.params["debug"]) from error
        finally:
            COMMAND_PROGRESS.stop()


app = typer.Typer(
    cls=Commands,
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 unexpected, 2 usage, 3 does not fit, 4 corrupt or another's store, 5 environment, "
    "130 interrupted. Environment: TIERCACHE_HOME (the cache folder, else ~/.cache/tiercache); HF_HOME, "
    "HF_HUB_OFFLINE, CUDA_VISIBLE_DEVICES, NO_COLOR as everywhere; all of it in docs/environment.md.",
)


def _by_option(message: str) -> str:
    """What the library says of its arguments, in the words of the command line: `--context 64` for `context=64`."""

    def option(found: re.Match[str]) -> str:
        name, value = found[1].replace("_", "-"), found[2].strip("'")
        return f"--{name} {value}" if value else f"--{name}"

    return _ARGUMENT.sub(option, message)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"tiercache {__version__}")
        raise typer.Exit


@app.callback()
def options_of_all(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    log: Annotated[Path | None, typer.Option(help="Also tell of progress at the end of this file.")] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Run language models much larger than the GPU they run on: exact, and within a memory budget."""


def begin(title: str, as_json: bool, quiet: bool, *, library: bool = True) -> None:
    """A command begins: something tells from now on that it goes on, until it has a result or has failed.

    `library`: it needs torch and transformers, which take seconds to load.
    """
    show = progress(as_json, quiet)
    COMMAND_PROGRESS.start(title, show=show)
    if library and not loading.loaded():
        with step("loading torch and transformers", show=show):
            loading.load()


def console() -> Console:
    """Where people read; in a file or a pipe, where nobody knows how wide it is, tables are cut off less."""
    COMMAND_PROGRESS.stop()  # a table would be written into its row
    return Console(stderr=True, highlight=False, width=None if sys.stderr.isatty() else _FILE_WIDTH)


def progress(as_json: bool, quiet: bool) -> bool | None:
    """Whether to draw bars; None leaves it to whether anybody watches."""
    return False if as_json or quiet else None


def say(text: str, quiet: bool) -> None:
    """A line for people."""
    note(text, show=not quiet)


def tell(text: str, plain: dict[str, Any], as_json: bool, quiet: bool) -> None:
    """A result: for people, and for programs where it is wanted."""
    COMMAND_PROGRESS.stop()
    if text:
        say(text, quiet)
    if as_json:
        print(json.dumps(plain), flush=True)


@contextmanager
def _log(file: Path | None) -> Iterator[None]:
    """Tells of progress within in a file as well, and of what ended it."""
    if file is None:
        yield
        return
    try:
        opened = Path(file).expanduser().open("a", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{file} cannot be written ({error.strerror}); name another file with --log") from error
    with opened, DISPLAY.logging(opened):
        try:
            yield
        except (Exception, KeyboardInterrupt) as error:
            note(f"ended by {type(error).__name__}: {error}", show=False)
            raise


def _failed(error: BaseException, message: str, exit_code: int, as_json: bool, debug: bool) -> typer.Exit:
    """Tell of an error; the way out of the program with its code."""
    if debug:
        traceback.print_exception(error)
    console().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    _print_error(error, message, exit_code, as_json)
    return typer.Exit(exit_code)


def _print_error(error: BaseException, message: str, exit_code: int, as_json: bool) -> None:
    plain = {"schema": "tiercache.error/1", "error": type(error).__name__, "message": message, "exit_code": exit_code}
    plain |= {"missing_bytes": error.missing_bytes} if isinstance(error, DoesNotFitError) else {}
    tell("", plain, as_json, quiet=True)
