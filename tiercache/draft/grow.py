"""Grows draft trees from any drafter's scores.

Growers that rank take the children that are likeliest to be accepted. Growers that draw take them at random, for the
verification rule that needs it. A ranking grower that is told the target's noise adds it to its own scores, for the
target's token is the argmax of such a sum.

Knows scores and trees; it does not know models, or how the scores come about.
"""

import heapq
import math
from collections.abc import Callable, Sequence

import torch

from tiercache.draft.base import Context, TreeBudget
from tiercache.draft.growing_tree import (
    Grower,
    GrowingTree,
    PassBudget,
    Scorer,
    Siblings,
    TokenCandidates,
    safe_log,
    siblings_of,
    within,
)
from tiercache.draft.row_topk import row_topk
from tiercache.draft.sampled_growers import Branching, StochasticBeam
from tiercache.draft.static import RankRates, best_template
from tiercache.draft.tree import ROOT, DraftTree
from tiercache.errors import UsageError

_RIDES = 0.4  # a further node in a drafting pass costs this share of the pass


def grower(name: str) -> Grower:
    """The grower of a name, one for each drafter, for it may keep state.

    Raises:
        UsageError: no grower has this name.
    """
    if name not in _GROWERS:
        raise UsageError(f"unknown grower {name!r}; choose one of {', '.join(_GROWERS)}")
    return _GROWERS[name]()


class Ranked:
    """Expands the likeliest nodes and keeps the budget's likeliest of all that were seen.

    The budget's width is how many nodes one pass expands, and how many children each gets; there are no more passes
    than the tree may have depths, so none of the deepest is expanded. A node is never likelier than its parent, so
    what is kept is a tree.

    Args:
        by_depth: expand nodes of the deepest level only (EAGLE-2, arXiv 2406.16858, section 4), instead of the
            likeliest of any depth (SpecExec, arXiv 2406.02532, algorithm 2). The latter finds the likeliest tree of
            all, if the width does not bind.
    """

    def __init__(self, *, by_depth: bool) -> None:
        self._by_depth = by_depth

    def __call__(self, scorer: Scorer, context: Context, budget: TreeBudget) -> DraftTree:
        passes = PassBudget(context, budget)
        growing = GrowingTree()
        kept: list[float] = []  # scores of the likeliest nodes, a heap whose first is the least
        open_: list[tuple[float, int]] = [(0.0, ROOT)]  # (-score, node), a heap
        while (nodes := self._frontier(open_, kept, budget)) and passes.another(growing.score(nodes[0])):
            if self._by_depth:
                open_.clear()
            for siblings in _ranked(growing, nodes, scorer(growing, nodes), context, budget.width, budget.score_scale):
                above = growing.score(siblings.parent)
                for token, step in zip(siblings.tokens, siblings.steps, strict=True):
                    score = above + step
                    if len(kept) < budget.nodes:
                        heapq.heappush(kept, score)
                    elif score > kept[0]:
                        heapq.heapreplace(kept, score)
                    else:
                        break  # its younger siblings are no likelier
                    heapq.heappush(open_, (-score, growing.add(siblings.parent, token, step)))
        return _likeliest(growing, context, budget)

    @staticmethod
    def _frontier(open_: list[tuple[float, int]], kept: list[float], budget: TreeBudget) -> list[int]:
        """The likeliest nodes to expand, likeliest first, of those whose children may be kept."""
        least = kept[0] if kept and len(kept) == budget.nodes else -math.inf
        least = max(least, safe_log(budget.floor))
        nodes: list[int] = []
        while open_ and len(nodes) < budget.width and -open_[0][0] >= least:
            nodes.append(heapq.heappop(open_)[1])
            least = max(least, safe_log(_RIDES * budget.grow_floor))
        return nodes


class Static:
    """The tree of most accepted nodes for an acceptance by rank, filled depth by depth (Sequoia, arXiv 2402.12374).

    Attributes:
        rates: acceptance by rank; observe it, and the next tree follows.
    """

    def __init__(self) -> None:
        self.rates = RankRates()
        self._last: tuple[tuple[object, ...], tuple[int, ...]] | None = None  # of which budget, and its tree's parents

    def __call__(self, scorer: Scorer, context: Context, budget: TreeBudget) -> DraftTree:
        passes = PassBudget(context, budget)
        children = self._children(budget, passes.depth)
        growing = GrowingTree()
        frontier = {ROOT: ROOT}  # nodes with children to come, and which of the template's each is
        while frontier:
            nodes = [node for node in frontier if growing.score(node) >= safe_log(budget.floor)]
            wanted = [children.get(frontier[node], []) for node in nodes]
            most = max(map(len, wanted), default=0)
            if not most or not passes.another(max(map(growing.score, nodes))):
                break
            found = _ranked(growing, nodes, scorer(growing, nodes), context, most, budget.score_scale)
            below: dict[int, int] = {}
            for siblings, places in zip(found, wanted, strict=True):
                for token, step, place in zip(siblings.tokens, siblings.steps, places, strict=False):
                    node = growing.add(siblings.parent, token, step)
                    if place in children:
                        below[node] = place
            frontier = below
        return _likeliest(growing, context, budget)

    def _children(self, budget: TreeBudget, depth: int) -> dict[int, list[int]]:
        rates = self.rates()
        key = (rates, budget.nodes, depth, budget.width)
        if self._last is None or self._last[0] != key:
            self._last = key, best_template(rates, budget.nodes, depth, budget.width)
        children: dict[int, list[int]] = {}
        for place, parent in enumerate(self._last[1]):
            children.setdefault(parent, []).append(place)
        return children


def _ranked(
    growing: GrowingTree,
    nodes: Sequence[int],
    candidates: TokenCandidates,
    context: Context,
    count: int,
    score_scale: float,
) -> list[Siblings]:
    """The best `count` children of each node."""
    z, tokens = within(candidates, context.vocabulary)
    if context.noise is not None:
        positions = [len(context.tokens) + growing.depth(node) for node in nodes]
        noise = {position: context.noise(position).to(z.device) for position in set(positions)}
        rows = torch.stack([noise[position] for position in positions])
        z = z + (rows[:, : z.shape[1]] if tokens is None else rows.gather(1, tokens))
    z = z if score_scale == 1 else z * score_scale
    _, index = row_topk(z, min(count, z.shape[1]))
    # The log of the probability that a token is the one the target takes; not above 0, not even by rounding.
    steps = torch.log_softmax(z, -1).gather(1, index).clamp_(max=0.0)
    return siblings_of(nodes, index if tokens is None else tokens.gather(1, index), steps)


def _likeliest(growing: GrowingTree, context: Context, budget: TreeBudget) -> DraftTree:
    """The tree of the likeliest nodes that are worth verifying, or of the likeliest alone."""
    likeliest = sorted(range(len(growing.tokens)), key=lambda node: (-growing.scores[node], node))[: budget.nodes]
    kept = [node for node in likeliest if growing.scores[node] >= safe_log(budget.floor)] or likeliest[:1]
    return growing.tree("deterministic" if context.noise is None else "shared_gumbel", sorted(kept))


_GROWERS: dict[str, Callable[[], Grower]] = {
    "best-first": lambda: Ranked(by_depth=False),
    "fixed-width": lambda: Ranked(by_depth=True),
    "rsd-c": Branching,
    "rsd-s": StochasticBeam,
    "sequoia": Static,
}
