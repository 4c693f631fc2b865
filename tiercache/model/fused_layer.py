"""Runs a decoder layer in three calls of the kernels instead of module by module: a pass then costs its bytes.

The layer stays the same object; while it is attached, its `forward` is an instance of `FusedLayer`, which goes back to
the layer's own forward, and so to its modules, wherever a call wants what the kernels do not do.

Knows transformers' Llama-like layers, planes and kernels; not where slots come from.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from tiercache.compat import attention_of, cache_in
from tiercache.kernels.activation import FUNCTIONS
from tiercache.kernels.blocks import Attention, AttentionWeights, FeedForward, FeedForwardWeights
from tiercache.kernels.contract import MAX_TOKENS, Kernels
from tiercache.model.linear import is_down
from tiercache.quant.planes import Planes
from tiercache.store.manifest import PlaneWeight

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Layers of transformers whose forward is the one that `kernels.blocks` tells."""

_INWARD, _OUTWARD = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"
_GATED, _DOWN = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
_PLACES = 8  # of a half's slots that are remembered: a ring comes back to the same few

Half = TypeVar("Half", Attention, FeedForward)

_ACTIVATIONS: Mapping[str, str] = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


class Slots(Protocol):
    """Hands out the slots of weights for the length of a half.

    Attributes:
        passes: how many have begun.
        resident: the pass at hand does with the planes that stay.
    """

    passes: int
    resident: bool

    def staying(self, modules: Sequence[str]) -> Sequence[Sequence[Tensor]] | None:
        """The slots of modules' weights in passes like the one at hand, if all of them stay as long as the model."""

    def counted(self, modules: Sequence[str]) -> Sequence[int]:
        """The units of which these modules tell that they are used; others' are told by others."""

    def hit(self, units: Sequence[int]) -> None:
        """Units that stay are used, for the statistics."""

    def take(self, module: str) -> Sequence[Tensor]:
        """The slots of its units, or of the first planes in a pass that does with those."""

    def give_back(self, module: str) -> None:
        """They are not needed any more."""


@dataclass(frozen=True)
class LayerParts:
    """What of a layer can be fused.

    Attributes:
        name: of the layer among the model's modules.
        layer: itself.
        weights: of its linear modules, by their names within the layer.
        feed_forward: whether the feed-forward half can be fused too.
    """

    name: str
    layer: nn.Module
    weights: Mapping[str, PlaneWeight]
    feed_forward: bool

    @property
    def dtype(self) -> torch.dtype:
        """What the layer computes in."""
        return next(self.layer.get_submodule("input_layernorm").parameters()).dtype


def fusable(model: nn.Module, weights: Mapping[str, object]) -> list[LayerParts]:
    """The layers of which at least the attention half can be fused; `weights` by the names of linear modules."""
    found = []
    for name, layer in model.named_modules():
        if type(layer).__name__ not in _LAYERS or not type(layer).__module__.startswith("transformers.models."):
            continue
        own = {part: weights.get(f"{name}.{part}") for part in (*_INWARD, _OUTWARD, *_GATED, _DOWN)}
        planes = {part: weight for part, weight in own.items() if isinstance(weight, PlaneWeight)}
        if _attends(layer, planes):
            found.append(LayerParts(name, layer, planes, _feeds_forward(layer, planes)))
    return found


def _attends(layer: nn.Module, weights: Mapping[str, PlaneWeight]) -> bool:
    """Whether the matrices of attention lie as the kernels want them."""
    matrices = [weights.get(part) for part in (*_INWARD, _OUTWARD)]
    if any(weight is None or len(weight.own) != 1 for weight in matrices):
        return False
    modules = [layer.get_submodule(part) for part in (*_INWARD, _OUTWARD)]
    if any(is_down(module, weight) for module, weight in zip(modules, matrices, strict=True) if weight is not None):
        return False
    inward = [weights[part] for part in _INWARD]
    return len({(weight.group, weight.inputs) for weight in inward}) == 1


