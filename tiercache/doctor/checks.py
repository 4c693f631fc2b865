"""One finding of the doctor, and how its probes look at what may be absent or broken."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "warn", "fail"]
Probe = Callable[[Path], Iterable["Check"]]


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: "fail" where something will not work, "warn" where it will be slow or risky.
        value: what was found.
        advice: what to do; empty when there is nothing to.
    """

    name: str
    state: State
    value: str
    advice: str = ""


def module(name: str) -> Any | None:
    """A module that may be missing or broken, which is then a finding and no reason to stop."""
    try:
        return import_module(name)
    except Exception:
        return None


def text_of(path: Path) -> str:
    """A file's text; nothing where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def dotted(numbers: Sequence[int]) -> str:
    """A version as it is written."""
    return ".".join(str(number) for number in numbers)
