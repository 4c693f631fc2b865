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

    @property
    def slowness(self) -> float:
        """One number of both, to compare paces by."""
        return self.loop_s * self.handover_s

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
        usual: the pace that counts as usual; None takes the fastest of a few seconds.
        may_restart: raise where the machine turns out to be faster than that; otherwise it is not as usual then.
        in_all_s: how much longer all measurements together may take for it.
        look_on_s: how long to look for the usual pace where it is seen but now and then; None for a good while.

    Attributes:
        usual: the pace that counts as usual.
    """

    def __init__(
        self,
        patience_s: float = 4.0,
        usual: Pace | None = None,
        *,
        may_restart: bool = False,
        in_all_s: float = float("inf"),
        look_on_s: float | None = None,
    ) -> None:
        self.usual = usual or _fastest_pace(_LOOK_ON_S if look_on_s is None else look_on_s)
        self._patience_s, self._may_restart, self._in_all_s = patience_s, may_restart, in_all_s
        self._samples = self._disturbed = 0

    @property
    def share_disturbed(self) -> float:
        """What of all samples counts though the machine was not as usual, for patience had run out."""
        return self._disturbed / max(1, self._samples)

    def sample(self, work: Callable[[], T], count: int) -> list[T]:
        """What so many calls give, as it is; raises as `by_turns`."""
        return [sample.what for sample in self.by_turns({"": work}, {"": count})[""]]

    def by_turns(self, works: Mapping[K, Callable[[], T]], counts: Mapping[K, int]) -> dict[K, list[Sample[T]]]:
        """What so many calls of each give, taken in turn; the most usual ones of all that were made.

        Raises:
            FasterError: the machine is faster than usual, and may restart.
        """
        found: dict[K, list[Sample[T]]] = {key: [] for key in works}
        lacking = [key for key in works for _ in range(counts[key])]
        begin_s = left_s = min(self._patience_s, max(self._in_all_s, 0.0))
        before, left_s = self._wait(left_s)
        while lacking:
            for key in dict.fromkeys(lacking):
                at = time.perf_counter()
                what = works[key]()
                took_s = time.perf_counter() - at
                after = self._now()
                off = max(before.off(self.usual), after.off(self.usual))
                found[key].append(Sample(what, off, (before.loop_s + after.loop_s) / 2))
                if off <= AS_USUAL or left_s <= 0:
                    lacking.remove(key)
                else:
                    left_s -= took_s
                before = after
                if after.off(self.usual) > AS_USUAL:
                    before, left_s = self._wait(left_s)
        self._in_all_s -= begin_s - left_s
        return {key: self._best(each, counts[key]) for key, each in found.items()}

    def timed(
        self, works: Mapping[K, Callable[[], object]], counts: Mapping[K, int], unpaced_s: float = 0.0
    ) -> dict[K, list[float]]:
        """Seconds of calls as they would be at the usual pace, in order of length.

        Args:
            works: the calls.
            counts: of each.
            unpaced_s: of each call, what takes its time whatever the pace, such as bytes on their way from memory.
        """
        samples = self.by_turns({key: _clocked(work) for key, work in works.items()}, counts)

        def paced(sample: Sample[float]) -> float:
            aside = min(unpaced_s, sample.what)
            return aside + (sample.what - aside) * self.usual.loop_s / sample.loop_s

        return {key: sorted(map(paced, found)) for key, found in samples.items()}

    def _best(self, found: list[Sample[T]], count: int) -> list[Sample[T]]:
        best = sorted(found, key=lambda each: each.off)[:count]
        self._samples += count
        self._disturbed += sum(each.off > AS_USUAL for each in best)
        return best

    def _wait(self, left_s: float) -> tuple[Pace, float]:
        """Until the machine is as usual or patience ends; gives the pace then, and what is left of patience."""
        while (pace := self._now()).off(self.usual) > AS_USUAL and left_s > 0:
            at = time.perf_counter()
            time.sleep(_PAUSE_S)
            left_s -= time.perf_counter() - at
        return pace, left_s

    def _now(self) -> Pace:
        pace = Pace.now()
        if self._may_restart and pace.slowness < self.usual.slowness / AS_USUAL:
            raise FasterError(pace)
        return pace


def _fastest_pace(look_on_s: float) -> Pace:
    """The fastest that was seen in a few seconds; in more where the machine changes."""
    begin, found = time.perf_counter(), [Pace.now()]
    while True:
        fastest = min(found, key=lambda pace: pace.slowness)
        took_s = time.perf_counter() - begin
        mostly = median(pace.off(fastest) for pace in found) <= AS_USUAL
        if took_s > look_on_s or (took_s > _LOOK_S and mostly):
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
