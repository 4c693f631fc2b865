"""Adjacent token update: the last token's neurons stay until others need their place.

M2Cache (arXiv 2410.14740, section 5.3): adjacent tokens want much the same neurons, so what the token before wanted is
kept, what is new is loaded over what is not wanted any more, and nothing is remembered from token to token.
"""

from __future__ import annotations

from policies.arrays import BoolArray, IntArray
from policies.protocol import Eviction


class Atu(Eviction):
    """Any neuron that is not wanted now may go; the lowest slots go first."""

    def victims(self, hits: IntArray, evictable: BoolArray, count: int) -> IntArray:
        """The first `count` slots that are not wanted now."""
        return evictable.nonzero()[0][:count]
