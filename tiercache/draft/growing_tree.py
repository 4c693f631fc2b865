"""A draft tree while it grows: its nodes and scores, and whether another drafting pass may begin.

Knows scores and budgets; it does not know models, or which children a grower takes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from tiercache.draft.base import Context, TreeBudget
from tiercache.draft.tree import ROOT, DraftTree, Order


@dataclass
class GrowingTree:
    """A draft tree that still grows; its nodes keep their numbers.

    Attributes:
        tokens, parents: of each node, as in `DraftTree`.
        depths: of each node; children of the root have 1.
        steps: log confidence of each node given its parent.
        scores: log confidence of each node's whole path.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def depth(self, node: int) -> int:
        """Of `node`; the root has 0."""
        return 0 if node == ROOT else self.depths[node]

    def score(self, node: int) -> float:
        """Log confidence of `node`'s path; the root has 0."""
        return 0.0 if node == ROOT else self.scores[node]

    def path_tokens(self, node: int) -> list[int]:
        """The tokens from the root's successor to `node`."""
        tokens: list[int] = []
        while node != ROOT:
            tokens.append(self.tokens[node])
            node = self.parents[node]
        return tokens[::-1]

    def add(self, parent: int, token: int, step: float) -> int:
        """A new last child of `parent`."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depth(parent) + 1)
        self.steps.append(step)
        self.scores.append(self.score(parent) + step)
        return len(self.tokens) - 1

    def tree(self, order: Order, keep: Sequence[int] | None = None, q: dict[int, Tensor] | None = None) -> DraftTree:
        """The tree of the nodes in `keep` (ascending, with all of their ancestors), or of all; `q` is by parent."""
        tree = DraftTree(tuple(self.tokens), tuple(self.parents), order, q, tuple(self.steps))
        return tree if keep is None else tree.pruned(keep)


@dataclass(frozen=True)
class TokenCandidates:
    """The tokens that may follow each of some nodes, as a drafter scores them.

    Attributes:
        logq: log-probabilities [nodes, k], but for a constant of each node; -inf where there is nothing.
        tokens: their tokens [nodes, k], none twice in a row; None where the column is the token.
    """

    logq: Tensor
    tokens: Tensor | None = None


# Returns what follows each of some nodes (`ROOT` for the root). No node is asked for twice; its parent was asked for
# before. One call is one pass of the drafter.
Scorer = Callable[[GrowingTree, Sequence[int]], TokenCandidates]
# (scorer, context, budget) -> a tree within the budget and the context's room; without a call if that is empty.
Grower = Callable[[Scorer, Context, TreeBudget], DraftTree]


@dataclass(frozen=True)
class Siblings:
    """Children to be of a node, the best or first drawn first.

    Attributes:
        parent: the node.
        tokens, steps: of each child; see `GrowingTree`.
        perturbed: log q + Gumbel noise of each, where they were drawn.
    """

    parent: int
    tokens: list[int]
    steps: list[float]
    perturbed: list[float] = field(default_factory=list)


class PassBudget:
    """Decides whether another drafting pass may begin.

    Attributes:
        depth: of the deepest node that there may be; 0 for an empty tree. No more passes than this are useful.
    """

    def __init__(self, context: Context, budget: TreeBudget) -> None:
        self.depth = max(0, min(budget.depth, context.room - 1)) if min(budget.nodes, budget.width) > 0 else 0
        self._done = 0
        self._least = safe_log(budget.grow_floor)

    def another(self, score: float) -> bool:
        """Whether one more pass may begin and is worth it for a likeliest node of this score; counts it."""
        self._done += 1
        return self._done <= self.depth and score >= self._least


def within(candidates: TokenCandidates, vocabulary: int) -> tuple[Tensor, Tensor | None]:
    """(logq, tokens) with no token outside the vocabulary."""
    logq, tokens = candidates.logq.float(), candidates.tokens
    if tokens is None:
        return logq[:, :vocabulary], None
    outside = (tokens < 0) | (tokens >= vocabulary)
    return logq.masked_fill(outside, -math.inf), tokens.masked_fill(outside, 0)


def siblings_of(nodes: Sequence[int], tokens: Tensor, steps: Tensor, perturbed: Tensor | None = None) -> list[Siblings]:
    """The children of each of `nodes`, from rows of tokens and scores; -inf marks what is no candidate."""
    highs = [[]] * len(nodes) if perturbed is None else perturbed.tolist()
    found = []
    for node, names, logs, high in zip(nodes, tokens.tolist(), steps.tolist(), highs, strict=True):
        count = sum(step > -math.inf for step in logs)  # the best come first, NaN is none
        found.append(Siblings(node, names[:count], logs[:count], high[:count]))
    return found


def safe_log(probability: float) -> float:
    """Natural, -inf for 0."""
    return math.log(probability) if probability > 0 else -math.inf
