"""How a model's head multiplies: block of rows after block of rows, where it is large, or without a copy of its weight.

Knows one matrix; not where it comes from.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from tiercache.model.fused_layer import Slots
from tiercache.model.linear import PlaneForward, refuse_gradients
from tiercache.tiers.device import on_host


class RowBlocksForward:
    """Multiplies by one block of rows after another; each row's bits are those of the whole matrix.

    Args:
        module: an `nn.Linear`.
        blocks: what multiplies by each, and the name that its slots are asked for by, first rows first.
        slots: where they come from.
    """

    def __init__(self, module: nn.Module, blocks: Sequence[tuple[str, PlaneForward]], slots: Slots) -> None:
        self._module, self._blocks, self._slots = module, blocks, slots
        self._features = sum(forward.features for _, forward in blocks)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs], in the dtype of x."""
        refuse_gradients(x)
        out: Tensor | None = None
        first = 0
        for name, forward in self._blocks:
            made = self._block(name, forward, x)
            if out is None:
                out = made.new_empty(len(made), self._features)
            out[:, first : first + forward.features] = made
            first += forward.features
        assert out is not None  # there are two blocks and more
        bias = self._module.bias
        if isinstance(bias, Tensor):
            out += bias.to(out.dtype)
        return out.view(*x.shape[:-1], self._features)

    def _block(self, name: str, forward: PlaneForward, x: Tensor) -> Tensor:
        """The outputs [tokens, rows] of one block, whose slots are held meanwhile."""
        slots = self._slots.take(name)
        try:
            self._slots.hit(self._slots.counted([name]))
            return forward.multiply(x, slots)
        finally:  # outside of a pass nobody else gives it back
            self._slots.give_back(name)


def folding(head: nn.Module) -> Callable[..., torch.Tensor]:
    """A head's forward that makes no copy of its weight in a prefill of one sequence; the bits are the same.

    It gets a slice there, the last tokens, whose strides torch does not fold into rows (`should_fold` of ATen's
    LinearAlgebra.cpp): it copies a weight of 16 bits once for each sequence, and multiplies sequence by sequence.
    Several sequences are left to that, for all rows at once give other bits. So is a single row in fp16, which
    processors with AVX512-FP16 sum in another order when it is folded.
    """
    forward = head.forward

    def folded(x: torch.Tensor) -> torch.Tensor:
        one = x.dim() == 3 and len(x) == 1 and on_host(x.device)  # on a card nobody has held the bits against it
        same = one and (x.dtype is not torch.float16 or x.shape[1] > 1)
        return cast("torch.Tensor", forward(x.reshape(-1, x.shape[-1]).view(x.shape) if same else x))

    return folded
