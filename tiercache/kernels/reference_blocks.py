"""The halves of a layer in plain torch: the oracle of the backends' own. Slow."""

import torch
from torch import Tensor

from tiercache.kernels.activation import activate
from tiercache.kernels.blocks import Attention, AttentionWeights, FeedForward, FeedForwardWeights
from tiercache.quant import hadamard
from tiercache.quant.planes import Planes, decode


class ReferenceAttention(Attention):
    """See `blocks.Attention`.

    Args:
        weights: of the half.
        dtype: what to compute in; keys and values are rounded to the dtype of x all the same.
    """

    def __init__(self, weights: AttentionWeights, dtype: torch.dtype = torch.float32) -> None:
        self._w, self._dtype = weights, dtype

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        w, tokens = self._w, len(x)
        turned = transformed(norm(x.to(self._dtype), w.norm, w.eps), w.factors)
        made = []
        for planes, bias, heads in zip(w.inward, w.biases, (w.heads, w.key_heads, w.key_heads), strict=True):
            product = turned @ decoded(planes, self._dtype).T
            if bias is not None:
                product = product + bias.to(self._dtype)
            made.append(product.view(tokens, heads, w.head_dim))
        if w.head_norms is not None:
            made[:2] = [norm(part, weight, w.eps) for part, weight in zip(made[:2], w.head_norms, strict=True)]
        queries, keys = (rotated(part, cos.to(self._dtype), sin.to(self._dtype)) for part in made[:2])
        return queries, *(part.to(x.dtype).transpose(0, 1)[None] for part in (keys, made[2]))  # type: ignore[return-value]

    def attend(self, x: Tensor, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        w, tokens, slots = self._w, len(x), keys.shape[2]
        group = w.heads // w.key_heads
        if mask is None:
            mask = torch.ones(tokens, slots, dtype=torch.bool, device=x.device).tril(slots - tokens)
        wide = [part[0].to(self._dtype).repeat_interleave(group, dim=0) for part in (keys, values)]
        scores = queries.to(self._dtype).transpose(0, 1) @ wide[0].transpose(1, 2) * w.scaling
        found = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ wide[1]  # [heads, tokens, head_dim]
        turned = transformed(found.transpose(0, 1).reshape(tokens, -1), w.outward_factors)
        out = turned @ decoded(w.outward, self._dtype).T
        if w.outward_bias is not None:
            out = out + w.outward_bias.to(self._dtype)
        return (x.to(self._dtype) + out).to(x.dtype)


class ReferenceFeedForward(FeedForward):
    """See `blocks.FeedForward`; `dtype` as in `ReferenceAttention`."""

    def __init__(self, weights: FeedForwardWeights, dtype: torch.dtype = torch.float32) -> None:
        self._w, self._dtype = weights, dtype

    def forward(self, x: Tensor) -> Tensor:
        w = self._w
        turned = transformed(norm(x.to(self._dtype), w.norm, w.eps), w.factors)
        gate, up = (turned @ decoded(planes, self._dtype).T for planes in w.inward)
        out = hadamard.transform(activate(w.activation, gate) * up @ decoded(w.down, self._dtype))
        return (x.to(self._dtype) + out * w.down_factors.to(self._dtype)).to(x.dtype)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The RMS norm over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim] turned by its position: number i with number i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def transformed(x: Tensor, factors: Tensor | None) -> Tensor:
    """Inputs as the rows of a matrix want them."""
    return hadamard.transform(x if factors is None else x * factors.to(x.dtype))


def decoded(planes: Planes, dtype: torch.dtype) -> Tensor:
    """The weights as they are stored, transformed."""
    return decode(planes, torch.float32).to(dtype)
