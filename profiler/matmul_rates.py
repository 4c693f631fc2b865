"""How fast a machine's kernels multiply by weights of one precision, as measured.

Knows seconds and bytes; neither kernels nor models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import log

from profiler.figure import Figure


@dataclass(frozen=True)
class MatmulRates:
    """A kernel's rates.

    Attributes:
        bytes_per_weight: of its precision, scales included.
        gbps: 1e9 bytes of weights a second, by the tokens of a call; fewest tokens first.
    """

    bytes_per_weight: float
    gbps: Mapping[int, Figure]

    def seconds(self, nbytes: int, tokens: int) -> float:
        """Of a product of `tokens` tokens with `nbytes` of weights.

        Between the token counts that were measured, seconds grow in a straight line; beyond them with the tokens.
        """
        counts = list(self.gbps)
        if tokens <= counts[0]:
            return self._at(nbytes, counts[0])
        for below, above in pairwise(counts):
            if tokens <= above:
                share = (tokens - below) / (above - below)
                return self._at(nbytes, below) * (1 - share) + self._at(nbytes, above) * share
        return self._at(nbytes, counts[-1]) * tokens / counts[-1]

    def scaled(self, share: float) -> "MatmulRates":
        """A share of every rate."""
        return replace(self, gbps={tokens: figure.scaled(share) for tokens, figure in self.gbps.items()})

    def _at(self, nbytes: int, tokens: int) -> float:
        return nbytes / (self.gbps[tokens].value * 1e9)


def nearest(rates: Sequence[MatmulRates], bytes_per_weight: float) -> MatmulRates | None:
    """Those of the precision whose weights take about as many bytes; None where nothing was measured."""
    return min(rates, key=lambda each: abs(log(each.bytes_per_weight / bytes_per_weight)), default=None)
