"""How long reads from a disk take by their size and number at a time, as measured.

Knows seconds and bytes; neither files nor models.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from profiler.figure import Figure


@dataclass(frozen=True)
class ReadRate:
    """What direct reads of one size reach.

    Attributes:
        threads: how many are under way at once.
        block_bytes: of each.
        gbps: 1e9 bytes a second, all threads together.
    """

    threads: int
    block_bytes: int
    gbps: Figure

    @property
    def seconds(self) -> float:
        """From the end of one read to the end of the next."""
        return self.block_bytes / (self.gbps.value * 1e9)

    def scaled(self, share: float) -> "ReadRate":
        """A share of the rate."""
        return ReadRate(self.threads, self.block_bytes, self.gbps.scaled(share))


def seconds(rates: Sequence[ReadRate], threads: int, sizes: Iterable[int]) -> float | None:
    """Of reads of these sizes, so many threads at a time; None where that was not measured.

    Between measured sizes on a straight line; a smaller read takes as long as the smallest, and larger ones in
    proportion to their bytes.
    """
    known = sorted((rate.block_bytes, rate.seconds) for rate in rates if rate.threads == threads)
    if not known:
        return None
    return sum(count * _one(known, nbytes) for nbytes, count in Counter(sizes).items())


def _one(known: Sequence[tuple[int, float]], nbytes: int) -> float:
    if nbytes <= known[0][0]:
        return known[0][1]
    for (below, low), (above, high) in pairwise(known):
        if nbytes <= above:
            return low + (high - low) * (nbytes - below) / (above - below)
    largest, taken = known[-1]
    return taken * nbytes / largest
