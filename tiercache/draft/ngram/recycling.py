"""Drafts by token recycling: what the target ranked highest when it saw a token last."""

import numpy as np

from tiercache.draft.base import Drafter, DrafterRequirements, Feedback, TreeBudget
from tiercache.draft.ngram.growth import Continuation, grow_tree
from tiercache.draft.ngram.rates import RankShares
from tiercache.draft.ngram.rows import NONE, likeliest, newest
from tiercache.draft.tree import DraftTree
from tiercache.errors import UsageError

_KEPT = 8
_PRIOR = (0.35, 0.12, 0.07, 0.05, 0.035, 0.025, 0.02, 0.015)  # of each rank, before anything was measured


class TokenRecycling(Drafter):
    """Follows each token's newest top 8 of the target's tokens.

    Token Recycling (arXiv 2408.08696, section 3): one table for the whole vocabulary, taken from every verified node,
    accepted or not. Its one fixed tree is replaced by the best nodes for the measured acceptance of each rank.

    Args:
        vocabulary: of the target.

    Raises:
        UsageError: it is not positive.
    """

    name = "recycling"
    open_ended = True

    def __init__(self, vocabulary: int) -> None:
        if vocabulary < 1:
            raise UsageError(f"token recycling for {vocabulary} tokens; give the target's vocabulary")
        self._table = np.full((vocabulary, _KEPT), NONE, dtype=np.int32)
        self._ranks = RankShares(_PRIOR)
        self.requirements = DrafterRequirements(topk=_KEPT, host_bytes=self._table.nbytes + 16384)

    def propose(self, budget: TreeBudget) -> DraftTree:
        table, shares = self._table, self._ranks.shares()
        order = sorted(range(_KEPT), key=shares.__getitem__, reverse=True)

        def expand(token: int) -> list[Continuation[int]]:
            if not 0 <= token < len(table):
                return []
            row = table[token].tolist()
            return [(row[rank], shares[rank], 1.0, row[rank]) for rank in order if row[rank] != NONE]

        return grow_tree(self.context.tokens[-1], expand, budget, self.context)

    def observe(self, feedback: Feedback) -> None:
        tokens, emitted = self.context.tokens, feedback.emitted
        first = len(tokens) - len(emitted)
        for token, came in zip(tokens[first - 1 : -1], emitted, strict=True):
            if 0 <= token < len(self._table):
                row = self._table[token].tolist()
                if row[0] != NONE:
                    self._ranks.add(row.index(came) if came in row else None)
        told = likeliest(feedback, _KEPT)
        if told is not None:
            seen = newest(self.context, feedback, len(told))[:, 1]
            right = [0, *(node + 1 for node in feedback.path)] if len(feedback.tree) else []
            for rows in (slice(None), right):  # what holds of the text itself goes over what holds of guesses
                of, what = seen[rows], told[rows]
                known = (of >= 0) & (of < len(self._table))
                self._table[of[known]] = what[known]
