"""Ctrl-C while an answer is written: the first stops the answer, the second the program."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self


class Interrupts:
    """Within, the first interrupt is noted and the second raises `KeyboardInterrupt`.

    Where the process ignores interrupts, as a shell's background jobs do, it goes on to.

    Attributes:
        stopped: there was one.
        heard: called at the first, in the middle of whatever runs.
    """

    def __init__(self) -> None:
        self.stopped = False
        self.heard: Callable[[], None] | None = None
        self._before: object = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other may
            self._before = signal.getsignal(signal.SIGINT)
            if self._before is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, self._caught)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if callable(self._before) or isinstance(self._before, signal.Handlers):
            signal.signal(signal.SIGINT, self._before)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        if self.stopped:
            raise KeyboardInterrupt
        self.stopped = True
        if self.heard is not None:
            self.heard()
