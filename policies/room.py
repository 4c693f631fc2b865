"""Whether drafting pays for its room: two placements of the same weights, before a byte of either is reserved.

What drafting reserves pushes weights out of the faster tiers, so that each pass streams more. In return the tokens of a
pass share what it waits for the slower tiers; what is computed costs each of them the same (Amdahl's law: of the part
that is computed nothing is thought to be won). Knows seconds; neither bytes nor models.
"""

# Tokens a pass that drafting is trusted with before it has shown any: n-grams gave 1.62 to 1.76 on the real model over
# a link, and where their room cost 1.69 passes they lost an eighth (docs/measured.md), so they were worth 1.45.
TOKENS = 1.4
_ROUNDING = 1e-6  # by which two equal sums of seconds may differ


def token_s(pass_s: float, waits_s: float) -> float:
    """Seconds of a token where drafting brings what it is trusted with.

    Args:
        pass_s: of a pass of one token in drafting's placement.
        waits_s: of them, those that it waits for slower tiers.
    """
    return pass_s - (1 - 1 / TOKENS) * waits_s


def price(plain_s: float, drafting_s: float) -> float:
    """A pass beside drafting's room over one without: what drafting must win to pay for it."""
    return drafting_s / plain_s


def pays(plain_s: float, drafting_s: float, waits_s: float) -> bool:
    """Whether drafting is likely to pay for its room; where the room costs nothing, it may always be tried."""
    return price(plain_s, drafting_s) <= 1 + _ROUNDING or token_s(drafting_s, waits_s) < plain_s
