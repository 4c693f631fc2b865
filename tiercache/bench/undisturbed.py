"""Measures again where the machine was not as usual meanwhile: what is measured then is not this program's alone.

Other programs may take the processor, which the system's counters tell, or other guests of a virtual machine's host,
which they may not. And that host may put the cores beside one another, with one cache, or apart: passes of many tokens
then take 1.3 times as long, on one machine. Knows nothing of what is measured.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch

T = TypeVar("T")

ALLOWED = 0.05  # of all cores, that others may use
FAR = 1.5  # times what the cores usually take to hand data to one another: they lie apart
SLOW = 1.15  # times what a loop takes at best: somebody else is on the core, of whom a guest's counters may not know
_TRIES, _PAUSE_S, _LOOK_S = 4, 0.5, 1.0
_LOOP, _LOOPS = 20000, 7
_STAT = Path("/proc/stat")
_SHAPE = (256, 512)
_HANDOVERS = 21


class Watch:
    """Looks at the machine while something is measured.

    Args:
        handover_s: what `handover()` usually is; None finds the least within a second.
        patience_s: how long to wait, all measurements together, for the machine to be as usual.

    Attributes:
        handover_s: what it usually is.
        disturbed: measurements that were kept though the machine was not as usual.
    """

    def __init__(self, handover_s: float | None = None, patience_s: float = 15.0) -> None:
        self._patience_s, self.disturbed, self._measured = patience_s, 0, 0
        while True:
            (least_s, self._pace_s), others = _with_others(_look)
            if others <= ALLOWED or self._patience_s <= 0:
                break
            self._patience_s -= _LOOK_S
        self.handover_s = least_s if handover_s is None else handover_s

    @property
    def share_disturbed(self) -> float:
        """What of all measurements was kept though the machine was not as usual."""
        return self.disturbed / max(1, self._measured)

    def undisturbed(self, work: Callable[[], T]) -> T:
        """Do something, and again where it was disturbed; the least disturbed of a few results."""
        found: list[tuple[bool, float, T]] = []
        self._measured += 1
        for _ in range(_TRIES):
            self._wait()
            begin = time.perf_counter()
            what, others = _with_others(work)
            took = time.perf_counter() - begin
            found.append((not self._as_usual(), others, what))
            if found[-1][0] is False and others <= ALLOWED:
                return what
            if self._patience_s <= 0:
                break
            self._patience_s -= took
        self.disturbed += 1
        return min(found, key=lambda each: each[:2])[2]

    def _wait(self) -> None:
        while not self._as_usual() and self._patience_s > 0:
            time.sleep(_PAUSE_S)
            self._patience_s -= _PAUSE_S

    def _as_usual(self) -> bool:
        near = self.handover_s / FAR <= handover() <= self.handover_s * FAR
        return near and pace() <= self._pace_s * SLOW


def _look() -> tuple[float, float]:
    """The least hand-over, and the least pace, of a second."""
    end = time.perf_counter() + _LOOK_S
    found = [(handover(), pace())]
    while time.perf_counter() < end:
        found.append((handover(), pace()))
    handovers, paces = zip(*found, strict=True)
    return min(handovers), min(paces)


def _with_others(work: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and the share of all cores that other programs used meanwhile."""
    busy, own, begin = _busy_s(), time.process_time(), time.perf_counter()
    what = work()
    took = (time.perf_counter() - begin) * (os.cpu_count() or 1)
    return what, max(0.0, (_busy_s() - busy) - (time.process_time() - own)) / took


def pace() -> float:
    """Seconds of a loop that needs neither memory nor other cores."""
    return median(seconds_of(lambda: sum(number * number % 7 for number in range(_LOOP))) for _ in range(_LOOPS))


def handover() -> float:
    """Seconds in which all cores read what others of them have just written: a small matrix turned on its side."""
    matrix = torch.zeros(_SHAPE)
    return median(seconds_of(lambda: matrix.copy_(matrix.t().reshape(_SHAPE))) for _ in range(_HANDOVERS))


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _busy_s() -> float:
    """Seconds that all cores worked since the start; always 0 where the system does not tell."""
    try:
        first = _STAT.read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, softirq, *_ = map(int, first[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
