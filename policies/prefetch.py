"""What to bring next on a cyclic scan: a pass over layers asks for the same keys in the same order, for ever.

On such a scan recency is worthless (LRU hits 0 %), the future is known, and the best prefetch is simply the next
key that does not already stay. Knows nothing of space; see `residency`.
"""

from collections.abc import Collection, Sequence

from policies.types import Key


class CyclicPrefetch:
    """Walks `order` for ever, or once, leaving out the keys that stay."""

    def __init__(self, order: Sequence[Key], staying: Collection[Key], *, once: bool = False) -> None:
        stay = set(staying)
        self._order = tuple(key for key in order if key not in stay)
        self._place = {key: place for place, key in enumerate(self._order)}
        if len(self._place) != len(self._order):
            raise ValueError("a key that passes through may be asked for once per pass; pin the ones used again")
        self._next = 0
        self._once = once

    def peek(self) -> Key | None:
        """The key to bring next; None when every key stays, or at the end of the one round."""
        return self._order[self._next] if self._next < len(self._order) else None

    def advance(self) -> None:
        """The key was brought: look at the one after it."""
        self._next += 1
        if self._next == len(self._order) and not self._once:
            self._next = 0

    def restart(self) -> None:
        """From the beginning of the round."""
        self._next = 0

    def seek(self, key: Key) -> None:
        """The scan jumped: `key` is wanted now.

        Raises:
            KeyError: a key that stays, or that the scan does not know.
        """
        self._next = self._place[key]
