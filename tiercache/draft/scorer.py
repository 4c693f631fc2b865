"""Scores what may follow the nodes of a growing draft tree, by passes of a language model.

Knows a model's `TreeRun` and growing trees; it does not know whose model it is, or how trees grow.
"""

from collections.abc import Sequence

import torch

from tiercache.draft.base import Context
from tiercache.draft.growing_tree import GrowingTree, TokenCandidates
from tiercache.draft.tree import ROOT
from tiercache.kv.tree_pass import TreeRun


class RunScorer:
    """A `Scorer`: each call is one pass of the model over the nodes asked for.

    Args:
        run: the model; its committed tip is the root where `root` is given, else what comes before the root.
        context: the sequence.
        root: logits after the root [1, outputs]; None where the root is still to be run, as the first of the nodes.
        vocabulary: the token of each output [outputs], where they are not all tokens in order.
    """

    def __init__(
        self,
        run: TreeRun,
        context: Context,
        root: torch.Tensor | None = None,
        vocabulary: torch.Tensor | None = None,
    ) -> None:
        self._run, self._context, self._root, self._vocabulary = run, context, root, vocabulary
        self._tip = 0 if root is None else ROOT  # where the root is among the run's nodes
        self._places: dict[int, int] = {}  # of the growing tree's nodes, in the run
        self._found: dict[tuple[int, int], int] = {}  # a node's place by its parent's and its token
        self._count = 0
        self.passes = 0

    def __call__(self, growing: GrowingTree, nodes: Sequence[int]) -> TokenCandidates:
        """Scores after each of `nodes`: [nodes, vocabulary]."""
        logits = self._logits(growing, nodes).float()
        if self._vocabulary is not None:
            whole = logits.new_full((len(nodes), self._context.vocabulary), -torch.inf)
            logits = whole.index_copy_(1, self._vocabulary, logits)
        logits = logits[:, : self._context.vocabulary]
        if self._context.processors is not None:
            logits = self._context.processors([growing.path_tokens(node) for node in nodes], logits)
        return TokenCandidates(logits)

    def ran(self, tokens: Sequence[int]) -> list[int]:
        """Places in the run of the nodes along `tokens`, which follow the root, as far as they were run."""
        places: list[int] = []
        place = self._tip
        for token in tokens:
            found = self._found.get((place, token))
            if found is None:
                break
            places.append(place := found)
        return places

    def _logits(self, growing: GrowingTree, nodes: Sequence[int]) -> torch.Tensor:
        if self._root is not None and list(nodes) == [ROOT]:
            return self._root
        tokens, parents = [], []
        for node in nodes:
            if node == ROOT:
                tokens.append(self._context.tokens[-1])
                parents.append(ROOT)
            else:
                above = growing.parents[node]
                place = self._tip if above == ROOT else self._places[above]
                tokens.append(growing.tokens[node])
                parents.append(place)
                self._places[node] = self._found[place, growing.tokens[node]] = self._count
            self._count += 1
        self.passes += 1
        return self._run.run(tokens, parents)
