"""The cascade of several drafters: asks one after the other until a tree promises enough accepted tokens."""

import math
from collections.abc import Sequence
from dataclasses import replace

from tiercache.draft.base import Drafter, Feedback, TreeBudget
from tiercache.draft.composite import CompositeDrafter
from tiercache.draft.tree import ROOT, DraftTree
from tiercache.errors import UsageError

_LATER = 1.5  # factor on what a later drafter's tree promises: the surer of two guesses is also the more overrated


class Cascade(CompositeDrafter):
    """Asks one drafter after the other until a draft tree promises enough accepted tokens.

    S2D (arXiv 2407.01955, section 3) hands over from a small drafter to a larger one in this way, SAM-Decoding (arXiv
    2411.10666, section 3.3) where its match is short. A tree promises as many accepted tokens as the probabilities of
    its nodes' paths sum up to, or its depth where its drafter gives no probabilities. If no tree promises enough, the
    one that promises most is taken. Where the budget says what is enough, a later drafter's promise counts for more.

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
        threshold = self._threshold if budget.enough is None else budget.enough
        later = 1.0 if budget.enough is None else _LATER
        best, most, self.passes = DraftTree(), 0.0, 0
        self._guesses.clear()
        for drafter in self.drafters:
            tree = drafter.propose(replace(budget, score_scale=drafter.score_scale.value))
            self.passes += drafter.passes
            self._guesses.append((drafter, tree))
            if len(tree) and (promised := expected_accepted(tree)) * later > most:
                best, most = tree, promised
            if most > threshold:
                break
        return best

    def observe(self, feedback: Feedback) -> None:
        """See `Drafter`. Every drafter's temperature scaling learns, also from trees that were not taken."""
        for drafter, tree in self._guesses:
            for confidence, came in tree.outcomes(feedback.emitted):
                drafter.score_scale.observe(confidence, came)
        self._guesses.clear()
        super().observe(feedback)


def expected_accepted(tree: DraftTree) -> float:
    """How many tokens of a tree are expected to be accepted; its depth where it has no probabilities."""
    if tree.logq is None:
        return float(max(tree.depths, default=0))
    paths: list[float] = []
    for parent, logq in zip(tree.parents, tree.logq, strict=True):
        paths.append((1.0 if parent == ROOT else paths[parent]) * math.exp(logq))
    return sum(paths)
