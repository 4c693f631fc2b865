"""Pictures by matplotlib, which is an extra: files that it can write, and figures that need no window."""

from importlib import import_module
from pathlib import Path
from typing import Any

from tiercache.errors import EnvironmentUnsupportedError, UsageError

_SUFFIXES = (".png", ".svg")


def check(file: Path, option: str) -> None:
    """Refuse early what `save` could not write.

    Raises:
        UsageError: no picture's name, or no folder for it.
        EnvironmentUnsupportedError: there is no matplotlib.
    """
    if file.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"{option} {file} is neither .png nor .svg; name it so")
    if not file.expanduser().parent.is_dir():
        raise UsageError(f"{option} {file}: there is no folder {file.parent}; make it first")
    figure(option)


def figure(option: str, width: float = 8, height: float = 5) -> Any:
    """A figure of so many inches, which pyplot does not remember.

    Raises:
        EnvironmentUnsupportedError: there is no matplotlib.
    """
    try:
        agg, figures = import_module("matplotlib.backends.backend_agg"), import_module("matplotlib.figure")
    except ImportError as error:
        raise EnvironmentUnsupportedError(
            f"{option} needs matplotlib ({error}); install it: pip install 'matplotlib>=3.8'"
        ) from error
    made = figures.Figure(figsize=(width, height), layout="constrained", dpi=150)
    agg.FigureCanvasAgg(made)
    return made


def save(drawn: Any, file: Path, option: str) -> None:
    """Write a figure.

    Raises:
        UsageError: the file cannot be written.
    """
    try:
        drawn.savefig(file.expanduser())
    except OSError as error:
        raise UsageError(f"{option} {file} cannot be written: {error.strerror}; name another file") from error
