"""Drafters of several drafters: all of them at once, the first that is sure, and the usual n-grams.

Knows drafters by their contract only, and the n-gram drafters that `Ngrams` is made of.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from tiercache.draft.base import BaseDrafter, Context, Drafter, DrafterRequirements, Feedback, TreeBudget, joined
from tiercache.draft.ngram.learned import Learned
from tiercache.draft.ngram.recycling import TokenRecycling
from tiercache.draft.ngram.suffix import SuffixAutomaton
from tiercache.draft.ngram.trigram import AdaptiveTrigram
from tiercache.draft.tree import ROOT, DraftTree, Order
from tiercache.errors import DraftError, UsageError

_FADING = 0.9  # what a pass leaves of the weight of those before it
_LEAST = 0.1  # a share of the nodes, as a part of the best drafter's, that the worst one is still tried with
_LATER = 1.5  # times as sure counts a drafter asked later: of two guesses the surer one is also the more overrated


class Several(BaseDrafter):
    """What is the same for any drafter of several: each is told everything.

    Args:
        drafters: at least one; closed with this one.

    Raises:
        UsageError: there is none, or they are for different vocabularies.
    """

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if not drafters:
            raise UsageError("a combination of no drafters; give one at least")
        self.drafters = tuple(drafters)
        self.needs = _joint([drafter.needs for drafter in drafters])
        self.open_ended = all(drafter.open_ended for drafter in drafters)
        self.tables = all(drafter.tables for drafter in drafters)

    def begin(self, context: Context) -> None:
        """See `Drafter`."""
        super().begin(context)
        for drafter in self.drafters:
            drafter.begin(context)

    def observe(self, feedback: Feedback) -> None:
        """See `Drafter`; each sees the whole tree."""
        for drafter in self.drafters:
            drafter.observe(feedback)

    def close(self) -> None:
        """See `Drafter`; all are closed, whatever one raises."""
        with ExitStack() as stack:
            for drafter in self.drafters:
                stack.callback(drafter.close)


class Union(Several):
    """Asks each of several drafters and merges their trees; nodes are shared out by what each drafter's were good for.

    A drafter's payoff is how many of the nodes that it guessed came true, by node, recent passes counting most. The
    better ones are asked first, and what one leaves of its nodes goes to the next.

    Each node's `owners` has the bit of the number of every drafter that guessed it. Where drafters disagree about a
    node's probability, the most confident one is believed.

    Args:
        drafters: of trees without q; see `Several`.
    """

    name = "union"

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        super().__init__(drafters)
        self._proposed = [1.0] * len(drafters)
        self._true = [1.0] * len(drafters)
        self._tree = DraftTree()

    def begin(self, context: Context) -> None:
        """See `Drafter`."""
        super().begin(context)
        self._tree = DraftTree()

    def propose(self, budget: TreeBudget) -> DraftTree:
        """See `Drafter`.

        Raises:
            DraftError: a drafter draws its nodes, so that its tree carries q.
        """
        payoffs = [true / proposed for true, proposed in zip(self._true, self._proposed, strict=True)]
        least = max(_LEAST * max(payoffs), 1e-6)
        turns = sorted(range(len(payoffs)), key=lambda number: -payoffs[number])
        merged, left = _Merged(), budget.nodes
        self.passes = 0
        for place, number in enumerate(turns):
            shares = [max(payoffs[other], least) for other in turns[place:]]
            nodes = math.ceil(left * shares[0] / sum(shares))
            if not nodes:
                break
            tree = self.drafters[number].propose(replace(budget, nodes=nodes))
            merged.add(tree, number)
            left = budget.nodes - len(merged.tokens)
            self.passes += self.drafters[number].passes
        self._tree = merged.tree()
        return self._tree

    def observe(self, feedback: Feedback) -> None:
        """See `Drafter`."""
        self._judge(feedback.emitted)
        super().observe(feedback)

    def _judge(self, emitted: Sequence[int]) -> None:
        """By the tree that was merged here: of what was verified, others may have cut or added parts."""
        tree, owners = self._tree, self._tree.owners
        if not owners:
            return
        came = [owners[node] for node in tree.along(emitted)]
        for number in range(len(self.drafters)):
            bit = 1 << number
            guessed = sum(1 for owner in owners if owner & bit)
            if guessed:
                self._proposed[number] = _FADING * self._proposed[number] + guessed
                self._true[number] = _FADING * self._true[number] + sum(1 for owner in came if owner & bit)
        self._tree = DraftTree()


class Cascade(Several):
    """Asks one drafter after the other until one is sure enough.

    S2D (arXiv 2407.01955, section 3) hands over from a small drafter to a larger one so, and SAM-Decoding (arXiv
    2411.10666, section 3.3) where its match is short. Sureness is the number of tokens that a tree expects to see
    accepted, the sum of its nodes' path probabilities; where a drafter gives none, its tree's depth. If none is sure
    enough, the surest tree is taken; where the budget says what is enough, an earlier drafter's must be much surer.

    Args:
        drafters: the cheapest first; see `Several`.
        threshold: expected tokens that are enough, where the budget does not say.

    Raises:
        UsageError: `threshold` is negative; or as `Several` says.
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


