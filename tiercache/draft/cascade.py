"""The cascade of several drafters: asks one after the other until one is sure enough.

It knows drafters by their protocol only.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from tiercache.draft.base import Drafter, Feedback, TreeBudget
from tiercache.draft.composite import CompositeDrafter
from tiercache.draft.tree import ROOT, DraftTree
from tiercache.errors import UsageError

_LATER = 1.5  # a later drafter must be this much surer: of two guesses the surer one is also the more overrated


class Cascade(CompositeDrafter):
    """Asks one drafter after the other until one is sure enough.

    S2D (arXiv 2407.01955, section 3) hands over from a small drafter to a larger one so, and SAM-Decoding (arXiv
    2411.10666, section 3.3) where its match is short. Sureness is the number of tokens that a tree expects to see
    accepted, the sum of its nodes' path probabilities; where a drafter gives none, its tree's depth. If none is sure
    enough, the surest tree is taken; where the budget says what is enough, an earlier drafter's must be much surer.

    Args:
        drafters: the cheapest first; see `CompositeDrafter`.
        threshold: expected tokens that are enough, where the budget does not say.

    Raises:
        UsageError: `threshold` is negative; or as `CompositeDrafter` says.
    """

    name = "cascade"

    def __init__(self, drafters: Sequence[Drafter], threshold: float = 1.0) -> None:
        super().__init__(drafters)
        if not threshold >= 0:
            raise UsageError(f"a cascade with threshold {threshold}; give expected tokens, 0 or more")
        self._threshold = threshold
        self._guesses: list[tuple[Drafter, DraftTree]] = []

    def propose(self, budget: TreeBudget) -> DraftTree:
        """See `Drafter`."""
        threshold = self._threshold if budget.enough is None else budget.enough
        later = 1.0 if budget.enough is None else _LATER
        best, surest, self.passes = DraftTree(), 0.0, 0
        self._guesses.clear()
        for drafter in self.drafters:
            tree = drafter.propose(replace(budget, score_scale=drafter.score_scale.value))
            self.passes += drafter.passes
            self._guesses.append((drafter, tree))
            if len(tree) and (sureness := expected(tree)) * later > surest:
                best, surest = tree, sureness
            if surest > threshold:
                break
        return best

    def observe(self, feedback: Feedback) -> None:
        """See `Drafter`. How sure a drafter is to be believed is learnt from its trees that were not taken, too."""
        for drafter, tree in self._guesses:
            for confidence, came in tree.outcomes(feedback.emitted):
                drafter.score_scale.observe(confidence, came)
        self._guesses.clear()
        super().observe(feedback)


def expected(tree: DraftTree) -> float:
    """Tokens that a tree expects to see accepted; its depth where it has no probabilities."""
    if tree.logq is None:
        return float(max(tree.depths, default=0))
    paths: list[float] = []
    for parent, logq in zip(tree.parents, tree.logq, strict=True):
        paths.append((1.0 if parent == ROOT else paths[parent]) * math.exp(logq))
    return sum(paths)
