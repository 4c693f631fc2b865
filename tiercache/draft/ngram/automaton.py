"""A suffix automaton that grows token by token: every substring of a text, and how often it occurred.

Blumer et al., 1985; its use for drafting is SAM-Decoding's (arXiv 2411.10666, section 3.1). Knows integers; nothing of
trees or drafters.
"""

from array import array
from collections.abc import Iterable
from operator import itemgetter

EMPTY = 0
_NONE = -1
# A token raises the counts of so many of the longest substrings that end in it; the shorter ones of a text that
# repeats itself that often are common in any case. It bounds the work on one token.
_COUNTED = 32
# Ranking what followed is work where that is much: there it is done again only when the state's count has grown by a
# tenth, for so many states at a time.
_MANY, _RANKED = 32, 128
# What followed a state: the commonest (token, state, count), the sum of all counts, and how many tokens there are.
Children = tuple[list[tuple[int, int, int]], int, int]


class Automaton:
    """States are sets of substrings that end at the same places; a state's longest one has `length[state]` tokens.

    Attributes:
        last: the state of the whole text.
        length: of the longest substring of each state.
        link: of each state, that of its longest suffix which also occurs elsewhere.
        count: how often each state's substrings occurred.
    """

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        # Numbers in arrays, for there are up to two states a token; most have one transition, and only those with
        # more have a dictionary, which holds all of them.
        self.length, self.link, self.count = array("i", [0]), array("i", [_NONE]), array("i", [0])
        self._token, self._next = array("q", [0]), array("i", [_NONE])
        self._more: dict[int, dict[int, int]] = {}
        self._ranked: dict[int, tuple[int, Children]] = {}
        self.last = EMPTY
        for token in tokens:
            self.append(token)

    def __len__(self) -> int:
        """States."""
        return len(self.length)

    def next(self, state: int, token: int) -> int:
        """Where a token leads from a state; -1 where it never followed."""
        more = self._more.get(state)
        if more is not None:
            return more.get(token, _NONE)
        return self._next[state] if self._token[state] == token else _NONE

    def append(self, token: int) -> None:
        """The text grows by a token."""
        length, link, following = self.length, self.link, self.next
        last = self.last
        made = self.last = self._state(length[last] + 1)
        while last != _NONE and (found := following(last, token)) == _NONE:
            self._lead(last, token, made)
            last = link[last]
        if last == _NONE:
            link[made] = EMPTY
        elif length[last] + 1 == length[found]:
            link[made] = found
        else:
            link[made] = self._split(last, token, found)
        for _ in range(_COUNTED):
            if made == EMPTY:
                break
            self.count[made] += 1
            made = link[made]

    def children(self, state: int, most: int) -> Children:
        """What followed a state, the `most` commonest tokens of it; where there are many, as it was a little ago."""
        more, count = self._more.get(state), self.count
        if more is None:
            found = self._next[state]
            if found == _NONE:
                return [], 0, 0
            return [(self._token[state], found, count[found])], count[found], 1
        if len(more) <= _MANY:
            return _ranked(more, count, most)
        then, kept = self._ranked.get(state, (0, ([], 0, 0)))
        if count[state] > 1.1 * then:
            if len(self._ranked) >= _RANKED:
                self._ranked.clear()
            kept = _ranked(more, count, most)
            self._ranked[state] = count[state], kept
        return kept

    def several(self, state: int) -> int:
        """How many tokens followed a state."""
        more = self._more.get(state)
        return len(more) if more is not None else int(self._next[state] != _NONE)

    def _state(self, length: int) -> int:
        self.length.append(length)
        self.link.append(_NONE)
        self.count.append(0)
        self._token.append(0)
        self._next.append(_NONE)
        return len(self.length) - 1

    def _lead(self, state: int, token: int, to: int) -> None:
        more = self._more.get(state)
        if more is not None:
            more[token] = to
        elif self._next[state] == _NONE or self._token[state] == token:
            self._token[state], self._next[state] = token, to
        else:
            self._more[state] = {self._token[state]: self._next[state], token: to}

    def _split(self, last: int, token: int, found: int) -> int:
        """The shorter substrings of `found` now end at one more place: a state of their own for them."""
        clone = self._state(self.length[last] + 1)
        self.link[clone], self.count[clone] = self.link[found], self.count[found]
        self._token[clone], self._next[clone] = self._token[found], self._next[found]
        if found in self._more:
            self._more[clone] = dict(self._more[found])
        while last != _NONE and self.next(last, token) == found:
            self._lead(last, token, clone)
            last = self.link[last]
        self.link[found] = clone
        return clone


def _ranked(more: dict[int, int], count: "array[int]", most: int) -> Children:
    children = [(token, found, count[found]) for token, found in more.items()]
    children.sort(key=itemgetter(2), reverse=True)
    return children[:most], sum(map(itemgetter(2), children)), len(children)
