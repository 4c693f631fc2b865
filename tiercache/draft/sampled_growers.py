"""Grows draft trees whose children are drawn without replacement, by the drafter's own random numbers.

What was drawn may decide whether it gets children or is followed by a sibling, never whether it is kept itself: that
would change the distribution that it was drawn from.

Knows scores and trees; it does not know models, or how the scores come about.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tiercache.draft.base import Context, TreeBudget
from tiercache.draft.growing_tree import (
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
from tiercache.draft.tree import ROOT, DraftTree


class ParentDistributions:
    """Whole distributions [vocabulary] that children were drawn from, by parent."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self._rows: dict[int, Tensor] = {}

    def add(self, nodes: Sequence[int], rows: Tensor, tokens: Tensor | None) -> None:
        """Take probabilities [nodes, k] of `tokens` [nodes, k], or of the columns where that is None."""
        if tokens is not None or rows.shape[1] < self.vocabulary:
            whole = rows.new_zeros(len(nodes), self.vocabulary)
            if tokens is None:
                whole[:, : rows.shape[1]] = rows
            else:
                whole.scatter_add_(1, tokens, rows)
            rows = whole
        self._rows.update(zip(nodes, rows, strict=True))

    def of(self, growing: GrowingTree) -> dict[int, Tensor]:
        """Of the parents that got children."""
        return {parent: self._rows[parent] for parent in set(growing.parents)}


class Draws:
    """A drafter's own random numbers: draws children without replacement by the Gumbel-top-k trick (arXiv 1903.06059).

    The numbers go on from tree to tree. If they began anew with each sequence, the answers to one prompt would all
    have been offered the same drafts, and would not be independent.

    Args:
        seed: as in `seed`.
    """

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator()
        self.seed(seed)

    def seed(self, seed: int) -> None:
        """Begin anew; not with the numbers of a generator that a verifier has seeded with the same."""
        digest = hashlib.blake2b(f"drafts {seed}".encode(), digest_size=8).digest()
        self._generator.manual_seed(int.from_bytes(digest) >> 1)

    def __call__(
        self, nodes: Sequence[int], candidates: TokenCandidates, count: int, q: ParentDistributions
    ) -> list[Siblings]:
        """At most `count` children of each of `nodes`; what they were drawn from goes to `q`."""
        logq, tokens = within(candidates, q.vocabulary)
        rows = torch.softmax(logq, -1).nan_to_num_(0.0)  # NaN where a node has no candidates
        logq = rows.log()  # of the very numbers that the verifier will be given
        chance = torch.empty(logq.shape).exponential_(generator=self._generator).to(logq.device)
        best, index = row_topk(logq - chance.log_(), min(count, logq.shape[1]))
        q.add(nodes, rows, tokens)
        return siblings_of(nodes, index if tokens is None else tokens.gather(1, index), logq.gather(1, index), best)


class Branching:
    """A number of children for every node of a depth, drawn without replacement (RSD-C, arXiv 2402.14160, section 3.1).

    Args:
        seed: of the drafter's own random numbers, until a request's seed replaces it (see `Draws`).
        branching: children of each node, by depth of the node; 1 beyond. Empty for as many at every depth as leave
            each of them a whole chain.
    """

    def __init__(self, seed: int = 0, branching: Sequence[int] = ()) -> None:
        self.draws, self._branching = Draws(seed), tuple(branching)

    def __call__(self, scorer: Scorer, context: Context, budget: TreeBudget) -> DraftTree:
        passes = PassBudget(context, budget)
        growing, q = GrowingTree(), ParentDistributions(context.vocabulary)
        frontier = [ROOT]
        for level in range(passes.depth):
            likely = (node for node in frontier if growing.score(node) >= safe_log(budget.floor))
            nodes = heapq.nlargest(budget.width, likely, key=growing.score)
            room = budget.nodes - len(growing.tokens)
            if not nodes or room < 1 or not passes.another(growing.score(nodes[0])):
                break
            count = min(room, self._count(level, room // (passes.depth - level) // len(nodes), budget.width))
            nodes = nodes[: room // count]
            drawn = self.draws(nodes, scorer(growing, nodes), count, q)
            frontier = [
                growing.add(siblings.parent, *child)
                for siblings in drawn
                for child in zip(siblings.tokens, siblings.steps, strict=True)
            ]
        return growing.tree("without_replacement", q=q.of(growing))

    def _count(self, level: int, fair: int, width: int) -> int:
        """Children of each node of a depth; `fair` many leave deeper ones as much."""
        if self._branching:
            return min(self._branching[level] if level < len(self._branching) else 1, width)
        return min(max(1, fair), width)


class StochasticBeam:
    """Draws whole paths without replacement, some at each depth (RSD-S, arXiv 2402.14160, section 3.2).

    Each path has a perturbed score; those of its children are drawn such that the highest of them is its own
    (stochastic beam search, arXiv 1903.06059, section 4.1), and the highest of a depth are kept. Siblings lie in the
    order of their scores, in which they were drawn; whether one more is kept depends on what was drawn before it, not
    on what it is, so that each is drawn from q.

    Args:
        seed: of the drafter's own random numbers, until a request's seed replaces it (see `Draws`).
    """

    def __init__(self, seed: int = 0) -> None:
        self.draws = Draws(seed)

    def __call__(self, scorer: Scorer, context: Context, budget: TreeBudget) -> DraftTree:
        passes = PassBudget(context, budget)
        growing, q = GrowingTree(), ParentDistributions(context.vocabulary)
        beam = max(1, min(budget.width, budget.nodes // max(1, passes.depth)))
        frontier: dict[int, float] = {ROOT: 0.0}  # perturbed scores
        while frontier and len(growing.tokens) < budget.nodes:
            nodes = [node for node in frontier if growing.score(node) >= safe_log(budget.floor)]
            if not nodes or not passes.another(max(map(growing.score, nodes))):
                break
            drawn = self.draws(nodes, scorer(growing, nodes), beam, q)
            found: list[tuple[float, int, Siblings, int]] = []  # (-perturbed score, place, whose child, which)
            for siblings in drawn:
                highs = _conditioned(frontier[siblings.parent], growing.score(siblings.parent), siblings.perturbed)
                found += [(-high, len(found) + which, siblings, which) for which, high in enumerate(highs)]
            best = heapq.nsmallest(min(beam, budget.nodes - len(growing.tokens)), found)
            frontier = {growing.add(s.parent, s.tokens[which], s.steps[which]): -low for low, _, s, which in best}
        return growing.tree("without_replacement", q=q.of(growing))


def _conditioned(high: float, score: float, perturbed: Sequence[float]) -> list[float]:
    """Perturbed scores of siblings, given that the highest is `high` (arXiv 1903.06059, appendix B.3).

    Args:
        high: perturbed score of the parent.
        score: log-probability of the parent's path.
        perturbed: log q + Gumbel noise of each sibling, highest first.
    """
    highs: list[float] = []
    for value in perturbed:
        gap = value - perturbed[0]  # none above 0
        v = high - (score + value) + (math.log(-math.expm1(gap)) if gap < 0 else -math.inf)
        highs.append(high - max(0.0, v) - math.log1p(math.exp(-abs(v))))
    return highs
