"""Drafts by suffix decoding: what followed earlier occurrences of the longest suffix of the text, as a tree."""

from array import array
from collections.abc import Sequence
from dataclasses import replace
from operator import itemgetter

from tiercache.draft.base import DrafterRequirements, TreeBudget
from tiercache.draft.ngram.automaton import EMPTY, Automaton
from tiercache.draft.ngram.follow import Follower
from tiercache.draft.ngram.growth import Continuation, grow_tree
from tiercache.draft.ngram.rates import HitRates
from tiercache.draft.tree import DraftTree
from tiercache.errors import UsageError

_BREAK = -1  # between sequences: no token, so it is never proposed
_NODES = 16  # that a tree may have, and as many more for each token that matches
_WIDEST = 8  # tokens that a state is looked up for
_LEVELS = 3  # ever shorter suffixes that are looked up where the longest one leaves much open
_ENOUGH = 0.02  # so little left open is not worth another
# How often the next token followed before, assumed by the bits of the match's length (1, 2-3, 4-7 ...); and of the
# same, where one token alone followed.
_LENGTHS = 6
_PRIOR = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.3, 0.45, 0.6, 0.75, 0.9, 0.95)
_TOKEN_BYTES = 400  # an automaton takes at most, by token of its text
_STATE = tuple[int, int]  # of the automaton, and how many tokens of it match


class SuffixAutomaton(Follower):
    """Continues the longest suffix of the text that occurred before, with what followed it there, by frequency.

    Matches as SAM-Decoding (arXiv 2411.10666, section 3) does, in the prompt, in everything emitted and in earlier
    sequences; the tree by frequencies and its size by the match's length are those of SuffixDecoding (arXiv 2411.04975,
    section 3). Where the longest suffix leaves much open, shorter ones fill in, as escapes do in PPM; how much it
    leaves open is measured, by its length, on the text itself.

    Args:
        limit: tokens of text that are kept; when there are as many, the older half is dropped.

    Raises:
        UsageError: `limit` is below 2.
    """

    name = "suffix"
    open_ended = True

    def __init__(self, *, limit: int = 1 << 14) -> None:
        if limit < 2:
            raise UsageError(f"a suffix automaton of {limit} tokens; let it keep 2 tokens at least")
        self._limit = limit
        self._rates = HitRates(_PRIOR)
        self._text = array("q")  # that the automaton holds; the present sequence begins at `_start`
        self._start = 0
        self._automaton = Automaton()
        self.requirements = DrafterRequirements(host_bytes=limit * _TOKEN_BYTES + 65536)

    def propose(self, budget: TreeBudget) -> DraftTree:
        state = self._automaton.link[self._automaton.last]
        if state <= EMPTY:  # nothing matches
            return DraftTree()
        match = self._automaton.length[state]
        nodes = min(budget.nodes, _NODES * (match + 1))
        return grow_tree((state, match), self._continuations, replace(budget, nodes=nodes), self.context)

    def _continuations(self, at: _STATE) -> list[Continuation[_STATE]]:
        automaton, (state, match) = self._automaton, at
        found: list[Continuation[_STATE]] = []
        taken: set[int] = set()
        left, levels = 1.0, 0
        while state > EMPTY and left > _ENOUGH and levels < _LEVELS and len(found) < _WIDEST:
            children, total, several = automaton.children(state, _WIDEST)
            if several:
                known = self._rates[_kind(match, several == 1)]
                share = left * known / total
                for token, following, count in children:
                    if token not in taken:
                        found.append((token, share * count, 1.0, (following, match + 1)))
                        taken.add(token)
                left *= 1.0 - known
                levels += 1
            state = automaton.link[state]
            match = automaton.length[state]
        if levels > 1:
            found.sort(key=itemgetter(1), reverse=True)
        return found

    def _append(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            self._judge(token)
            self._text.append(token)
            if len(self._text) < self._limit:
                self._automaton.append(token)
            else:
                self._rebuild()

    def _judge(self, token: int) -> None:
        """Whether the token that came had followed the match before."""
        automaton = self._automaton
        state = automaton.link[automaton.last]
        if state > EMPTY and (several := automaton.several(state)):
            self._rates.add(_kind(automaton.length[state], several == 1), automaton.next(state, token) >= 0)

    def _enter(self, tokens: Sequence[int]) -> None:
        # Of a sequence that goes on (the next turn of a conversation, say) only the rest is new.
        kept = self._text[self._start :]
        if kept and len(tokens) >= self.seen and kept == array("q", tokens[self.seen - len(kept) : self.seen]):
            self._append(tokens[self.seen :])
            return
        if self._text:
            self._append([_BREAK])
        self._start = len(self._text)
        self._append(tokens[-self._limit :])

    def _rebuild(self) -> None:
        """An automaton of the text alone, its older half dropped where it is too long."""
        if len(self._text) >= self._limit:
            drop = len(self._text) - self._limit // 2
            del self._text[:drop]
            self._start = max(0, self._start - drop)
        self._automaton = Automaton()  # the old one goes first
        for token in self._text:
            self._automaton.append(token)


def _kind(match: int, alone: bool) -> int:
    return min(match.bit_length(), _LENGTHS) - 1 + _LENGTHS * alone
