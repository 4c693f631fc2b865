"""Finds the tree shape with the most accepted nodes, from the acceptance rate of each rank of child (Sequoia).

A child's rank is its place among its siblings. This module knows ranks and rates; it does not know tokens.
"""

import heapq
from collections.abc import Sequence

from policies.isotonic import ascending
from tiercache.draft.tree import ROOT, DraftTree

# Rates by rank that are assumed before anything was seen, and how many observations they count for.
_PRIOR = (0.6, 0.15, 0.07, 0.04, 0.025, 0.02, 0.015, 0.01)
_PRIOR_WEIGHT = 8.0


class RankRates:
    """How often the child of a rank is accepted, given that its parent is: Sequoia's acceptance vector."""

    def __init__(self) -> None:
        self._tried, self._accepted = [0] * len(_PRIOR), [0] * len(_PRIOR)

    def observe(self, tree: DraftTree, path: Sequence[int]) -> None:
        """Count a verified tree, whose accepted nodes are `path`."""
        taken = set(path)
        for parent in (ROOT, *path):
            for rank, child in enumerate(tree.children.get(parent, ())[: len(self._tried)]):
                self._tried[rank] += 1
                self._accepted[rank] += child in taken

    def __call__(self) -> tuple[float, ...]:
        """The rates by rank; ranks that are accepted more often than those before them share one with them."""
        weights = [_PRIOR_WEIGHT + tried for tried in self._tried]
        rates = [
            (_PRIOR_WEIGHT * prior + accepted) / weight
            for prior, accepted, weight in zip(_PRIOR, self._accepted, weights, strict=True)
        ]
        return tuple(ascending(rates[::-1], weights[::-1])[::-1].tolist())


def best_template(rates: Sequence[float], nodes: int, depth: int, width: int) -> tuple[int, ...]:
    """The tree of at most `nodes` nodes of which most are accepted, if the child of rank b is with rate `rates[b]`.

    Returns the parent of each node: parents come before children, siblings by rank.

    The expectation is the sum over nodes of the product of the rates on their paths (Sequoia, arXiv 2402.12374,
    section 3.1). Sequoia finds the best tree by dynamic programming over nodes, depth and children; where the rates
    do not rise with the rank, no node is worth more than its parent or its elder sibling, so that taking the worthiest
    nodes one after another is a tree and finds the same in nodes * log(nodes) steps.

    Args:
        rates: by rank, within [0, 1]; none is higher than the one before.
        nodes, depth: at most.
        width: nodes of one depth that may have children, at most, and children of a node.
    """
    parents: list[int] = []
    open_: list[tuple[float, int, int, int, int]] = []  # (-worth, order of arrival, parent, rank, depth)
    arrivals, parents_at = 0, [0] * (depth + 1)
    if depth > 0 and min(len(rates), width) > 0:
        open_.append((-rates[0], 0, ROOT, 0, 1))
    while open_ and len(parents) < nodes:
        negative, _, parent, rank, level = heapq.heappop(open_)
        if negative == 0:
            break
        if rank == 0:
            if parents_at[level - 1] == width:
                continue
            parents_at[level - 1] += 1
        parents.append(parent)
        if level < depth:
            arrivals += 1
            heapq.heappush(open_, (negative * rates[0], arrivals, len(parents) - 1, 0, level + 1))
        if rank + 1 < min(len(rates), width):
            worth = negative * rates[rank + 1] / rates[rank]
            arrivals += 1
            heapq.heappush(open_, (worth, arrivals, parent, rank + 1, level))
    return tuple(parents)
