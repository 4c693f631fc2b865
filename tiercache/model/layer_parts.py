"""Which decoder layers the kernels can run as one piece, and what they are made of.

Knows transformers' Llama-like layers and planes; nothing of slots or kernels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tiercache.kernels.activation import FUNCTIONS
from tiercache.model.linear import is_down
from tiercache.store.manifest import PlaneWeight

_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Layers of transformers whose forward is the one that `kernels.blocks` tells."""

INWARD, OUTWARD = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"
GATED, DOWN = ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"
"""Names of linear modules within a layer."""

_ACTIVATIONS: Mapping[str, str] = {"swish": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh"}


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
    def halves(self) -> list[list[str]]:
        """The modules of each half, by their names in the model: a call holds the weights of all of them."""
        halves = [(*INWARD, OUTWARD), *([(*GATED, DOWN)] if self.feed_forward else [])]
        return [[f"{self.name}.{part}" for part in half] for half in halves]

    @property
    def heads(self) -> tuple[int, int, int]:
        """Heads of queries, heads of keys and values, and numbers in each."""
        size = int(getattr(self.layer.get_submodule("self_attn"), "head_dim"))  # noqa: B009 - a module of any class
        queries, keys = (self.weights[part].rows // size for part in INWARD[:2])
        return queries, keys, size

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
        own = {part: weights.get(f"{name}.{part}") for part in (*INWARD, OUTWARD, *GATED, DOWN)}
        planes = {part: weight for part, weight in own.items() if isinstance(weight, PlaneWeight)}
        if _attends(layer, planes):
            found.append(LayerParts(name, layer, planes, _feeds_forward(layer, planes)))
    return found


def _attends(layer: nn.Module, weights: Mapping[str, PlaneWeight]) -> bool:
    """Whether the matrices of attention lie as the kernels want them."""
    matrices = [weights.get(part) for part in (*INWARD, OUTWARD)]
    if any(weight is None or len(weight.own) != 1 for weight in matrices):
        return False
    modules = [layer.get_submodule(part) for part in (*INWARD, OUTWARD)]
    if any(is_down(module, weight) for module, weight in zip(modules, matrices, strict=True) if weight is not None):
        return False
    inward = [weights[part] for part in INWARD]
    return len({(weight.group, weight.inputs) for weight in inward}) == 1


def _feeds_forward(layer: nn.Module, weights: Mapping[str, PlaneWeight]) -> bool:
    """Whether the feed-forward block is one unit of gate, up and down without biases."""
    if any(part not in weights for part in (*GATED, DOWN)) or activation_name(layer) is None:
        return False
    units = {weights[part].units for part in (*GATED, DOWN)}
    biased = any(layer.get_submodule(part).bias is not None for part in (*GATED, DOWN))
    return len(units) == 1 and not biased and is_down(layer.get_submodule(DOWN), weights[DOWN])


def activation_name(layer: nn.Module) -> str | None:
    """What the kernels call the activation of a layer's feed-forward block; None where they have none like it."""
    name = getattr(layer.get_submodule("self_attn").config, "hidden_act", None)
    name = _ACTIVATIONS.get(name, name) if isinstance(name, str) else None
    return name if name in FUNCTIONS else None
