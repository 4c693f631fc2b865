"""What is under way, shown to whoever watches: rows on a terminal, a line every few seconds in a file or a pipe.

Tasks nest, as a bar within a command does: a terminal shows all of them, a file the innermost. A thread draws, so that
work which stays in one call for minutes is seen to go on; there is none while nothing is shown. Knows nothing of the
work.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

FIRST_S, EVERY_S = 1.0, 5.0  # until the first line of a file, and from each to the next
_ROWS_PER_S = 4.0
_STAMP = "%Y-%m-%d %H:%M:%S"


class Task:
    """Something that takes a while.

    Args:
        title: what is being done.
        total: the whole of it, in bytes; None where nobody knows.
        done: what was done before.
        shown: people are told of it, not only the log.
    """

    def __init__(self, title: str, total: int | None = None, done: int = 0, *, shown: bool = True) -> None:
        self.title, self.total, self.done, self.shown = title, total, done, shown
        self._before, self._begun, self._told = done, time.monotonic(), ""

    def advance(self, amount: int) -> None:
        """So much more is done."""
        self.done += amount

    def tell(self, text: str) -> None:
        """How far it is, in words."""
        self._told = text

    def text(self) -> str:
        """One line."""
        seconds = time.monotonic() - self._begun
        if self._told:
            return f"{self.title}: {self._told}"
        if self.total is None or self.done <= self._before:
            return f"{self.title}: {span(seconds)} so far"
        left = (self.total - self.done) * seconds / (self.done - self._before)
        return f"{self.title}: {self.done / max(1, self.total):.0%}, {span(left)} left"


def span(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


class Display:
    """The tasks of this process, and where they are shown."""

    def __init__(self) -> None:
        self._tasks: list[Task] = []
        self._views: list[_Rows | _Lines] = []
        self._log: TextIO | None = None

    def begin(self, task: Task) -> None:
        """Show a task, within those that are shown."""
        if not task.shown and self._log is None:
            return
        self._tasks.append(task)
        self._open()

    def end(self, task: Task) -> None:
        """Show it no more; harmless when done twice."""
        if task not in self._tasks:
            return
        self._tasks.remove(task)
        for view in self._views:
            view.ended(task)
        self._close()

    def note(self, text: str, *, shown: bool) -> None:
        """A line that stays."""
        if shown:
            print(text, file=sys.stderr, flush=True)
        self._write_log(text)

    @contextmanager
    def logging(self, log: TextIO) -> Iterator[None]:
        """Everything that is under way within is also told there, what nobody is shown included."""
        self._log = log
        try:
            yield
        finally:
            self._log = None

    def _open(self) -> None:
        """The views that tasks ask for."""
        kinds = {type(view) for view in self._views if view.for_people}
        if not kinds and any(task.shown for task in self._tasks):
            rows = _is_terminal()
            self._views.append(_Rows(self._shown) if rows else _Lines(self._shown, _to_stderr, for_people=True))
        if self._log is not None and all(view.for_people for view in self._views):
            self._views.append(_Lines(lambda: list(self._tasks), self._write_log, for_people=False))

    def _close(self) -> None:
        """Views that nothing is left for."""
        for view in list(self._views):
            if not (self._shown() if view.for_people else self._tasks):
                self._views.remove(view)
                view.close()

    def _shown(self) -> list[Task]:
        return [task for task in self._tasks if task.shown]

    def _write_log(self, text: str) -> None:
        if self._log is not None:
            print(time.strftime(_STAMP), text, file=self._log, flush=True)


def _is_terminal() -> bool:
    """Whether rows can be drawn, and drawn again, on standard error."""
    console = Console(stderr=True)
    return sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Rows:
    """A row for each task at the end of a terminal; full bars stay when they end.

    Lines that are written to standard error meanwhile go above the rows.
    """

    for_people = True

    def __init__(self, tasks: Callable[[], list[Task]]) -> None:
        self._tasks, console = tasks, Console(stderr=True, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True))
        self._bars = Progress(*columns, TransferSpeedColumn(), TimeRemainingColumn(), console=console)
        self._ids: dict[Task, TaskID] = {}
        self._drawing = threading.Lock()
        self._live = Live(
            get_renderable=self._draw,
            console=console,
            refresh_per_second=_ROWS_PER_S,
            transient=True,
            redirect_stdout=False,  # data is none of the display's
        )
        self._live.start()

    def ended(self, task: Task) -> None:
        """A task ended."""
        with self._drawing:
            place = self._ids.pop(task, None)
            if place is None:  # no bar, or gone before it was drawn
                return
            self._bars.update(place, completed=task.done)
            row = next(each for each in self._bars.tasks if each.id == place)
            self._bars.remove_task(place)
        self._live.console.print(self._bars.make_tasks_table([row]))

    def close(self) -> None:
        """Take the rows away."""
        self._live.stop()

    def _draw(self) -> Group:
        with self._drawing:
            steps = []
            for task in self._tasks():
                if task.total is None:
                    steps.append(Text(task.text()))
                elif task not in self._ids:
                    self._ids[task] = self._bars.add_task(task.title, total=task.total, completed=task.done)
            for task, place in self._ids.items():
                self._bars.update(place, completed=task.done)
            return Group(*steps, *([self._bars.make_tasks_table(self._bars.tasks)] if self._ids else []))


class _Lines:
    """Now and then a line about the innermost task."""

    def __init__(self, tasks: Callable[[], list[Task]], write: Callable[[str], None], *, for_people: bool) -> None:
        self.for_people = for_people
        self._tasks, self._write, self._closed = tasks, write, threading.Event()
        self._thread = threading.Thread(target=self._run, name="tiercache-display", daemon=True)
        self._thread.start()

    def ended(self, task: Task) -> None:
        """A task ended."""

    def close(self) -> None:
        """Write no more."""
        self._closed.set()
        self._thread.join()

    def _run(self) -> None:
        wait = FIRST_S
        while not self._closed.wait(wait):
            wait = EVERY_S
            for task in self._tasks()[-1:]:
                try:
                    self._write(task.text())
                except (OSError, ValueError):  # whoever read it has gone
                    return
