"""Runs a decoder layer in three calls of the kernels instead of module by module: a pass then costs its bytes.

The layer stays the same object; while it is attached, its `forward` is an instance of `FusedLayer`, which goes back to
the layer's own forward, and so to its modules, wherever a call wants what the kernels do not do.

Knows layers, planes and kernels; not where slots come from.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import contains
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from tiercache.compat import attention_of, cache_in
from tiercache.kernels.blocks import Attention, AttentionWeights, FeedForward, FeedForwardWeights
from tiercache.kernels.contract import MAX_TOKENS, Kernels
from tiercache.model.growing_cache import GrowingCache
from tiercache.model.layer_parts import DOWN, GATED, INWARD, OUTWARD, LayerParts, activation_name
from tiercache.quant.planes import Planes

_HOOKS = "_forward_hooks", "_forward_pre_hooks"
_PLACES = 64  # of a half's slots that are remembered: a ring comes back to each of its slots in turn

Half = TypeVar("Half", Attention, FeedForward)


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
        """The units that stay of which these modules tell that they are used; others' are told by others."""

    def hit(self, units: Sequence[int]) -> None:
        """Units that stay are used, for the statistics."""

    def take(self, module: str) -> Sequence[Tensor]:
        """The slots of its units, or of the first planes in a pass that does with those; it tells of none that stay."""

    def give_back(self, module: str) -> None:
        """They are not needed any more."""


class _Pass:
    """What holds for all layers in a pass, asked for once."""

    number, usual = -1, False


@dataclass(frozen=True)
class Fusing:
    """How the layers of a model are fused.

    Attributes:
        count: is told of every call of a layer whether it was fused.
        context: tokens that a KV cache was reserved for.
        at_hand: the pass that layers were called in last.
    """

    count: Callable[[bool], None]
    context: int
    at_hand: _Pass = field(default_factory=_Pass)


