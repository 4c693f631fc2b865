"""The backend that says what is right: plain torch over decoded weights, in fp32 or fp64, on any device. Slow."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tiercache.kernels import contract
from tiercache.kernels.activation import activate
from tiercache.kernels.blocks import Attention, AttentionWeights, FeedForward, FeedForwardWeights
from tiercache.kernels.contract import Kernels, Parts, QuantizedActivations, Selection, SlotRows
from tiercache.kernels.reference_blocks import ReferenceAttention, ReferenceFeedForward
from tiercache.quant import hadamard
from tiercache.quant.planes import Planes, decode


class ReferenceKernels(Kernels):
    """See `contract.Kernels`.

    Args:
        device: where the planes and activations are.
        dtype: what to compute in; fp64 leaves nothing but the weights' own rounding.
    """

    name = "reference"

    def __init__(self, device: torch.device | None = None, dtype: torch.dtype = torch.float32) -> None:
        self.device, self._dtype = device or torch.device("cpu"), dtype

    def quantize_activations(self, x: Tensor, group: int) -> QuantizedActivations:
        contract.check_activations(x)
        return QuantizedActivations(x.shape[0], x.shape[1], group, (x.to(self._dtype),))

    def hadamard(self, x: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        contract.check_transform(x, before, after)
        turned = hadamard.transform(x.float() if before is None else x.float() * before)
        return turned if after is None else turned * after

    def matmul(self, x: QuantizedActivations, weight: Planes, out: Tensor, rows: Selection = None) -> None:
        contract.check_output(out, x.tokens, contract.checked_rows(rows, weight), self.device)
        out += x.data[0] @ self._weights(weight, rows).T

    def matmul_transposed(self, x: Tensor, weight: Planes, out: Tensor, rows: Selection = None) -> None:
        contract.check_activations(x, contract.checked_rows(rows, weight))
        contract.check_output(out, x.shape[0], weight.columns, self.device)
        out += x.to(self._dtype) @ self._weights(weight, rows)

    def ffn(
        self, x: QuantizedActivations, inward: Parts, down: Planes, activation: str, out: Tensor, rows: Selection = None
    ) -> None:
        contract.checked_rows(rows, *inward, down)
        hidden = activate(activation, x.data[0] @ self._weights(inward[0], rows).T)
        for more in inward[1:]:
            hidden = hidden * (x.data[0] @ self._weights(more, rows).T)
        contract.check_output(out, x.tokens, down.columns, self.device)
        out += hidden @ self._weights(down, rows)

    def attention(self, weights: AttentionWeights) -> Attention:
        return ReferenceAttention(weights, self._dtype)

    def feed_forward(self, weights: FeedForwardWeights) -> FeedForward:
        return ReferenceFeedForward(weights, self._dtype)

    def gather(self, pieces: Sequence[Tensor], rows: Tensor, out: Tensor) -> None:
        at = 0
        for piece in pieces:
            nbytes = rows.numel() * piece.shape[1]
            out[at : at + nbytes].view(rows.numel(), piece.shape[1]).copy_(piece[rows.long()])
            at += nbytes

    def _weights(self, weight: Planes, rows: Selection) -> Tensor:
        if isinstance(rows, Tensor):
            rows = SlotRows((rows,) * len(weight.planes), rows)
        if rows is not None:
            planes = tuple(plane[some.long()] for plane, some in zip(weight.planes, rows.planes, strict=False))
            scales = weight.scales[rows.scales.long()]
            weight = replace(weight, planes=planes, scales=scales, slabs=False)
        return decode(weight, torch.float32).to(self._dtype)
