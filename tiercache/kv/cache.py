"""Holds the KV cache of one sequence that is verified by draft trees, and says which models allow that.

transformers' own layers append by copying everything, and those with a sliding window forget what a rejected tree
still needs. Here keys and values are written in place, all of them are kept, and a window is a matter of the mask.

Knows transformers' caches and configurations; it does not know trees, masks or tokens.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import transformers
from torch import Tensor

from tiercache.compat import (
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    attention_of,
    cache_argument,
    is_stateful,
)
from tiercache.errors import ContextExceededError, UsageError

# Recurrent and hybrid models of transformers of which a pass of several tokens was seen to go on from their state.
# Of others it was seen that such a pass starts afresh and says nothing (Mamba, Falcon Mamba, Jamba, Bamba).
_CONTINUING = (
    *("falcon_h1", "granitemoehybrid", "lfm2", "lfm2_moe", "lfm3", "mamba2", "nemotron_h", "olmo_hybrid"),
    *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "zamba2"),
)
_LEAST = 64  # slots that a buffer without a capacity starts with, and grows by at least


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer: buffers [1, heads, slots, width], filled from the front.

    Args:
        capacity: slots of the buffers; None to grow them by halves.
    """

    keys: Tensor
    values: Tensor
    is_sliding = False  # everything is kept: a mask's columns are the slots

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.capacity, self.length = capacity, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for a first pass's keys and values [1, heads, tokens, width], whose dtype and device it takes."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write behind what is there; the keys and values of every slot so far, as views.

        Raises:
            UsageError: more than one sequence.
            ContextExceededError: the capacity is too small; nothing was written.
        """
        if not self.is_initialized:
            if key_states.shape[0] != 1:
                raise UsageError(f"this cache is of one sequence, not of {key_states.shape[0]}; make one for each")
            self.lazy_initialization(key_states, value_states)
        start, new = self.length, key_states.shape[2]
        if start + new > self.keys.shape[2]:
            self._grow(start + new)
        self.keys.narrow(2, start, new).copy_(key_states)
        self.values.narrow(2, start, new).copy_(value_states)
        self.length = start + new
        return self.keys.narrow(2, 0, self.length), self.values.narrow(2, 0, self.length)

    def _grow(self, needed: int) -> None:
        if self.capacity is not None and needed > self.capacity:
            raise ContextExceededError(
                f"this pass needs {needed} slots of the KV cache, which was made for {self.capacity}; make it with "
                f"capacity={needed} or more"
            )
        slots = self.capacity or max(needed + _LEAST, self.keys.shape[2] * 3 // 2)
        self.keys, self.values = (self._moved(part, slots) for part in (self.keys, self.values))

    def _moved(self, part: Tensor, slots: int) -> Tensor:
        roomy = part.new_empty((1, part.shape[1], slots, part.shape[3]))
        roomy[:, :, : self.length] = part[:, :, : self.length]
        return roomy

    def get_seq_length(self) -> int:
        """Slots filled."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of a mask for so many new tokens, and the slot of the first: always 0."""
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        """Slots that it can ever hold; -1 where nothing bounds them."""
        return -1 if self.capacity is None else self.capacity

    def get_max_cache_shape(self) -> int:
        """What older transformers call `get_max_length`."""
        return self.get_max_length()

    def reset(self) -> None:
        """Forget everything; the buffers stay."""
        self.length = 0

    def keep(self, start: int, slots: Tensor) -> None:
        """Put what lies in `slots` (absolute, ascending) behind `start`, and forget the rest behind that."""
        kept = slots.shape[0]
        for part in (self.keys, self.values):
            part.narrow(2, start, kept).copy_(part.index_select(2, slots))
        self.length = start + kept

    def pick(self, slots: Tensor, end: int) -> None:
        """Of the first `end` slots keep some of each head (ascending) [heads, kept], and all behind; close the gaps."""
        kept, behind = slots.shape[1], self.length - end
        for part in (self.keys, self.values):
            chosen = part[0].gather(1, slots[:, :, None].expand(-1, -1, part.shape[3]))
            rest = part[:, :, end : self.length].clone()  # it may overlap where it goes
            part[0, :, :kept] = chosen
            part[:, :, kept : kept + behind] = rest
        self.length = kept + behind


