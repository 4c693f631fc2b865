"""A decoder layer in three calls: what its two halves are made of, and what a backend makes of them.

A Llama-like layer is an attention half and a feed-forward half, both with a norm before and a residual around them.
`project` is everything up to the KV cache, `attend` everything behind it. In between the caller appends keys and values
to the cache, which stays transformers' own.

Numbers: all within a half is fp32, but for keys and values, which have the dtype of the model, as the KV cache has.
What a half returns is rounded once, to the dtype of x. The results of a token do not depend on how many other tokens
come with it, nor on where planes lie.

Knows planes and shapes; nothing of modules, slots or caches.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tiercache.quant.planes import Planes


@dataclass(frozen=True, eq=False)
class AttentionWeights:
    """The attention half of a layer.

    Attributes:
        norm: [hidden], of the RMS norm before it, in the model's dtype.
        eps: of all norms here.
        inward: the matrices of queries, keys and values, [heads * head_dim or key_heads * head_dim, hidden].
        factors: what their inputs are multiplied by before the Hadamard transform, fp32 [hidden]; None for ones.
        biases: of those three in the model's dtype, or None.
        head_norms: of queries and of keys, [head_dim] each (Qwen 3), or None.
        outward: the matrix of the outputs, [hidden, heads * head_dim].
        outward_factors: as `factors`, fp32 [heads * head_dim].
        outward_bias: [hidden], or None.
        heads, key_heads, head_dim: heads of queries, of keys and values; numbers in each.
        scaling: what a product of a query with a key is multiplied by.
        stays: whether matrices stay where they lie as long as the model: what comes again may then be kept ready.
    """

    norm: Tensor
    eps: float
    inward: tuple[Planes, Planes, Planes]
    factors: Tensor | None
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    head_norms: tuple[Tensor, Tensor] | None
    outward: Planes
    outward_factors: Tensor | None
    outward_bias: Tensor | None
    heads: int
    key_heads: int
    head_dim: int
    scaling: float
    stays: bool = True


@dataclass(frozen=True, eq=False)
class FeedForwardWeights:
    """The gated feed-forward half of a layer.

    Attributes:
        norm, eps: as `AttentionWeights`.
        inward: gate and up, [neurons, hidden].
        factors: of their inputs, fp32 [hidden]; None for ones.
        down: neuron-major, [neurons, hidden].
        down_factors: what the outputs are multiplied by behind the Hadamard transform, fp32 [hidden].
        activation: of `contract.ACTIVATIONS`.
        stays: as `AttentionWeights`.
    """

    norm: Tensor
    eps: float
    inward: tuple[Planes, Planes]
    factors: Tensor | None
    down: Planes
    down_factors: Tensor
    activation: str
    stays: bool = True


class Attention(Protocol):
    """An attention half, bound to its weights."""

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [tokens, hidden], normed and rotated.

        Args:
            x: the residual stream.
            cos, sin: [tokens, head_dim], as transformers' rotary embedding gives them: halves alike.

        Returns:
            Queries fp32 [tokens, heads, head_dim]; keys and values [1, key_heads, tokens, head_dim], dtype of x.
        """

    def attend(self, x: Tensor, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """x + outward(attention): [tokens, hidden] in the dtype of x.

        Args:
            x: the residual stream that was projected.
            queries: of `project`.
            keys, values: [1, key_heads, slots, head_dim], any strides but the last one's; the newest come last.
            mask: bool [tokens, slots], True where a token attends; None: each attends to itself and what lies before.
        """

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """`project` and `attend` at once: the last slots of keys and values are there to be written."""
        queries, new_keys, new_values = self.project(x, cos, sin)
        begin, tokens = keys.shape[2] - x.shape[0], x.shape[0]
        keys.narrow(2, begin, tokens).copy_(
            new_keys
        )  # not by slices: Python takes longer for those than the copy takes
        values.narrow(2, begin, tokens).copy_(new_values)
        return self.attend(x, queries, keys, values, mask)


class FeedForward(Protocol):
    """A feed-forward half, bound to its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """x + down(act(gate(norm x)) * up(norm x)): [tokens, hidden] in the dtype of x."""
