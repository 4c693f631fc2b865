"""How long work tells of itself: bars, steps and notes, on standard error.

`show` is the same everywhere: False says nothing, None and True show it, as rows where standard error is a terminal
and elsewhere as a line every few seconds. In a notebook a bar is tqdm's. Knows nothing of the work.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tiercache import notebook
from tiercache.display import Display, Task

Advance = Callable[[int], None]
Tell = Callable[[str], None]
DISPLAY = Display()  # one for the process, as standard error is


def note(text: str, *, show: bool | None = None) -> None:
    """A line on standard error about something that takes a while."""
    DISPLAY.note(text, shown=show is not False)


@contextmanager
def step(title: str, *, show: bool | None = None) -> Iterator[Tell]:
    """Work whose end nobody can tell; calls of what it yields say in words how far it is."""
    with _under_way(Task(title, shown=show is not False)) as task:
        yield task.tell


@contextmanager
def bar(title: str, total_bytes: int, *, done_bytes: int = 0, show: bool | None = None) -> Iterator[Advance]:
    """A progress bar; calls of what it yields add bytes.

    Args:
        title: what is being done.
        total_bytes: the whole of it.
        done_bytes: what an earlier run has done already.
        show: see above.
    """
    if show is not False and notebook.here():
        with notebook.bar(title, total_bytes, done_bytes) as advance:
            yield advance
        return
    with _under_way(Task(title, total_bytes, done_bytes, shown=show is not False)) as task:
        yield task.advance


class CommandProgress:
    """The task of a whole command, which outlives no result."""

    def __init__(self) -> None:
        self._task: Task | None = None

    def start(self, title: str, *, show: bool | None = None) -> None:
        """The command is under way."""
        self.stop()
        self._task = Task(title, shown=show is not False)
        DISPLAY.begin(self._task)

    def stop(self) -> None:
        """It has told its result, or writes text from now on; harmless when done twice."""
        if self._task is not None:
            DISPLAY.end(self._task)
            self._task = None


COMMAND_PROGRESS = CommandProgress()


@contextmanager
def _under_way(task: Task) -> Iterator[Task]:
    DISPLAY.begin(task)
    try:
        yield task
    finally:
        DISPLAY.end(task)
