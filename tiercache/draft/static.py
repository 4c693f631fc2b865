"""Finds the tree shape with the most accepted nodes, from the acceptance rate of each rank of child (Sequoia).

A child's rank is its place among its siblings. This module knows ranks and rates; it does not know tokens.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from policies.isotonic import ascending
from tiercache.draft.tree import ROOT, DraftTree
from tiercache.errors import UsageError


@dataclass(frozen=True)
class Template:
    """A tree without tokens.

    Attributes:
        parents: of each node, parents first; `ROOT` for children of the root.
        ranks: of each node among its siblings; the first has 0.
        value: expected accepted nodes.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]
    value: float


class RankRates:
    """How often the child of a rank is accepted, given that its parent is: Sequoia's acceptance vector.

    Args:
        prior: rates believed before anything was seen, by rank.
        weight: observations that the prior counts for.

    Raises:
        UsageError: a rate outside [0, 1], rates that rise with the rank, or a weight that is not above 0.
    """

    def __init__(self, prior: Sequence[float] = (0.6, 0.15, 0.07, 0.04, 0.025, 0.02, 0.015, 0.01), weight: float = 8.0):
        _check(prior)
        if not weight > 0:
            raise UsageError(f"the prior of the rates counts for {weight} observations; give it more than 0")
        self._prior, self._weight = tuple(prior), weight
        self._tried, self._accepted = [0] * len(prior), [0] * len(prior)

    def observe(self, tree: DraftTree, path: Sequence[int]) -> None:
        """Count a verified tree, whose accepted nodes are `path`."""
        taken = set(path)
        for parent in (ROOT, *path):
            for rank, child in enumerate(tree.children.get(parent, ())[: len(self._tried)]):
                self._tried[rank] += 1
                self._accepted[rank] += child in taken

    def __call__(self) -> tuple[float, ...]:
        """The rates by rank; ranks that are accepted more often than those before them share one with them."""
        weights = [self._weight + tried for tried in self._tried]
        rates = [
            (self._weight * prior + accepted) / weight
            for prior, accepted, weight in zip(self._prior, self._accepted, weights, strict=True)
        ]
        return tuple(ascending(rates[::-1], weights[::-1])[::-1].tolist())


def best_template(rates: Sequence[float], nodes: int, depth: int, width: int) -> Template:
    """The tree of at most `nodes` nodes of which most are accepted, if the child of rank b is with rate `rates[b]`.

    The expectation is the sum over nodes of the product of the rates on their paths (Sequoia, arXiv 2402.12374,
    section 3.1). Sequoia finds the best tree by dynamic programming over nodes, depth and children; where the rates
    do not rise with the rank, no node is worth more than its parent or its elder sibling, so that taking the worthiest
    nodes one after another is a tree and finds the same in nodes * log(nodes) steps.

    Args:
        rates: by rank.
        nodes, depth: at most.
        width: nodes of one depth that may have children, at most, and children of a node.

    Raises:
        UsageError: a rate outside [0, 1], or rates that rise with the rank.
    """
    _check(rates)
    taken: list[tuple[int, int, int]] = []  # (parent, rank, depth)
    open_: list[tuple[float, int, int, int, int]] = []  # (-worth, order of arrival, parent, rank, depth)
    value, arrivals, parents_at = 0.0, 0, [0] * (depth + 1)
    if depth > 0 and min(len(rates), width) > 0:
        open_.append((-rates[0], 0, ROOT, 0, 1))
    while open_ and len(taken) < nodes:
        negative, _, parent, rank, level = heapq.heappop(open_)
        if negative == 0:
            break
        if rank == 0:
            if parents_at[level - 1] == width:
                continue
            parents_at[level - 1] += 1
        node, value = len(taken), value - negative
        taken.append((parent, rank, level))
        if level < depth:
            arrivals += 1
            heapq.heappush(open_, (negative * rates[0], arrivals, node, 0, level + 1))
        if rank + 1 < min(len(rates), width):
            worth = negative * rates[rank + 1] / rates[rank]
            arrivals += 1
            heapq.heappush(open_, (worth, arrivals, parent, rank + 1, level))
    return Template(tuple(parent for parent, _, _ in taken), tuple(rank for _, rank, _ in taken), value)


def _check(rates: Sequence[float]) -> None:
    if not all(0 <= rate <= 1 for rate in rates) or not all(a >= b for a, b in pairwise(rates)):
        shown = ", ".join(f"{rate:.3g}" for rate in rates)
        raise UsageError(f"acceptance by rank is {shown}; give rates within [0, 1] that do not rise")
