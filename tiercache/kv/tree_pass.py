"""Runs one sequence of a model, and draft trees below it in one pass each.

The nodes of a tree lie in the KV cache one behind the other, as they were run. A 4-D mask lets each see the committed
tokens and its own ancestors, and its position is that of the token it may become (SpecInfer, arXiv 2305.09781,
section 4.2).

Knows transformers' forward and the KV cache; it does not know drafters, or which tokens are accepted.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from tiercache.compat import DynamicCache, cache_kwargs
from tiercache.errors import DraftError, UnsupportedModelError, UsageError
from tiercache.kv import speckv
from tiercache.kv.cache import Rewind, TreeCache, support
from tiercache.kv.tree_mask import TreeMasks

_REPLAYED = 64  # committed tokens that may ride along in front of nodes, before they get a pass of their own


class TreeRun:
    """One sequence of a causal language model with its cache.

    Nodes are run below the committed tokens, in one pass or in several; then the accepted path is committed and all
    others are dropped. A model with a recurrent state is taken back to before the nodes if not all of them are
    accepted, and the accepted tokens ride along in front of the next pass: committed, but not in its state yet.

    Args:
        model: on transformers' own forward; it may be offloaded.
        padding: attention mask of the prompt [prompt] or [1, prompt], zeros where it is padded; None for no padding.
        capacity: slots of the KV cache, for the sequence and the largest tree; None to grow it as needed.
        cache: a KV cache to go on from, whose tokens count as committed; None for an empty one of `capacity` slots.

    Attributes:
        length: committed tokens, padding included; but for those that `evict` dropped.

    Raises:
        UnsupportedModelError: the model can run no more than the next token.
        UsageError: the padding is not that of one sequence.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        padding: Tensor | None = None,
        capacity: int | None = None,
        cache: TreeCache | None = None,
    ) -> None:
        self._support = support(model)
        if self._support.takes == "nothing":
            raise UnsupportedModelError(
                f"drafts cannot be verified, for {self._support.reason}; decode without a drafter"
            )
        config = model.config.get_text_config(decoder=True)
        accepts = inspect.signature(model.forward).parameters
        self._model = model
        self._with_positions = "position_ids" in accepts
        self._cache: Any = cache
        if cache is None:
            self._cache = DynamicCache(config=config) if self._support.recurrent else TreeCache(capacity)
        self._masks = TreeMasks(config, model.dtype, model.device, padding)
        self.length = 0 if cache is None else int(cache.get_seq_length())
        self._dropped = 0  # committed tokens that have no slot any more
        self._tokens: list[int] = []  # of the open nodes, which are neither committed nor dropped
        self._parents: list[int] = []
        self._depths: list[int] = []  # of children of the last committed token: 0
        self._ancestors: list[int] = []  # of each node the set of its ancestors and itself, as the bits of a number
        self._pending: list[int] = []
        self._rewind: Rewind | None = None

    @property
    def supports_tree(self) -> bool:
        """Whether nodes may have siblings."""
        return self._support.takes == "trees"

    @property
    def evicted(self) -> bool:
        """Whether some committed tokens have no slot any more, so that nobody else can go on from the cache."""
        return self._dropped > 0

    @property
    def cache(self) -> transformers.Cache:
        """The cache, with all committed tokens in it; a recurrent model may run some of them for that."""
        self._settle()
        cache: transformers.Cache = self._cache
        return cache

    def prefill(self, ids: Tensor, keep: int = 1) -> Tensor:
        """Commit tokens [length] in one causal pass; logits of the last `keep` [keep, vocabulary].

        Raises:
            DraftError: some nodes are open.
            ContextExceededError: the cache or the model has no room.
        """
        if self._tokens:
            raise DraftError(f"{len(self._tokens)} nodes are open; commit or drop them before more of the sequence")
        start, pending = self.length - len(self._pending), ids.new_tensor(self._pending)
        logits = self._causal(torch.cat((pending, ids)), start, keep)
        self._pending = []
        self.length += ids.shape[0]
        return logits

    def evict(self, recent: Tensor, ahead: Sequence[int], keep: int) -> None:
        """Drop all committed tokens' keys and values but `keep`: SpecKV, which changes what follows (see `speckv`).

        Args:
            recent: the newest committed tokens [1 or more]; they stay, and their attention to the others is measured.
            ahead: what may follow them.
            keep: tokens, those included; of all others each head keeps its own.

        Raises:
            UnsupportedModelError: this model's cannot be evicted.
            DraftError: some nodes are open, or `keep` is not more than the newest tokens.
            UsageError: the sequence is padded.
        """
        if reason := speckv.refusal(self._model):
            raise UnsupportedModelError(f"speckv= keeps a part of the KV cache, but {reason}; leave it out")
        if self._masks.padded:
            raise UsageError("the KV cache of a padded sequence cannot be evicted; leave the padding out")
        start = self.length - recent.shape[0]
        if self._tokens or not 0 < recent.shape[0] < keep or start < 0:
            raise DraftError(f"{len(self._tokens)} open nodes, {recent.shape[0]} newest tokens, {keep} to keep")
        if keep >= self.length:
            return
        self._cache.truncate(start)
        with speckv.observing(self._model, start) as seen:
            self._causal(torch.cat((recent, recent.new_tensor(ahead))), start, 1)
        self._cache.truncate(self.length)
        own = [number for number, layer in enumerate(self._cache.layers) if layer.length]  # others use another's keys
        if not set(own) <= seen.scores.keys():
            raise UnsupportedModelError(f"{type(self._model).__name__} attends in its own way; leave speckv= out")
        for number in own:
            self._cache.layers[number].pick(seen.take(number, keep - recent.shape[0]), start)
        self.length, self._dropped = keep, self.length - keep

    def run(self, tokens: Sequence[int], parents: Sequence[int]) -> Tensor:
        """Run nodes; logits of each [nodes, vocabulary].

        If it fails, what was open before is open again; a recurrent model drops all of it.

        Args:
            tokens: of each node.
            parents: of each; -1 for the last committed token, or the index of a node. Nodes count from the first
                that was run since the last commit, through all calls, this one included.

        Raises:
            DraftError: no nodes, a parent that does not come before its node, or a branch where the model takes
                chains alone.
            ContextExceededError: the cache or the model has no room.
        """
        open_before = len(self._tokens)
        self._check(tokens, parents)
        self._enter(tokens, parents)
        try:
            return self._tree(open_before) if self.supports_tree else self._chain(open_before)
        except BaseException:  # an interrupt as well may leave some layers longer than others
            self._back_to(0 if self._support.recurrent else open_before)
            raise

    def commit(self, nodes: Sequence[int]) -> None:
        """Commit a path of open nodes, from a child of the last committed token down; all others are dropped.

        Raises:
            DraftError: they are no such path.
        """
        for node, parent in zip(nodes, (-1, *nodes), strict=False):
            if not 0 <= node < len(self._tokens) or self._parents[node] != parent:
                raise DraftError(
                    f"node {node} is no child of {parent}, so {list(nodes)} is no path of the {len(self._tokens)} "
                    "open nodes; commit one that starts below -1"
                )
        taken = [self._tokens[node] for node in nodes]
        if not self._support.recurrent:
            self._cache.keep(self.length, nodes)
        elif len(nodes) < len(self._tokens):
            self._back_to(0)
            self._pending += taken
        elif nodes:
            self._pending = []
        self.length += len(nodes)
        self._forget(0)
        # Now, not in front of the next nodes: that may be a drafter's pass, which runs on less than the whole model.
        if len(self._pending) > _REPLAYED:
            self._settle()

    def drop(self) -> None:
        """Drop all open nodes."""
        self._back_to(0)

    def _settle(self) -> None:
        """Bring a recurrent state up to the committed tokens; without open nodes alone."""
        if self._pending and not self._tokens:
            self._causal(torch.tensor(self._pending), self.length - len(self._pending), 1)
            self._pending = []

    def _check(self, tokens: Sequence[int], parents: Sequence[int]) -> None:
        if not tokens or len(tokens) != len(parents):
            raise DraftError(f"{len(tokens)} tokens came with {len(parents)} parents; give one for each of some nodes")
        for node, parent in enumerate(parents, len(self._tokens)):
            if not -1 <= parent < node:
                raise DraftError(f"node {node} has parent {parent}; parents must come before their children")
            if parent != node - 1 and not self.supports_tree:
                raise DraftError(
                    f"node {node} has parent {parent}, but this model takes chains alone, for {self._support.reason}; "
                    "draft without branches"
                )

    def _enter(self, tokens: Sequence[int], parents: Sequence[int]) -> None:
        depths, ancestors = self._depths, self._ancestors
        for node, parent in enumerate(parents, len(self._tokens)):
            depths.append(depths[parent] + 1 if parent >= 0 else 0)
            ancestors.append((ancestors[parent] if parent >= 0 else 0) | 1 << node)
        self._tokens += tokens
        self._parents += parents

    def _back_to(self, nodes: int) -> None:
        """As it was when only so many nodes were open."""
        if isinstance(self._cache, TreeCache):
            self._cache.truncate(self.length + nodes)
        elif self._rewind is not None:
            self._rewind.back()
        self._forget(nodes)

    def _forget(self, nodes: int) -> None:
        for part in (self._tokens, self._parents, self._depths, self._ancestors):
            del part[nodes:]
        self._rewind = None

    def _tree(self, first: int) -> Tensor:
        """A pass of the open nodes from `first` on, by mask and position."""
        tip = self.length + self._dropped - self._masks.padded
        both = torch.tensor(
            (self._tokens[first:], [tip + depth for depth in self._depths[first:]]), device=self._masks.device
        )
        mask = self._masks.tree(self._ancestors, self._depths, first, self.length)
        return self._forward(both[:1], both[1:], mask, len(self._tokens) - first)

    def _chain(self, first: int) -> Tensor:
        """A pass of the open nodes from `first` on, as the model itself continues a sequence."""
        fed = self._tokens[first:]
        start = self.length + first
        if self._support.recurrent and first == 0:
            self._rewind = Rewind(self._cache)
            fed, start = [*self._pending, *fed], start - len(self._pending)
        return self._causal(torch.tensor(fed), start, len(self._tokens) - first)

    def _causal(self, ids: Tensor, start: int, keep: int) -> Tensor:
        """A pass of tokens [length] behind `start` others; logits of the last `keep`."""
        shown, positions = self._masks.causal(start, start + ids.shape[0])
        return self._forward(ids[None].to(self._masks.device), positions + self._dropped, shown, keep)

    def _forward(self, ids: Tensor, positions: Tensor, mask: object, keep: int) -> Tensor:
        named = cache_kwargs(self._model, self._cache)
        if self._with_positions:
            named["position_ids"] = positions
        with torch.no_grad():
            output = self._model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=keep, **named)
        logits: Tensor = output.logits[0]
        return logits
