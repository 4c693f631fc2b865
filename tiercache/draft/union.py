"""The union of several drafters: asks all of them and merges their draft trees into one."""

import math
from collections.abc import Sequence
from dataclasses import replace

from tiercache.draft.base import Context, Drafter, Feedback, TreeBudget
from tiercache.draft.composite import CompositeDrafter
from tiercache.draft.tree import ROOT, DraftTree, Order
from tiercache.errors import DraftError

_FADING = 0.9  # the factor on the weight of earlier passes with each new one
_LEAST = 0.1  # the worst drafter gets at least this share of what the best one gets, so that it is still tried


class Union(CompositeDrafter):
    """Asks each of several drafters and merges their trees.

    A drafter's payoff is the share of its nodes that were accepted; recent passes count most. A drafter's share of the
    nodes follows its payoff. The better drafters are asked first, and the nodes that one leaves go to the next.

    Where drafters disagree about a node's probability, the most confident one is believed.

    Args:
        drafters: their trees carry no q; see `CompositeDrafter`.
    """

    name = "union"

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        super().__init__(drafters)
        self._proposed = [1.0] * len(drafters)
        self._true = [1.0] * len(drafters)
        self._merged = _MergedTree()

    def begin(self, context: Context) -> None:
        super().begin(context)
        self._merged = _MergedTree()

    def propose(self, budget: TreeBudget) -> DraftTree:
        """See `Drafter`.

        Raises:
            DraftError: a drafter draws its nodes, so that its tree carries q.
        """
        payoffs = [true / proposed for true, proposed in zip(self._true, self._proposed, strict=True)]
        least = max(_LEAST * max(payoffs), 1e-6)
        turns = sorted(range(len(payoffs)), key=lambda number: -payoffs[number])
        merged, left = _MergedTree(), budget.nodes
        self._merged = merged
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
        return merged.tree()

    def observe(self, feedback: Feedback) -> None:
        self._judge(feedback.emitted)
        super().observe(feedback)

    def _judge(self, emitted: Sequence[int]) -> None:
        """Update the payoffs by the merged tree; the verified tree may lack parts of it or have others."""
        came = self._merged.along(emitted)
        for number in range(len(self.drafters)):
            guessed = sum(number in owners for owners in self._merged.owners)
            if guessed:
                accepted = sum(number in self._merged.owners[node] for node in came)
                self._proposed[number] = _FADING * self._proposed[number] + guessed
                self._true[number] = _FADING * self._true[number] + accepted
        self._merged = _MergedTree()


class _MergedTree:
    """Several draft trees laid over one another; a path that several of them have occurs once.

    Attributes:
        tokens: of each node.
        owners: of each node, the numbers of the drafters that guessed it.
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._parents: list[int] = []
        self._logq: list[float] = []
        self.owners: list[set[int]] = []
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
                self.owners.append(set())
            self._logq[found] = max(self._logq[found], logq)
            self.owners[found].add(number)
            place[node] = found

    def along(self, emitted: Sequence[int]) -> list[int]:
        """The nodes that `emitted` leads through, as far as there are any."""
        path: list[int] = []
        for token in emitted:
            node = self._places.get((path[-1] if path else ROOT, token))
            if node is None:
                break
            path.append(node)
        return path

    def tree(self) -> DraftTree:
        """The merged tree; siblings on which the trees disagree share a probability of 1."""
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
        )
