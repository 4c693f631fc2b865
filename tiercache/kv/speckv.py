"""Chooses which keys and values of a prompt stay in the KV cache, by the attention of its last and drafted tokens.

SpecKV (arXiv 2506.08373, section 3): of each layer and head the prompt's tokens with the most attention from a window
of queries are kept, as in SnapKV (arXiv 2404.14469, section 4), and the queries of drafted tokens count among them.
It is lossy: what was evicted gets no attention again.

Knows transformers' attention functions; it does not know slots, drafters or trees.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import max_pool1d

from tiercache.compat import (
    AttentionInterface,
    AttentionMaskInterface,
    attention_by,
    attention_of,
    sdpa_attention_forward,
    sdpa_mask,
    supports_attention_functions,
)
from tiercache.kv.cache import support

WINDOW = 32  # newest tokens: they stay, and their attention to the others decides
AHEAD = 16  # drafted tokens, whose attention decides too
_POOL = 7  # neighbours that a token's attention counts for: a kept one comes with what it stands in
_NAME = "tiercache_observed"  # sdpa that also adds up attention


@dataclass
class Observed:
    """The attention that slots got while the observation was open.

    Attributes:
        prefix: slots that may be evicted, counted from the first.
        scores: of each layer [key heads, prefix], fp32.
    """

    prefix: int
    scores: dict[int, Tensor] = field(default_factory=dict)

    def add(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Of a layer's queries [1, heads, tokens, width], which come last, on keys [1, key heads, slots, width]."""
        heads, tokens, slots = key.shape[1], query.shape[2], key.shape[2]
        later = torch.ones(tokens, slots, dtype=torch.bool, device=key.device).triu(slots - tokens + 1)
        found = query.new_empty((heads, self.prefix), dtype=torch.float32)
        groups = query[0].unflatten(0, (heads, -1))
        for head in range(heads):  # one at a time: this is [queries, slots]
            weights = (groups[head] @ key[0, head].T).float().mul_(scaling).masked_fill_(later, -torch.inf)
            found[head] = weights.softmax(-1)[..., : self.prefix].mean((0, 1))
        self.scores[layer] = max_pool1d(found[None], _POOL, 1, _POOL // 2)[0]

    def take(self, layer: int, count: int) -> Tensor:
        """The `count` best slots of the prefix for each head of a layer, ascending [key heads, count]; once."""
        return self.scores.pop(layer).topk(count, -1).indices.sort(-1).values


def scratch_bytes(config: transformers.PretrainedConfig, context: int) -> int:
    """The memory that observing attention takes at most, where a sequence has `context` tokens."""
    queries = WINDOW + 1 + AHEAD
    text = config.get_text_config(decoder=True)
    heads = int(text.num_attention_heads)
    groups = -(-heads // int(getattr(text, "num_key_value_heads", None) or heads))
    scores = 4 * (heads // groups) * text.num_hidden_layers  # they are kept until the pass has ended
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    moved = (8 + 4 * width) * (heads // groups)  # keys or values of one layer on their way to other slots, and these
    return int(context * (3 * 4 * groups * queries + queries + scores + moved))


def refusal(model: transformers.PreTrainedModel) -> str | None:
    """Why a model's keys and values cannot be evicted; None where they can."""
    takes = support(model)
    if takes.takes != "trees":
        return takes.reason
    config = model.config.get_text_config(decoder=True)
    if attention_of(config) != "sdpa":
        return f"attention by {attention_of(config)} cannot be looked at, only by sdpa"
    if not supports_attention_functions(model):
        return f"{type(model).__name__} does not attend by transformers' interface of functions"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds or (getattr(config, "sliding_window", None) is not None and not getattr(config, "layer_types", None)):
        return "not all layers attend to everything"
    return None


@contextmanager
def observing(model: transformers.PreTrainedModel, prefix: int) -> Iterator[Observed]:
    """Observes the attention of passes of `model` in this thread within."""
    seen = Observed(prefix)
    token = _open_observation.set(seen)
    try:
        with attention_by(model.config.get_text_config(decoder=True), _NAME):
            yield seen
    finally:
        _open_observation.reset(token)


def _attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any) -> Any:
    if (seen := _open_observation.get()) is not None:  # not another thread's pass
        layer: Any = module.layer_idx
        seen.add(layer, query, key, kwargs.get("scaling") or query.shape[-1] ** -0.5)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


_open_observation: ContextVar[Observed | None] = ContextVar("open_observation", default=None)
AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
