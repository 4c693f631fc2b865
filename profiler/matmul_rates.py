"""How fast a machine's kernels multiply by matrices of one precision and size, as measured.

Knows seconds and bytes; neither kernels nor models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import log

from profiler.figure import Figure


@dataclass(frozen=True)
class MatmulRates:
    """A kernel's rates.

    Attributes:
        bytes_per_weight: of its precision, scales included.
        weights: of the matrix that was multiplied by: small ones are slower by the byte.
        gbps: 1e9 bytes of weights a second, by the tokens of a call; fewest tokens first.
        activation_ns: 1e-9 seconds of a token for each row and column of a matrix beside the product (norms, residuals,
            Hadamard transforms, quantizing), by the tokens of a call, beyond what a layer of one token takes.
    """

    bytes_per_weight: float
    weights: int
    gbps: Mapping[int, Figure]
    activation_ns: Mapping[int, Figure] = field(default_factory=dict)

    def seconds(self, nbytes: int, tokens: int, width: int = 0) -> float:
        """Of a product of `tokens` tokens with `nbytes` of weights, whose rows and columns sum to `width`."""
        product = {count: nbytes / (figure.value * 1e9) for count, figure in self.gbps.items()}
        beside = {count: figure.value * 1e-9 * count * width for count, figure in self.activation_ns.items()}
        return _between(product, tokens) + _between({1: 0.0, **beside}, tokens)

    def scaled(self, share: float) -> "MatmulRates":
        """A share of every rate."""
        gbps = {tokens: figure.scaled(share) for tokens, figure in self.gbps.items()}
        beside = {tokens: figure.scaled(1 / share) for tokens, figure in self.activation_ns.items()}
        return replace(self, gbps=gbps, activation_ns=beside)


def _between(seconds: Mapping[int, float], tokens: int) -> float:
    """A straight line between the token counts that were measured; beyond them in proportion to the tokens."""
    counts = list(seconds)
    if tokens <= counts[0]:
        return seconds[counts[0]]
    for below, above in pairwise(counts):
        if tokens <= above:
            share = (tokens - below) / (above - below)
            return seconds[below] * (1 - share) + seconds[above] * share
    return seconds[counts[-1]] * tokens / counts[-1]


def nearest(rates: Sequence[MatmulRates], bytes_per_weight: float, weights: int) -> MatmulRates | None:
    """Those of the nearest precision, and of these the nearest size; None where nothing was measured."""
    return min(
        rates,
        key=lambda each: (abs(log(each.bytes_per_weight / bytes_per_weight)), abs(log(each.weights / weights))),
        default=None,
    )
