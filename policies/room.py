"""Whether drafting pays for its room: two placements of the same weights, before a byte of either is reserved.

What drafting reserves pushes weights out of the faster tiers, so that each pass streams more. In return the tokens of a
pass share what it waits for the slower tiers; what is computed costs each of them the same (Amdahl's law: of the part
that is computed nothing is thought to be won). Knows bytes and rates; neither models nor drafters.
"""

from dataclasses import dataclass

# Tokens a pass that drafting is trusted with before it has shown any: n-grams gave 1.62 to 1.76 on the real model over
# a link, and where their room cost 1.69 passes they lost an eighth (docs/measured.md), so they were worth 1.45.
TOKENS = 1.4


@dataclass(frozen=True)
class Rates:
    """Bytes a second: of the memory where passes multiply, of the link up to it, and of the SSD."""

    memory: float
    link: float
    ssd: float


@dataclass(frozen=True)
class Traffic:
    """Bytes of one pass of one token.

    Attributes:
        needed: that it multiplies by.
        up: of them, those that cross the link.
        ssd: of them, those that are read from the SSD.
    """

    needed: int
    up: int
    ssd: int

    def seconds(self, rates: Rates) -> float:
        """What a pass takes, one thing after the other."""
        return self.needed / rates.memory + self.up / rates.link + self.ssd / rates.ssd

    def waits(self, rates: Rates) -> float:
        """Of them, those that a pass waits because a tier is slower than the memory where it multiplies."""
        slower = [(self.up, rates.link), (self.ssd, rates.ssd)]
        return sum(max(0.0, nbytes / rate - nbytes / rates.memory) for nbytes, rate in slower)


def price(plain: Traffic, drafting: Traffic, rates: Rates) -> float:
    """Seconds of a pass beside drafting's room over those of one without: what drafting must win to pay for it."""
    return drafting.seconds(rates) / plain.seconds(rates)


def pays(plain: Traffic, drafting: Traffic, rates: Rates) -> bool:
    """Whether drafting is likely to pay for its room; where the room costs nothing, it may always be tried."""
    saved = (1 - 1 / TOKENS) * drafting.waits(rates)
    return price(plain, drafting, rates) <= 1 or drafting.seconds(rates) - saved < plain.seconds(rates)
