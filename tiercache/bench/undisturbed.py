"""Keeps what was measured while the machine was as usual, and tells how fast it was.

The host of a virtual machine lets other guests use the cores beside this one's, of which no counter tells: everything
then takes 1.3 to 1.7 times as long, for a second or for minutes. And its clocks follow what all guests do: the fastest
loop of one minute takes 1.2 times that of another. So a short loop and a hand-over of data between the cores are timed
before and after each sample: it counts where both were as usual, and the loop tells the pace at which it was taken.
Knows nothing of what is measured.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Generic, TypeVar

import torch

K = TypeVar("K")
T = TypeVar("T")

AS_USUAL = 1.25  # times the usual: clocks vary by 1.2 from minute to minute, and 1.35 is another program on a core
_PAUSE_S = 0.05
_LOOK_S, _LOOK_ON_S = 3.0, 15.0  # for the fastest pace; the second where it was seen but now and then
_LOOP, _LOOPS = 10000, 5
_SHAPE, _HANDOVERS = (256, 512), 11


@dataclass(frozen=True)
class Pace:
    """How fast the machine is just now.

    Attributes:
        loop_s: of a loop that needs neither memory nor other cores.
        handover_s: in which all cores read what others of them have just written.
    """

    loop_s: float
    handover_s: float

    @classmethod
    def now(cls) -> "Pace":
        """As it is."""
        return cls(_loop(), _handover())

    def off(self, usual: "Pace") -> float:
        """By which factor it is not the usual: another pace, or cores that lie otherwise."""
        loop, handover = self.loop_s / usual.loop_s, self.handover_s / usual.handover_s
        return max(loop, 1 / loop, handover, 1 / handover)


@dataclass(frozen=True)
class Sample(Generic[T]):
    """What a call gave.

    Attributes:
        what: that.
        off: by which factor the machine was not as usual, before or after, whichever is more.
        loop_s: see `Pace`; the mean of before and after.
    """

    what: T
    off: float
    loop_s: float


class FasterError(Exception):
    """The machine is faster than what was taken for usual; what was measured before does not go with what comes.

    Attributes:
        pace: that it has now.
    """

    def __init__(self, pace: Pace) -> None:
        super().__init__(pace)
        self.pace = pace


class Watch:
    """Takes samples, and those again in which the machine was not as usual.

    Args:
        patience_s: how much longer each measurement may take for it.
        usual: the pace, as a probe found it; None takes the fastest of a few seconds.

    Attributes:
        usual: the pace that counts as usual.
    """

    def __init__(self, patience_s: float = 4.0, usual: Pace | None = None) -> None:
        self.usual, self._looked = (fastest_pace(), True) if usual is None else (usual, False)
        self._patience_s = patience_s
        self._samples = self._disturbed = 0

    @property
    def share_disturbed(self) -> float:
        """What of all samples counts though the machine was not as usual, for patience had run out."""
        return self._disturbed / max(1, self._samples)

    def sample(self, work: Callable[[], T], count: int) -> list[T]:
        """What so many calls give, as it is."""
        return [sample.what for sample in self.by_turns({"": work}, {"": count})[""]]

    def by_turns(self, works: Mapping[K, Callable[[], T]], counts: Mapping[K, int]) -> dict[K, list[Sample[T]]]:
        """What so many calls of each give, taken in turn; the most usual ones of all that were made.

        Raises:
            FasterError: the usual pace was looked for, and is not the fastest.
        """
        found: dict[K, list[Sample[T]]] = {key: [] for key in works}
        end = time.perf_counter() + self._patience_s
        lacking = [key for key in works for _ in range(counts[key])]
        begin = self._wait(end)
        while lacking:
            for key in dict.fromkeys(lacking):
                before = begin
                what = works[key]()
                after = self._now()
                off = max(before.off(self.usual), after.off(self.usual))
                found[key].append(Sample(what, off, (before.loop_s + after.loop_s) / 2))
                if off <= AS_USUAL:
                    lacking.remove(key)
                elif len(found[key]) >= counts[key] and time.perf_counter() > end:
                    lacking = [each for each in lacking if each != key]
                begin = after if after.off(self.usual) <= AS_USUAL else self._wait(end)
        return {key: self._best(each, counts[key]) for key, each in found.items()}

    def timed(self, works: Mapping[K, Callable[[], object]], counts: Mapping[K, int]) -> dict[K, list[float]]:
        """Seconds of calls as they would be at the usual pace, in order of length."""
        samples = self.by_turns({key: _clocked(work) for key, work in works.items()}, counts)
        usual_s = self.usual.loop_s
        return {key: sorted(each.what * usual_s / each.loop_s for each in found) for key, found in samples.items()}

    def _best(self, found: list[Sample[T]], count: int) -> list[Sample[T]]:
        best = sorted(found, key=lambda each: each.off)[:count]
        self._samples += count
        self._disturbed += sum(each.off > AS_USUAL for each in best)
        return best

    def _wait(self, end: float) -> Pace:
        """Until the machine is as usual, or that time has come; gives the pace then."""
        while (pace := self._now()).off(self.usual) > AS_USUAL and time.perf_counter() < end:
            time.sleep(_PAUSE_S)
        return pace

    def _now(self) -> Pace:
        pace = Pace.now()
        if self._looked and pace.loop_s < self.usual.loop_s / AS_USUAL:
            raise FasterError(pace)
        return pace


def fastest_pace() -> Pace:
    """Of a few seconds; of more where the machine changes."""
    begin, found = time.perf_counter(), [Pace.now()]
    while True:
        fastest = Pace(min(pace.loop_s for pace in found), min(pace.handover_s for pace in found))
        took = time.perf_counter() - begin
        mostly = median(pace.off(fastest) for pace in found) <= AS_USUAL
        if took > _LOOK_ON_S or (took > _LOOK_S and mostly):
            return fastest
        found.append(Pace.now())


def _loop() -> float:
    return median(seconds_of(lambda: sum(number * number % 7 for number in range(_LOOP))) for _ in range(_LOOPS))


def _handover() -> float:
    """A small matrix, turned on its side."""
    matrix = torch.zeros(_SHAPE)
    return median(seconds_of(lambda: matrix.copy_(matrix.t().reshape(_SHAPE))) for _ in range(_HANDOVERS))


def _clocked(work: Callable[[], object]) -> Callable[[], float]:
    return lambda: seconds_of(work)


def seconds_of(work: Callable[[], object]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin
