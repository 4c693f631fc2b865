"""How long work tells of itself: bytes done, rate and time left, to a terminal or to a caller's function.

Knows nothing of the work.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[[int], None]


def note(text: str, *, show: bool | None = None) -> None:
    """A line on standard error about something that takes a while; `show` as for `bar`."""
    if sys.stderr.isatty() if show is None else show:
        print(text, file=sys.stderr, flush=True)


@contextmanager
def bar(title: str, total_bytes: int, *, done_bytes: int = 0, show: bool | None = None) -> Iterator[Advance]:
    """A progress bar on standard error; calls of what it yields add bytes.

    Args:
        title: what is being done.
        total_bytes: the whole of it.
        done_bytes: what an earlier run has done already.
        show: draw it; None means where standard error is a terminal.
    """
    visible = sys.stderr.isatty() if show is None else show
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not visible
    ) as progress:
        task = progress.add_task(title, total=total_bytes, completed=done_bytes)
        yield lambda nbytes: progress.advance(task, nbytes)