class TreeCache(transformers.Cache):
    """Keys and values of one sequence, of which the newest can be evicted.

    Args:
        capacity: slots that each layer has room for, trees included; None to grow as needed.
    """

    layers: list[Any]

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(layers=[])
        self.capacity = capacity

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """See `TreeLayer.update`; layers come to be as they are used."""
        while len(self.layers) <= layer_idx:
            self.layers.append(TreeLayer(self.capacity))
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        return keys, values

    def truncate(self, length: int) -> None:
        """Forget everything behind the first `length` slots; moves nothing."""
        for layer in self.layers:
            layer.length = min(layer.length, length)

    def keep(self, start: int, slots: Sequence[int]) -> None:
        """Of what lies behind the first `start` slots keep `slots`, counted from there and ascending; close the gaps.

        Only what changes its place is copied. Keys are rotated at their final position already, for a node that is
        accepted lies as deep in the tree as it comes to lie in the sequence.
        """
        still = 0  # at the front, already where they belong
        while still < len(slots) and slots[still] == still:
            still += 1
        if still == len(slots):
            return self.truncate(start + still)
        places = torch.tensor(slots[still:]) + start
        for layer in self.layers:
            if layer.length > start:  # a layer that uses another's keys has none of its own
                places = places.to(layer.device)
                layer.keep(start + still, places)
        return None


@dataclass(frozen=True)
class Support:
    """What a model can verify in one pass.

    Attributes:
        takes: "trees"; "chains", in which no node has a sibling; or "nothing" but the next token.
        reason: why not trees; empty where it takes them.
        recurrent: its state cannot be evicted, and has to be brought back and replayed.
    """

    takes: Literal["trees", "chains", "nothing"]
    reason: str = ""
    recurrent: bool = False


def support(model: transformers.PreTrainedModel) -> Support:
    """What a causal language model can verify in one pass, from its configuration and forward alone."""
    config = model.config.get_text_config(decoder=True)
    accepts = inspect.signature(model.forward).parameters
    if model.config.is_encoder_decoder or cache_argument(model) is None:
        return Support("nothing", f"{type(model).__name__} is no decoder with a KV cache")
    special = [layer for layer in DynamicCache(config=config).layers if _is_special(layer)]
    if special or is_stateful(model) or hasattr(config, "layers_block_type"):
        # `record_past` came to transformers' layers along with passes of several tokens that go on from a state.
        if config.model_type in _CONTINUING and all(hasattr(layer, "record_past") for layer in special):
            return Support("chains", "it keeps a state that holds no single tokens", recurrent=True)
        return Support("nothing", f"the state of {type(model).__name__} is not known to take several tokens in a pass")
    reason = _against_trees(config, "position_ids" in accepts)
    return Support("chains", reason) if reason else Support("trees")


def cache_of(model: transformers.PreTrainedModel, capacity: int) -> transformers.Cache | None:
    """The empty KV cache of a sequence that is drafted for; None where it is the model's own."""
    takes = support(model)
    return None if takes.takes == "nothing" or takes.recurrent else TreeCache(capacity)


def cut(cache: transformers.Cache, length: int) -> bool:
    """Forget all but the first `length` tokens; whether that could be done. A window or a state cannot be cut.

    transformers' own `crop` means other things in other releases.
    """
    if isinstance(cache, TreeCache):
        cache.truncate(length)
        return True
    layers: list[Any] = cache.layers
    if all(type(layer) is DynamicLayer for layer in layers):
        for layer in layers:
            if layer.is_initialized:  # one that uses another's keys never is
                layer.keys, layer.values = layer.keys[:, :, :length], layer.values[:, :, :length]
        return True
    return int(cache.get_seq_length()) == length


def _is_special(layer: Any) -> bool:
    """Whether a layer of transformers' own cache holds more than keys and values."""
    kinds = (CacheLayerMixin, LinearAttentionCacheLayerMixin)
    return isinstance(layer, kinds) and type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)


def _against_trees(config: transformers.PretrainedConfig, positions: bool) -> str:
    """Why a model with nothing but keys and values takes no trees, if so."""
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if not positions or getattr(config, "alibi", False):
        return "its positions are the slots of the KV cache"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "its local attention goes by the slots of the KV cache"
    if kinds:
        return f"it has layers of kind {', '.join(sorted(kinds))}, whose masks go by slot"
    if attention_of(config) not in ("sdpa", "eager"):
        return f"attention by {attention_of(config)} takes no masks of trees; load it with sdpa"
    return ""


class Rewind:
    """A cache of transformers as it is now, to be brought back once.

    States that are overwritten in place are copied; keys and values, which transformers' dynamic layers replace and
    never overwrite, are not.
    """

    def __init__(self, cache: transformers.Cache) -> None:
        self._cache = cache
        self._layers = [
            {name: value if name in ("keys", "values") else _copied(value) for name, value in vars(layer).items()}
            for layer in cache.layers
        ]

    def back(self) -> None:
        """Bring it back."""
        for layer, state in zip(self._cache.layers, self._layers, strict=True):
            vars(layer).update(state)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return value.clone() if isinstance(value, Tensor) else value
