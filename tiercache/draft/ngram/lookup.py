"""Drafts by prompt look-up: copies what followed when the newest tokens occurred last."""

from collections.abc import Sequence

import numpy as np

from tiercache.draft.base import DrafterRequirements, Feedback, TreeBudget
from tiercache.draft.ngram.follow import Follower
from tiercache.draft.ngram.growth import Continuation, grow_tree
from tiercache.draft.ngram.rates import HitRates
from tiercache.draft.tree import DraftTree
from tiercache.errors import UsageError

_PRIOR = 0.4  # of a copied token's being right, before anything was measured


class PromptLookup(Follower):
    """Copies what followed the most recent occurrence of the longest n-gram that the text ends in.

    Prompt lookup decoding (Saxena, 2023; assisted generation of transformers), with the newest match instead of the
    first. A copy that reaches the end of the text goes on with what it has copied, so that a loop is guessed whole.

    Args:
        ngram: tokens of the longest n-gram that is looked for.
        window: tokens of the text that are searched.

    Raises:
        UsageError: one of these is not positive.
    """

    name = "lookup"
    open_ended = True

    def __init__(self, ngram: int = 3, *, window: int = 1 << 15) -> None:
        if ngram < 1 or window < 1:
            raise UsageError(f"prompt look-up with n-grams of {ngram} in {window} tokens; give positive numbers")
        self._ngram, self._window = ngram, window
        self._text = np.zeros(2 * window, dtype=np.int64)  # the older half goes when it is full
        self._size = 0
        self._rates = HitRates([_PRIOR] * (ngram + 1))
        self._copied: tuple[tuple[int, ...], int] = ((), 0)  # what was guessed last, and the match it came of
        self.requirements = DrafterRequirements(host_bytes=self._text.nbytes + 16384)

    def propose(self, budget: TreeBudget) -> DraftTree:
        """A chain; see `Drafter`."""
        match, start = self._match()
        if not match:
            self._copied = (), 0
            return DraftTree()
        text, end, rate = self._text, self._size, self._rates[match]
        period = end - start

        def expand(place: int) -> list[Continuation[int]]:
            # Beyond the end the copy repeats itself.
            return [(text.item(start + place % period), rate, 1.0, place + 1)]

        tree = grow_tree(0, expand, budget, self.context)
        self._copied = tree.tokens, match
        return tree

    def observe(self, feedback: Feedback) -> None:
        copied, match = self._copied
        for guess, came in zip(copied, self.context.tokens[self.seen :], strict=False):
            self._rates.add(match, guess == came)
            if guess != came:
                break
        self._copied = (), 0
        super().observe(feedback)

    def _match(self) -> tuple[int, int]:
        """The longest n-gram at the end that occurred before, and the place behind its newest occurrence."""
        text, end = self._text[: self._size], self._size
        if end < 2:
            return 0, 0
        found = np.flatnonzero(text[: end - 1] == text[end - 1])
        match, start = 0, 0
        while len(found):
            match, start = match + 1, int(found[-1]) + 1
            if match == self._ngram:
                break
            found = found[found >= match]
            found = found[text[found - match] == text[end - 1 - match]]
        return match, start

    def _enter(self, tokens: Sequence[int]) -> None:
        self._size = 0
        self._copied = (), 0
        self._append(tokens)

    def _append(self, tokens: Sequence[int]) -> None:
        tokens = tokens[-self._window :]
        if self._size + len(tokens) > len(self._text):
            kept = self._window - len(tokens)
            self._text[:kept] = self._text[self._size - kept : self._size]
            self._size = kept
        self._text[self._size : self._size + len(tokens)] = tokens
        self._size += len(tokens)
