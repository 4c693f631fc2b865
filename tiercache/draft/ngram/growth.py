"""Grows the draft trees of all n-gram drafters, best node first, from a look-up of what follows.

A look-up costs microseconds, so nodes are taken one by one from a heap (SpecExec, arXiv 2406.02532, section 4, with
one node instead of a batch); the growers of `draft.grow` ask a model, which wants many nodes at once.
"""

import math
from collections.abc import Callable, Sequence
from heapq import heappop, heappush
from math import log
from typing import TypeVar

from tiercache.draft.base import Context, Noise, TreeBudget
from tiercache.draft.noise import GumbelNoise
from tiercache.draft.tree import ROOT, DraftTree, Order

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
    scores = _Scores(budget, context)
    scored = context.noise is not None or budget.score_scale != 1
    width, floor, vocabulary = budget.width, max(budget.floor, _LEAST), context.vocabulary
    deepest = min(budget.depth, context.room - 1)
    tokens: list[int] = []
    parents: list[int] = []
    logq: list[float] = []
    # (-merit, turn, siblings, place among them, parent, probability of the parent's path, depth): of siblings only the
    # best one left waits; its successor follows when it goes. Of two equals the one that came first goes first.
    heap: list[tuple[float, int, Sequence[Continuation[State]], int, int, float, int]] = []
    turn = 0

    def offer(siblings: Sequence[Continuation[State]], first: int, parent: int, path: float, depth: int) -> None:
        """The best of the siblings from the `first` on that may be a node comes into question."""
        nonlocal turn
        for place in range(first, min(len(siblings), width)):
            token, probability, favour, _ = siblings[place]
            if path * probability >= floor and 0 <= token < vocabulary:
                turn += 1
                heappush(heap, (-path * probability * favour, turn, siblings, place, parent, path, depth))
                return

    if budget.nodes > 0 and deepest > 0:
        found = expand(start)
        offer(scores.of(found, 1) if scored and found else found, 0, ROOT, 1.0, 1)
    while heap and len(tokens) < budget.nodes:
        _, _, siblings, place, parent, path, depth = heappop(heap)
        token, probability, _, state = siblings[place]
        tokens.append(token)
        parents.append(parent)
        logq.append(log(probability))
        offer(siblings, place + 1, parent, path, depth)
        if depth < deepest and len(tokens) < budget.nodes:
            found = expand(state)
            found = scores.of(found, depth + 1) if scored and found else found
            offer(found, 0, len(tokens) - 1, path * probability, depth + 1)
    order: Order = "deterministic" if context.noise is None else "shared_gumbel"
    return DraftTree(tuple(tokens), tuple(parents), order, logq=tuple(logq))


class _Scores:
    """The chance of each continuation, with the target's noise and the factor on scores."""

    def __init__(self, budget: TreeBudget, context: Context) -> None:
        self._noise, self._vocabulary = context.noise, context.vocabulary
        self._score_scale = budget.score_scale
        self._position = len(context.tokens) - 1  # of the root
        self._rows: list[Callable[[int], float]] = []  # the noise of a token, by depth

    def of(self, found: Sequence[Continuation[State]], depth: int) -> Sequence[Continuation[State]]:
        """With the chance of the highest score, of log p + noise, for their probabilities."""
        weights, unknown = [candidate[1] for candidate in found], max(0.0, 1.0 - sum([p for _, p, _, _ in found]))
        if self._noise is not None:
            while depth > len(self._rows):
                self._rows.append(_of_tokens(self._noise, self._position + len(self._rows) + 1))
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


def _of_tokens(noise: Noise, position: int) -> Callable[[int], float]:
    """What gives the noise of a token at a position."""
    if isinstance(noise, GumbelNoise):
        return noise.of(position)
    found: Callable[[int], float] = noise(position).numpy(force=True).item
    return found


def _merit(candidate: Continuation[State]) -> float:
    return -candidate[1] * candidate[2]
