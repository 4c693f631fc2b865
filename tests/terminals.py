"""A command of tiercache on a real pseudo terminal, as somebody sits before it."""

import codecs
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

MAIN = (  # a shell that runs tests in the background has its children ignore interrupts
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom tiercache.cli import main; main()"
)
_OWN = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # so that keys become signals
_PATIENCE_S = 120
CTRL_C, CTRL_D = "\x03", "\x04"


class Terminal:
    """A process whose standard input and error are a terminal, and its standard output if no other is given.

    Attributes:
        shown: all that was written to the terminal.
        process: who writes.
    """

    def __init__(self, *arguments: object, stdout: Any = None) -> None:
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-c", _OWN + MAIN, *map(str, arguments)]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs if stdout is None else stdout,
            stderr=theirs,
            env=environment,
            start_new_session=True,
        )
        os.close(theirs)
        self.shown, self._read = "", 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)

    def type(self, keys: str) -> None:
        """Press keys."""
        os.write(self._ours, keys.encode())

    def until(self, text: str) -> str:
        """What is shown up to `text`, from where the last call ended."""
        end = time.monotonic() + _PATIENCE_S
        while (place := self.shown.find(text, self._read)) < 0:
            assert self._more(end), f"{text!r} was not shown in: {self.shown[self._read :]!r}"
        begin, self._read = self._read, place + len(text)
        return self.shown[begin : self._read]

    def until_asleep(self) -> None:
        """Wait until it waits for keys: CPython's line editor misses a signal that comes just before."""
        end = time.monotonic() + _PATIENCE_S
        while Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            assert time.monotonic() < end, "it never waits"
            time.sleep(0.01)

    def end(self) -> int:
        """The exit code, once everything is read."""
        end = time.monotonic() + _PATIENCE_S
        while self._more(end):
            pass
        return self.process.wait(timeout=_PATIENCE_S)

    def _more(self, end: float) -> bool:
        """Read on; whether there was something."""
        if not select.select([self._ours], [], [], max(0.0, end - time.monotonic()))[0]:
            return False
        try:
            self.shown += self._decoder.decode(os.read(self._ours, 65536))
        except OSError:  # the other end is closed
            return False
        return True
