"""What a machine takes for the layers of models with weights of one kind, as measured on whole layers.

A layer of T tokens takes layer_s + activation_ns x T x width + bytes / gbps: what is there whatever its size (Python,
launches, threads that wake up), what grows with the activations (norms, residuals, transforms), and what grows with the
weights. Knows seconds and bytes; neither kernels nor models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import log

from profiler.figure import Figure


@dataclass(frozen=True)
class MatmulRates:
    """The three parts, each by the tokens of a pass, fewest tokens first.

    Attributes:
        bytes_per_weight: of the kind, scales included; 2 for bf16 as it lies in a checkpoint.
        gbps: 1e9 bytes of weights a second.
        activation_ns: 1e-9 seconds of a token for each row and column of a matrix.
        layer_s: seconds of a layer beside these two; empty where nobody measured.
        pass_s: seconds of a pass beside its layers; empty where nobody measured.
        unit_s: seconds for each unit that is read from the SSD or copied to a card, beside these; None where nobody
            measured.
    """

    bytes_per_weight: float
    gbps: Mapping[int, Figure]
    activation_ns: Mapping[int, Figure] = field(default_factory=dict)
    layer_s: Mapping[int, Figure] = field(default_factory=dict)
    pass_s: Mapping[int, Figure] = field(default_factory=dict)
    unit_s: Figure | None = None

    @property
    def figures(self) -> dict[str, Figure]:
        """Every figure, by name."""
        parts = {
            "weights, GB/s": self.gbps,
            "activations, ns": self.activation_ns,
            "a layer, s": self.layer_s,
            "a pass, s": self.pass_s,
        }
        found = {
            f"{part}, {self.bytes_per_weight:.2f} B a weight, {tokens} tokens": figure
            for part, figures in parts.items()
            for tokens, figure in figures.items()
        }
        unit = {} if self.unit_s is None else {f"a unit, s, {self.bytes_per_weight:.2f} B a weight": self.unit_s}
        return found | unit

    def product_s(self, nbytes: int, tokens: int) -> float:
        """Of a product of `tokens` tokens with `nbytes` of weights."""
        return between({count: nbytes / (figure.value * 1e9) for count, figure in self.gbps.items()}, tokens)

    def activation_s(self, width: int, tokens: int) -> float:
        """Beside products of `tokens` tokens with matrices whose rows and columns sum to `width`."""
        taken = {count: figure.value * 1e-9 * count * width for count, figure in self.activation_ns.items()}
        return between(taken, tokens) if taken else 0.0

    def beside_s(self, layers: int, tokens: int) -> float | None:
        """Seconds of a pass of so many layers beside its bytes and activations; None where nobody measured.

        Beyond the most tokens that were measured as there.
        """
        if not self.layer_s:
            return None
        tokens = min(tokens, max(self.layer_s))
        layer, whole = ({count: figure.value for count, figure in each.items()} for each in (self.layer_s, self.pass_s))
        return layers * between(layer, tokens) + (between(whole, tokens) if whole else 0.0)

    def scaled(self, share: float) -> "MatmulRates":
        """A share of every rate; what a layer costs beside bytes and operations stays."""
        gbps = {tokens: figure.scaled(share) for tokens, figure in self.gbps.items()}
        beside = {tokens: figure.scaled(1 / share) for tokens, figure in self.activation_ns.items()}
        return replace(self, gbps=gbps, activation_ns=beside)

    def with_layers(self, share: float) -> "MatmulRates":
        """A share of what layers cost beside bytes and activations."""
        return replace(self, layer_s={tokens: figure.scaled(share) for tokens, figure in self.layer_s.items()})


def between(seconds: Mapping[int, float], tokens: int) -> float:
    """A straight line between the token counts that were measured; beyond them in proportion to the tokens."""
    counts = list(seconds)
    if tokens <= counts[0]:
        return seconds[counts[0]]
    for below, above in pairwise(counts):
        if tokens <= above:
            share = (tokens - below) / (above - below)
            return seconds[below] * (1 - share) + seconds[above] * share
    return seconds[counts[-1]] * tokens / counts[-1]


def nearest(rates: Sequence[MatmulRates], bytes_per_weight: float) -> int:
    """The place of the kind whose weights take most nearly so many bytes; there must be one."""
    return min(range(len(rates)), key=lambda place: abs(log(rates[place].bytes_per_weight / bytes_per_weight)))