def _feeds_forward(layer: nn.Module, weights: Mapping[str, PlaneWeight]) -> bool:
    """Whether the feed-forward block is one unit of gate, up and down without biases."""
    if any(part not in weights for part in (*_GATED, _DOWN)) or activation_name(layer) is None:
        return False
    units = {weights[part].units for part in (*_GATED, _DOWN)}
    biased = any(layer.get_submodule(part).bias is not None for part in (*_GATED, _DOWN))
    return len(units) == 1 and not biased and is_down(layer.get_submodule(_DOWN), weights[_DOWN])


def activation_name(layer: nn.Module) -> str | None:
    """What the kernels call the activation of a layer's feed-forward block; None where they have none like it."""
    name = getattr(layer.get_submodule("self_attn").config, "hidden_act", None)
    name = _ACTIVATIONS.get(name, name) if isinstance(name, str) else None
    return name if name in FUNCTIONS else None


class FusedLayer:
    """The forward of one layer.

    Args:
        parts: of the layer.
        slots: where weights come from.
        kernels: by the kind of device that slots are on.
        count: is told of every call whether it was fused.
    """

    def __init__(
        self, parts: LayerParts, slots: Slots, kernels: Mapping[str, Kernels], count: Callable[[bool], None]
    ) -> None:
        self._parts, self._slots, self._kernels, self._count = parts, slots, kernels, count
        self._forward = parts.layer.forward
        attention: Any = parts.layer.get_submodule("self_attn")
        self._config, self._index, self._attention = attention.config, attention.layer_idx, attention
        self._norms: Any = parts.layer  # holds them, and the feed-forward block
        self._attends = _Slotted(slots, [f"{parts.name}.{part}" for part in (*_INWARD, _OUTWARD)], self._new_attention)
        self._feeds = _Slotted(slots, [f"{parts.name}.{part}" for part in (*_GATED, _DOWN)], self._new_feed_forward)
        names = ["input_layernorm", "self_attn", *(["post_attention_layernorm", "mlp"] if parts.feed_forward else [])]
        passed_over = [parts.layer.get_submodule(name).modules() for name in names]
        self._modules: list[nn.Module] = [module for some in passed_over for module in some]
        self._hooks = self._hooked()
        self._looked_at, self._usual = -1, False  # the pass in which the layer was looked at, and what was found
        self._dtype: torch.dtype = self._parts.dtype

    def __call__(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        """As the layer's own forward."""
        cache, mask, rotary = cache_in((), named), named.get("attention_mask"), named.get("position_embeddings")
        if arguments or rotary is None or not self._takes(hidden_states, cache, mask, named):
            self._count(False)
            return self._forward(hidden_states, *arguments, **named)
        self._count(True)
        x = hidden_states[0]
        half = self._attends.begin()
        queries, keys, values = half.project(x, rotary[0][0], rotary[1][0])
        if cache is not None:
            keys, values = cache.update(keys, values, self._index)
        x = half.attend(x, queries, keys, values, None if mask is None else mask[0, 0])
        self._attends.end()
        if not self._parts.feed_forward:
            hidden = x[None]
            return hidden + self._norms.mlp(self._norms.post_attention_layernorm(hidden))
        x = self._feeds.begin().forward(x)
        self._feeds.end()
        return x[None]

    def _takes(self, x: Tensor, cache: Any, mask: Tensor | None, named: Mapping[str, Any]) -> bool:
        """Whether the kernels do all that this call asks for."""
        if self._looked_at != self._slots.passes:
            self._looked_at, self._usual = self._slots.passes, self._is_usual(x.device)
        if not self._usual or x.ndim != 3 or x.shape[0] != 1 or x.dtype != self._dtype or x.requires_grad:
            return False
        if not 0 < x.shape[1] <= MAX_TOKENS or x.stride(2) != 1 or named.get("output_attentions"):
            return False
        if mask is None:  # torch takes it for the beginning of a text, or one token that attends to all
            return x.shape[1] == 1 or cache is None or cache.get_seq_length(self._index) == 0
        return mask.ndim == 4 and mask.dtype == torch.bool and mask.shape[:2] == (1, 1) and mask.stride(3) == 1

    def _is_usual(self, device: torch.device) -> bool:
        """Whether a pass leaves the layer to do what it always does."""
        if device.type not in self._kernels or attention_of(self._config) != "sdpa" or self._attention.training:
            return False
        return not torch.is_autocast_enabled(device.type) and self._hooked() == self._hooks

    def _hooked(self) -> list[tuple[int, int, bool]]:
        """What watches the modules within: a fused call would pass them over."""
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in m.__dict__) for m in self._modules]

    def _new_attention(self, slots: Sequence[Sequence[Tensor]]) -> Attention:
        module, weights = self._attention, self._parts.weights
        queries, keys, values, outward = map(self._planes, (*_INWARD, _OUTWARD), slots)
        heads, key_heads = (queries.rows // module.head_dim, keys.rows // module.head_dim)
        norms = (module.q_norm.weight, module.k_norm.weight) if hasattr(module, "q_norm") else None
        inputs, outputs = weights[_INWARD[0]], weights[_OUTWARD]
        made = AttentionWeights(
            norm=self._norms.input_layernorm.weight.data,
            eps=_epsilon(self._norms.input_layernorm),
            inward=(queries, keys, values),
            factors=inputs.input_factors(slots[0][0]),
            biases=(module.q_proj.bias, module.k_proj.bias, module.v_proj.bias),
            head_norms=norms,
            outward=outward,
            outward_factors=outputs.input_factors(slots[3][0]),
            outward_bias=module.o_proj.bias,
            heads=heads,
            key_heads=key_heads,
            head_dim=module.head_dim,
            scaling=module.scaling,
        )
        return self._kernels[slots[0][0].device.type].attention(made)

    def _new_feed_forward(self, slots: Sequence[Sequence[Tensor]]) -> FeedForward:
        weights, name = self._parts.weights, activation_name(self._parts.layer)
        gate, up, down = map(self._planes, (*_GATED, _DOWN), slots)
        assert name is not None
        made = FeedForwardWeights(
            norm=self._norms.post_attention_layernorm.weight.data,
            eps=_epsilon(self._norms.post_attention_layernorm),
            inward=(gate, up),
            factors=weights[_GATED[0]].input_factors(slots[0][0]),
            down=down,
            down_factors=weights[_DOWN].output_factors(slots[2][0]),
            activation=name,
        )
        return self._kernels[slots[0][0].device.type].feed_forward(made)

    def _planes(self, part: str, slots: Sequence[Tensor]) -> Planes:
        weight = self._parts.weights[part]
        return weight.part(slots[0], weight.own[0], slots[1:])


class _Slotted(Generic[Half]):
    """A half in the slots that its weights have in the pass at hand: remembered, or made.

    Args:
        slots: where weights come from.
        modules: whose weights they are.
        new: makes a half over planes in some slots.
    """

    def __init__(self, slots: Slots, modules: Sequence[str], new: Callable[[Sequence[Sequence[Tensor]]], Half]) -> None:
        self._slots, self._modules = slots, modules
        self._new: Callable[[Sequence[Sequence[Tensor]]], Half] = new
        self._known: OrderedDict[tuple[int, ...], Half] = OrderedDict()
        self._staying: dict[bool, Half | None] = {}  # by whether the pass is resident; None: they come and go
        self._counted, self._taken = slots.counted(modules), False

    def begin(self) -> Half:
        """The half, until `end`."""
        resident = self._slots.resident
        if resident not in self._staying:
            staying = self._slots.staying(self._modules)
            self._staying[resident] = None if staying is None else self._new(staying)
        half = self._staying[resident]
        if half is not None:
            if not resident:  # those are counted by whoever runs such passes
                self._slots.hit(self._counted)
            return half
        self._taken = True
        slots = [self._slots.take(module) for module in self._modules]
        where = tuple([slot.data_ptr() for some in slots for slot in some])
        half = self._known.get(where)
        if half is None:
            half = self._known[where] = self._new(slots)
            if len(self._known) > _PLACES:
                self._known.popitem(last=False)
        return half

    def end(self) -> None:
        """Give slots back; after an exception the end of the pass does so."""
        if self._taken:
            self._taken = False
            for module in self._modules:
                self._slots.give_back(module)


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon)