class Ngrams(Union):
    """The usual drafters without weights: suffix automaton, token recycling, adaptive tri-gram, learned tables.

    Args:
        vocabulary: of the target.
        identity: of its tokenizer or model, for learned tables.
        folder: of the learned tables; there are none without it.
        limit: tokens of text that the suffix automaton keeps.
        slots: pairs that the tri-gram table holds.

    Raises:
        StoreError, EnvironmentUnsupportedError, UsageError: as these drafters say.
    """

    name = "ngram"

    def __init__(
        self,
        vocabulary: int,
        identity: str,
        *,
        folder: Path | None = None,
        limit: int = 1 << 14,
        slots: int = 1 << 15,
    ) -> None:
        drafters: list[Drafter] = [
            SuffixAutomaton(limit=limit),
            AdaptiveTrigram(vocabulary, slots=slots),
            TokenRecycling(vocabulary),
        ]
        if folder is not None:
            drafters.append(Learned(folder, identity=identity, vocabulary=vocabulary))
        super().__init__(drafters)


def expected(tree: DraftTree) -> float:
    """Tokens that a tree expects to see accepted; its depth where it has no probabilities."""
    if tree.logq is None:
        return float(max(tree.depths, default=0))
    paths: list[float] = []
    for parent, logq in zip(tree.parents, tree.logq, strict=True):
        paths.append((1.0 if parent == ROOT else paths[parent]) * math.exp(logq))
    return sum(paths)


class _Merged:
    """Trees laid over one another: a path that several of them have is there once."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._parents: list[int] = []
        self._logq: list[float] = []
        self._owners: list[int] = []
        self._places: dict[tuple[int, int], int] = {}  # of a node, by its parent and token
        self._orders: set[Order] = set()
        self._scored = True

    def add(self, tree: DraftTree, number: int) -> None:
        """Lay a drafter's tree over the others."""
        if not len(tree):
            return
        if tree.q is not None:
            raise DraftError(f"drafter {number} of a union draws its nodes; let it choose them by score instead")
        self._orders.add(tree.order)
        self._scored = self._scored and tree.logq is not None
        place = {ROOT: ROOT}
        logqs = tree.logq or [0.0] * len(tree)
        for node, (token, parent, logq) in enumerate(zip(tree.tokens, tree.parents, logqs, strict=True)):
            key = place[parent], token
            found = self._places.setdefault(key, len(self.tokens))
            if found == len(self.tokens):
                self.tokens.append(token)
                self._parents.append(key[0])
                self._logq.append(logq)
                self._owners.append(0)
            self._logq[found] = max(self._logq[found], logq)
            self._owners[found] |= 1 << number
            place[node] = found

    def tree(self) -> DraftTree:
        """All of them together; siblings on which the trees disagree share a probability of 1."""
        shares: dict[int, float] = {}
        for parent, logq in zip(self._parents, self._logq, strict=True):
            shares[parent] = shares.get(parent, 0.0) + math.exp(logq)
        logqs = zip(self._parents, self._logq, strict=True)
        self._logq = [logq - math.log(max(1.0, shares[parent])) for parent, logq in logqs]
        return DraftTree(
            tuple(self.tokens),
            tuple(self._parents),
            "shared_gumbel" if self._orders == {"shared_gumbel"} else "deterministic",
            logq=tuple(self._logq) if self._scored else None,
            owners=tuple(self._owners),
        )


def _joint(needs: Sequence[DrafterRequirements]) -> DrafterRequirements:
    vocabularies = {need.vocabulary for need in needs if need.vocabulary is not None}
    if len(vocabularies) > 1:
        raise UsageError(f"drafters of {sorted(vocabularies)} tokens in one; they must share a vocabulary")
    vocabulary = next(iter(vocabularies), None)
    return replace(joined(needs), vocabulary=vocabulary, node_bytes=sum(need.node_bytes for need in needs))