class FusedLayer:
    """The forward of one layer.

    Args:
        parts: of the layer.
        slots: where weights come from.
        kernels: by the kind of device that slots are on.
        fusing: how.
    """

    def __init__(self, parts: LayerParts, slots: Slots, kernels: Mapping[str, Kernels], fusing: Fusing) -> None:
        self._parts, self._slots, self._kernels, self._count = parts, slots, kernels, fusing.count
        self._cache, self._pass = GrowingCache(fusing.context), fusing.at_hand
        self._forward = parts.layer.forward
        attention: Any = parts.layer.get_submodule("self_attn")
        self._config, self._index, self._attention = attention.config, attention.layer_idx, attention
        self._layer: Any = parts.layer
        self._attends = _Slotted(slots, parts.halves[0], self._new_attention)
        self._feeds = _Slotted(slots, parts.halves[-1], self._new_feed_forward)
        names = ["input_layernorm", "self_attn", *(["post_attention_layernorm", "mlp"] if parts.feed_forward else [])]
        passed_over = [parts.layer.get_submodule(name).modules() for name in names]
        self._within: list[dict[str, Any]] = [module.__dict__ for some in passed_over for module in some]
        self._watching = [each[name] for name in _HOOKS for each in self._within]  # dicts, which last as modules do
        self._hooks = self._hooked()
        self._looked_at, self._usual = -1, False  # the pass in which the layer was looked at, and what was found
        self._dtype: torch.dtype = self._parts.dtype

    def __call__(self, hidden_states: Tensor, *arguments: Any, **named: Any) -> Any:
        """As the layer's own forward."""
        cache, mask, rotary = cache_in((), named), named.get("attention_mask"), named.get("position_embeddings")
        if arguments or rotary is None or not self._takes(hidden_states, cache, mask, named):
            self._count(False)
            return self._forward(hidden_states, *arguments, **named)
        half = self._attends.begin(hidden_states.device)
        self._count(half is not None)
        if half is None:
            return self._forward(hidden_states, *arguments, **named)
        x = self._attend(
            half, hidden_states[0], (rotary[0][0], rotary[1][0]), cache, None if mask is None else mask[0, 0]
        )
        self._attends.end()
        feeds = self._feeds.begin(x.device) if self._parts.feed_forward else None
        if feeds is None:
            hidden = x[None]
            return hidden + self._layer.mlp(self._layer.post_attention_layernorm(hidden))
        x = feeds.forward(x)
        self._feeds.end()
        return x[None]

    def _attend(
        self, half: Attention, x: Tensor, turns: tuple[Tensor, Tensor], cache: Any, mask: Tensor | None
    ) -> Tensor:
        room = None if cache is None else self._cache.room(cache, self._index, x.shape[0])
        if room is not None:
            views = room.views(x.shape[0])
            out = half.step(x, *turns, *views, mask)
            room.keep(cache.layers[self._index], views)
            return out
        queries, keys, values = half.project(x, *turns)
        if cache is not None:
            keys, values = cache.update(keys, values, self._index)
        return half.attend(x, queries, keys, values, mask)

    def close(self) -> None:
        """Let go of halves and slots, which keep a tier's memory; the layer is not called any more."""
        del self._attends, self._feeds, self._slots  # they refer to it in turn, and garbage is collected some time

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
        at_hand = self._pass
        if at_hand.number != self._slots.passes:
            kind, as_always = device.type, attention_of(self._config) == "sdpa"
            at_hand.usual = as_always and kind in self._kernels and not torch.is_autocast_enabled(kind)
            at_hand.number = self._slots.passes
        return at_hand.usual and not self._attention.training and self._hooked() == self._hooks

    def _hooked(self) -> list[Any]:
        """What watches the modules within: a fused call would pass them over."""
        return [*map(len, self._watching), *map(contains, self._within, repeat("forward"))]

    def _new_attention(self, slots: Sequence[Sequence[Tensor]], stays: bool) -> Attention:
        module, weights = self._attention, self._parts.weights
        queries, keys, values, outward = map(self._planes, (*INWARD, OUTWARD), slots)
        heads, key_heads, head_dim = self._parts.heads
        norms = (module.q_norm.weight, module.k_norm.weight) if hasattr(module, "q_norm") else None
        inputs, outputs = weights[INWARD[0]], weights[OUTWARD]
        made = AttentionWeights(
            norm=self._layer.input_layernorm.weight.data,
            eps=_epsilon(self._layer.input_layernorm),
            inward=(queries, keys, values),
            factors=inputs.input_factors(slots[0][0]),
            biases=(module.q_proj.bias, module.k_proj.bias, module.v_proj.bias),
            head_norms=norms,
            outward=outward,
            outward_factors=outputs.input_factors(slots[3][0]),
            outward_bias=module.o_proj.bias,
            heads=heads,
            key_heads=key_heads,
            head_dim=head_dim,
            scaling=module.scaling,
            stays=stays,
        )
        return self._kernels[slots[0][0].device.type].attention(made)

    def _new_feed_forward(self, slots: Sequence[Sequence[Tensor]], stays: bool) -> FeedForward:
        weights, name = self._parts.weights, activation_name(self._parts.layer)
        gate, up, down = map(self._planes, (*GATED, DOWN), slots)
        assert name is not None
        made = FeedForwardWeights(
            norm=self._layer.post_attention_layernorm.weight.data,
            eps=_epsilon(self._layer.post_attention_layernorm),
            inward=(gate, up),
            factors=weights[GATED[0]].input_factors(slots[0][0]),
            down=down,
            down_factors=weights[DOWN].output_factors(slots[2][0]),
            activation=name,
            stays=stays,
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
        new: makes a half over planes in some slots; is told whether they stay there.
    """

    def __init__(
        self, slots: Slots, modules: Sequence[str], new: Callable[[Sequence[Sequence[Tensor]], bool], Half]
    ) -> None:
        self._slots, self._modules = slots, modules
        self._new: Callable[[Sequence[Sequence[Tensor]], bool], Half] = new
        self._known: OrderedDict[tuple[int, ...], Half] = OrderedDict()
        self._staying: dict[bool, Half | None] = {}  # by whether the pass is resident; None: they come and go
        self._counted, self._taken = slots.counted(modules), False

    def begin(self, device: torch.device) -> Half | None:
        """The half, until `end`; None where some of its weights are to be multiplied on another device."""
        resident = self._slots.resident
        if resident not in self._staying:
            staying = self._slots.staying(self._modules)
            here = staying is not None and _on(device, staying)
            self._staying[resident] = self._new(staying, True) if here and staying is not None else None
        half = self._staying[resident]
        if half is not None:
            self._slots.hit(self._counted)
            return half
        slots = [self._slots.take(module) for module in self._modules]
        if not _on(device, slots):
            return None  # what was taken is there for the modules, which give it back
        self._taken = True
        self._slots.hit(self._counted)
        where = tuple([slot.data_ptr() for some in slots for slot in some])
        half = self._known.get(where)
        if half is None:
            half = self._known[where] = self._new(slots, False)
            if len(self._known) > _PLACES:
                self._known.popitem(last=False)
        return half

    def end(self) -> None:
        """Give slots back; after an exception the end of the pass does so."""
        if self._taken:
            self._taken = False
            for module in self._modules:
                self._slots.give_back(module)


def _on(device: torch.device, slots: Sequence[Sequence[Tensor]]) -> bool:
    """Whether all slots are on a device."""
    return all(slot.device == device for some in slots for slot in some)


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon)
