"""Drafts by ADED's adaptive tri-gram: the target's own distribution after each pair of tokens, with exploration."""

from math import sqrt

import numpy as np

from tiercache.draft.base import Context, Drafter, DrafterRequirements, Feedback, TreeBudget
from tiercache.draft.ngram.growth import Continuation, grow_tree
from tiercache.draft.ngram.rates import RankShares
from tiercache.draft.ngram.rows import NONE, likeliest, newest
from tiercache.draft.tree import DraftTree
from tiercache.errors import UsageError

_KEPT = 8
_PRIOR = (0.45, 0.13, 0.07, 0.04, 0.03, 0.02, 0.015, 0.01)  # of each rank, before anything was measured
_EXPLORATION = 0.1  # c of PUCT
_NEWEST = 0.25  # what the newest observation counts for at least
_CHUNK = 64  # tokens of a prompt that are learnt at once
_SMALL = 1e-4  # a probability not worth following
_SPREAD = 0x9E3779B97F4A7C15  # odd: consecutive keys fall far apart (Fibonacci hashing)
_WORD = 1 << 64
_PAIR = tuple[int, int]


class AdaptiveTrigram(Drafter):
    """M[a, b] -> c: probabilities of what the target says after two tokens, learnt from every node that it verifies.

    ADED (arXiv 2407.12021, section 3): the tri-gram matrix follows the target's distribution, and the draft maker
    adds to each probability P the exploration term of PUCT, c * P * sqrt(N(a, b)) / (1 + N(b, c)). Here the matrix
    is a hashed table where a newer pair takes an older one's place, and N counts the passes that showed a pair: a node
    whose own continuations are still unknown is worth a look. The target tells an order, not probabilities: a rank
    counts for how often the token that came stood at that rank of its row.

    Args:
        vocabulary: of the target.
        slots: pairs that the table holds; rounded up to a power of two.

    Raises:
        UsageError: one of these is out of range.
    """

    name = "trigram"
    open_ended = True

    def __init__(self, vocabulary: int, *, slots: int = 1 << 15) -> None:
        if not 1 <= vocabulary < 1 << 31 or slots < 2:
            raise UsageError(
                f"a tri-gram table of {slots} slots for {vocabulary} tokens; give the target's vocabulary and 2 slots "
                "at least"
            )
        bits = (slots - 1).bit_length()
        self._shift, slots = 64 - bits, 1 << bits
        self._vocabulary = vocabulary
        self._pairs = np.full(slots, NONE, dtype=np.int64)  # a * vocabulary + b
        self._tokens = np.full((slots, _KEPT), NONE, dtype=np.int32)  # likeliest first
        self._weights = np.zeros((slots, _KEPT), dtype=np.float32)
        self._visits = np.zeros(slots, dtype=np.int32)
        self._ranks = RankShares(_PRIOR)
        held = (self._pairs, self._tokens, self._weights, self._visits)
        self.requirements = DrafterRequirements(topk=_KEPT, host_bytes=sum(part.nbytes for part in held) + 65536)

    def begin(self, context: Context) -> None:
        """See `Drafter`; the prompt's own tri-grams are learnt too."""
        super().begin(context)
        tokens = np.array(context.tokens, dtype=np.int64)
        shares = self._ranks.shares()
        for first in range(0, len(tokens) - 2, _CHUNK):
            came = tokens[first + 2 : first + 2 + _CHUNK]
            told = np.full((len(came), _KEPT), NONE, dtype=np.int32)
            told[:, 0] = np.where((came >= 0) & (came < self._vocabulary), came, NONE)
            before = np.stack((tokens[first : first + len(came)], tokens[first + 1 : first + 1 + len(came)]), axis=1)
            self._learn(before, told, shares)

    def propose(self, budget: TreeBudget) -> DraftTree:
        tokens = self.context.tokens
        if len(tokens) < 2:
            return DraftTree()
        return grow_tree((tokens[-2], tokens[-1]), self._continuations, budget, self.context)

    def observe(self, feedback: Feedback) -> None:
        tokens, emitted = self.context.tokens, feedback.emitted
        if not emitted:
            return
        for place in range(max(2, len(tokens) - len(emitted)), len(tokens)):
            slot = self._slot(tokens[place - 2], tokens[place - 1])
            if slot is not None:
                row = self._tokens[slot].tolist()
                self._ranks.add(row.index(tokens[place]) if tokens[place] in row else None)
        told = likeliest(feedback, _KEPT)
        if told is None:  # what came is all there is to learn from
            told = np.full((len(emitted), _KEPT), NONE, dtype=np.int32)
            told[:, 0] = [token if 0 <= token < self._vocabulary else NONE for token in emitted]
            before = newest(self.context, Feedback(DraftTree(), (), emitted[-1:]), len(emitted))
        else:
            before = newest(self.context, feedback, len(told))
        self._learn(before, told, self._ranks.shares())

    def _slot(self, before: int, last: int) -> int | None:
        """Where a pair is, if it is there."""
        if not (0 <= before < self._vocabulary and 0 <= last < self._vocabulary):
            return None
        pair = before * self._vocabulary + last
        slot = (pair * _SPREAD % _WORD) >> self._shift
        return slot if self._pairs.item(slot) == pair else None

    def _continuations(self, pair: _PAIR) -> list[Continuation[_PAIR]]:
        slot = self._slot(*pair)
        if slot is None:
            return []
        last, vocabulary, shift, pairs, visits = pair[1], self._vocabulary, self._shift, self._pairs, self._visits
        curiosity = _EXPLORATION * sqrt(visits.item(slot))
        found = []
        for token, weight in zip(self._tokens[slot].tolist(), self._weights[slot].tolist(), strict=True):
            if weight > _SMALL:
                following = last * vocabulary + token
                to = (following * _SPREAD % _WORD) >> shift
                shown = visits.item(to) if pairs.item(to) == following else 0
                found.append((token, weight, 1.0 + curiosity / (1 + shown), (last, token)))
        found.sort(key=_merit, reverse=True)
        return found

    def _learn(self, before: np.ndarray, told: np.ndarray, shares: list[float]) -> None:
        """Move the rows of pairs [rows, 2] towards what the target told [rows, 8], by so much for each rank."""
        first, last = before.T
        known = (first >= 0) & (first < self._vocabulary) & (last >= 0) & (last < self._vocabulary)
        if not known.all():
            first, last, told = first[known], last[known], told[known]
        pairs = first * self._vocabulary + last
        slots = (pairs.astype(np.uint64) * np.uint64(_SPREAD) >> np.uint64(self._shift)).astype(np.int64)
        same = self._pairs[slots] == pairs
        visits = self._visits[slots] * same
        newest_share = np.maximum(1.0 / (1.0 + visits), _NEWEST)[:, None].astype(np.float32)
        old = self._tokens[slots]
        old[~same] = NONE
        kept = self._weights[slots] * (1 - newest_share)
        kept[old == NONE] = 0
        there = told != NONE
        match = (told[:, :, None] == old[:, None, :]) & there[:, :, None]  # [rows, told, old]
        fresh = there * np.array(shares, dtype=np.float32) * newest_share
        fresh += np.einsum("rto,ro->rt", match, kept)
        again = match.any(axis=1)  # counted with the fresh ones
        old[again], kept[again] = NONE, 0
        tokens, weights = np.concatenate((told, old), axis=1), np.concatenate((fresh, kept), axis=1)
        best = np.arange(len(slots))[:, None], np.argsort(-weights, axis=1, kind="stable")[:, :_KEPT]
        self._pairs[slots], self._visits[slots] = pairs, visits + 1
        self._tokens[slots], self._weights[slots] = tokens[best], weights[best]


def _merit(candidate: Continuation[_PAIR]) -> float:
    return candidate[1] * candidate[2]
