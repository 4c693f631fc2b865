"""Drafts by a small language model that has the target's vocabulary or a part of it.

Knows transformers models; of the target it knows the tokens alone. The model may be an offloaded one itself.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import torch
import transformers
from torch import Tensor, nn

from tiercache.draft.base import Context, DrafterRequirements, Feedback, TreeBudget
from tiercache.draft.growing_tree import Grower
from tiercache.draft.lm_base import GrownDrafter
from tiercache.draft.scorer import RunScorer
from tiercache.draft.tree import DraftTree
from tiercache.errors import UsageError
from tiercache.kv.tree_pass import TreeRun

_PIECE = 256  # tokens of the prompt in one pass: bounds what a pass takes


class LmDrafter(GrownDrafter):
    """Drafts by a transformers causal language model with the target's tokenizer.

    Args:
        model: the model, on the device where it is to run.
        grower: how trees grow.
        vocabulary: tokens that it may draft; its head is trimmed to their rows until `close` (VocabTrim,
            arXiv 2506.22694). None for all.
        requirements: see `Drafter`.
        capacity: slots of its KV cache, for a text and the largest tree; None to grow it as needed.
        name: in statistics.

    Raises:
        UsageError: the model cannot be trimmed, or not to these tokens.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        grower: Grower,
        *,
        vocabulary: Iterable[int] | None = None,
        requirements: DrafterRequirements | None = None,
        capacity: int | None = None,
        name: str = "lm",
    ) -> None:
        super().__init__(grower)
        self.model, self.name, self._capacity = model, name, capacity
        self.requirements = requirements or DrafterRequirements()
        self._head: nn.Module | None = None
        self._kept = None if vocabulary is None else self._trim(sorted(set(vocabulary)))
        self._run: TreeRun | None = None
        self._scores: RunScorer | None = None

    def begin(self, context: Context) -> None:
        super().begin(context)
        self._run = TreeRun(self.model, None, self._capacity)
        self._scores = None

    def propose(self, budget: TreeBudget) -> DraftTree:
        run = self._run
        assert run is not None
        if budget.nodes < 1 or self.context.room < 2:
            return DraftTree()
        missing = torch.tensor(self.context.tokens[run.length :], device=self.model.device)
        for piece in missing.split(_PIECE):
            root = run.prefill(piece)
        self._scores = RunScorer(run, self.context, root, self._kept)
        if not run.supports_tree:
            budget = replace(budget, width=1)
        self._tree = self._grower(self._scores, self.context, budget)
        self.passes = self._scores.passes + 1
        return self._tree

    def observe(self, feedback: Feedback) -> None:
        """See `Drafter`. Of the accepted nodes those that were run stay in the KV cache; the rest comes next time."""
        super().observe(feedback)
        if self._run is not None and self._scores is not None:
            self._run.commit(self._scores.ran(feedback.emitted[:-1]))
            self._scores = None

    def close(self) -> None:
        """See `Drafter`. The model gets its head back."""
        self._run = self._scores = None
        if self._head is not None:
            self.model.set_output_embeddings(self._head)
            self._head = None

    def _trim(self, tokens: list[int]) -> Tensor:
        head = self.model.get_output_embeddings()
        if not isinstance(head, nn.Linear) or hasattr(self.model, "tiercache"):
            raise UsageError("vocabulary= trims a model's own linear head, which this model lacks; leave it out")
        if not tokens or tokens[0] < 0 or tokens[-1] >= head.out_features:
            raise UsageError(f"vocabulary= must name tokens from 0 to {head.out_features - 1}, at least one")
        kept = torch.tensor(tokens, device=head.weight.device)
        small = nn.Linear(head.in_features, len(tokens), bias=head.bias is not None, device="meta")
        small.weight = nn.Parameter(head.weight.detach()[kept], requires_grad=False)
        if head.bias is not None:
            small.bias = nn.Parameter(head.bias.detach()[kept], requires_grad=False)
        self._head = head
        self.model.set_output_embeddings(small)
        return kept


def frequent(tokens: Iterable[int], count: int) -> list[int]:
    """The `count` most frequent of `tokens` (best a text that the target wrote), for `LmDrafter(vocabulary=...)`."""
    return [token for token, _ in Counter(tokens).most_common(count)]
