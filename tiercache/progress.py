"""How long work tells of itself: bytes done, rate and time left, to a terminal or to a caller's function.

Knows nothing of the work.
"""

import sys
import time
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

from tiercache import notebook

Advance = Callable[[int], None]
_LINE_EVERY_S = 10.0


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
        show: draw it; None means where standard error is a terminal or a notebook, and elsewhere, in a log, a line now
            and then.
    """
    if show is not False and notebook.here():
        with notebook.bar(title, total_bytes, done_bytes) as advance:
            yield advance
        return
    visible = sys.stderr.isatty() if show is None else show
    if show is None and not visible:
        yield _lines(title, total_bytes, done_bytes)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
    with Progress(
        *columns, TransferSpeedColumn(), TimeRemainingColumn(), console=Console(stderr=True), disable=not visible
    ) as progress:
        task = progress.add_task(title, total=total_bytes, completed=done_bytes)
        yield lambda nbytes: progress.advance(task, nbytes)


def _lines(title: str, total_bytes: int, done_bytes: int) -> Advance:
    """Writes a line for a log every ten seconds, while there is something to tell."""
    begin = told = time.monotonic()
    done = done_bytes

    def advance(nbytes: int) -> None:
        nonlocal done, told
        done += nbytes
        now = time.monotonic()
        if now - told < _LINE_EVERY_S or not done > done_bytes:
            return
        told = now
        left_s = (total_bytes - done) * (now - begin) / (done - done_bytes)
        print(f"{title}: {done / max(1, total_bytes):.0%}, {left_s:.0f} s left", file=sys.stderr, flush=True)

    return advance
