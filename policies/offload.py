"""Where to multiply what does not stay in the fastest tier: bring it up first, or multiply it where it lies.

Weights that are multiplied below cross no link, only activations do; but the processor there is the slower one, and
falls behind as soon as a pass carries many tokens. Knows measured costs; measures nothing.
"""

from collections.abc import Mapping


def breakeven_tokens(link_s: float, product_s: Mapping[int, float]) -> int:
    """Up to how many tokens a pass is faster when the processor below multiplies: 0 for never.

    Args:
        link_s: seconds to bring some bytes up, however many tokens want them.
        product_s: seconds to multiply those bytes below, by tokens of the pass; measured at a few counts.
    """
    most = 0
    for tokens in sorted(product_s):
        if product_s[tokens] >= link_s:
            break
        most = tokens
    return most
