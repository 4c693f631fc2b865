"""Grows the draft trees of all n-gram drafters, best node first, from a look-up of what follows.

A look-up costs microseconds, so nodes are taken one by one from a heap (SpecExec, arXiv 2406.02532, section 4, with
one node instead of a batch); the growers of `draft.grow` ask a model, which wants many nodes at once.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from tiercache.draft.base import Context, TreeBudget
from tiercache.draft.tree import ROOT, DraftTree

State = TypeVar("State")
# What may follow: (token, its probability, how much it is favoured beyond that, the state behind it).
Continuation = tuple[int, float, float, State]
# Candidates of a state, best first (by probability times favour) and no token twice. Their probabilities sum to 1 at
# most; what is missing belongs to tokens that are not among them.
Expand = Callable[[State], Sequence[Continuation[State]]]

# The highest noise among several tokens is distributed as that of one token with their joint mass; e to its mean.
_TYPICAL_NOISE = math.exp(0.5772156649015329)
_LEAST = 1e-30  # a probability that is none


def grow_tree(start: State, expand: Expand[State], budget: TreeBudget, context: Context) -> DraftTree:
    """The nodes with the largest products of probabilities (and favour) along their paths, from the state `start` on.

    Returns:
        a tree within the budget's nodes, depth, width and floor, that ends one token short of the context's room. Its
        order is "shared_gumbel" in sampled decoding, else "deterministic"; logq is the log of each node's probability
        given its parent: in sampled decoding, of its score with the target's noise being the highest. The budget's
        `score_scale` is a factor on scores.
    """
    grown = _Growth(expand, budget, context)
    if budget.nodes > 0:
        grown.open(start, ROOT, 1.0, 1)
    while grown.heap and len(grown.tokens) < budget.nodes:
        grown.take()
    return DraftTree(
        tuple(grown.tokens),
        tuple(grown.parents),
        "deterministic" if context.noise is None else "shared_gumbel",
        logq=tuple(grown.logq),
    )


class _Growth(Generic[State]):
    """A tree under growth. Of siblings only the best one left waits in the heap; its successor follows when it goes."""

    def __init__(self, expand: Expand[State], budget: TreeBudget, context: Context) -> None:
        self._expand, self._noise = expand, context.noise
        self._width, self._floor, self._vocabulary = budget.width, max(budget.floor, _LEAST), context.vocabulary
        self._score_scale = budget.score_scale
        self._deepest = min(budget.depth, context.room - 1)
        self._position = len(context.tokens) - 1  # of the root
        self._rows: list[Callable[[int], float]] = []  # the noise of a token, by depth
        self._turn = 0  # of two equals the one that came first
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.logq: list[float] = []
        # (-merit, turn, siblings, place among them, parent, probability of the parent's path, depth)
        self.heap: list[tuple[float, int, Sequence[Continuation[State]], int, int, float, int]] = []

    def open(self, state: State, node: int, path: float, depth: int) -> None:
        """Let the children of a node come into question."""
        if depth <= self._deepest:
            found = self._expand(state)
            if found and (self._noise is not None or self._score_scale != 1):
                found = self._scored(found, depth)
            self._push(found, 0, node, path, depth)

    def take(self) -> None:
        """Enter the best candidate as a node."""
        _, _, siblings, place, parent, path, depth = heapq.heappop(self.heap)
        token, probability, _, state = siblings[place]
        self.tokens.append(token)
        self.parents.append(parent)
        self.logq.append(math.log(probability))
        self._push(siblings, place + 1, parent, path, depth)
        self.open(state, len(self.tokens) - 1, path * probability, depth + 1)

    def _push(self, siblings: Sequence[Continuation[State]], first: int, parent: int, path: float, depth: int) -> None:
        for place in range(first, min(len(siblings), self._width)):
            token, probability, favour, _ = siblings[place]
            if path * probability >= self._floor and 0 <= token < self._vocabulary:
                self._turn += 1
                entry = (-path * probability * favour, self._turn, siblings, place, parent, path, depth)
                heapq.heappush(self.heap, entry)
                return

    def _scored(self, found: Sequence[Continuation[State]], depth: int) -> Sequence[Continuation[State]]:
        """With the chance of the highest score, of log p + noise, for their probabilities."""
        weights, unknown = [candidate[1] for candidate in found], max(0.0, 1.0 - sum([p for _, p, _, _ in found]))
        if self._noise is not None:
            if depth > len(self._rows):
                self._rows.append(self._noise(self._position + depth).numpy(force=True).item)
            noise, vocabulary = self._rows[depth - 1], self._vocabulary
            weights = [p * math.exp(noise(token)) if 0 <= token < vocabulary else 0.0 for token, p, _, _ in found]
            unknown *= _TYPICAL_NOISE
        if self._score_scale != 1:
            highest = max(unknown, *weights, _LEAST)
            weights = [(weight / highest) ** self._score_scale for weight in weights]
            unknown = (unknown / highest) ** self._score_scale
        scale = 1.0 / max(sum(weights) + unknown, _LEAST)
        ranked = [
            (token, weight * scale, favour, state)
            for weight, (token, _, favour, state) in zip(weights, found, strict=True)
        ]
        if len(ranked) > 1:
            ranked.sort(key=_merit)
        return ranked


def _merit(candidate: Continuation[State]) -> float:
    return -candidate[1] * candidate[2]
