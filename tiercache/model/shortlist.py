"""The head's forward in mixed mode: every token's logit at int3, then the likeliest tokens' once more at int8.

Knows one matrix, and how the passes at hand choose; not where its planes come from.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tiercache.kernels.contract import MAX_TOKENS, Kernels, QuantizedActivations
from tiercache.model.choosing import TOKENS_AT_ONCE, Choosing
from tiercache.model.linear import Inputs, PlaneForward, plain, transformed
from tiercache.quant.planes import PRECISIONS, Planes, plane_widths, scale_row_bytes
from tiercache.store.manifest import PlaneWeight

ONE_IN = 24
"""One row in so many is multiplied again. On SmolLM2 these 2048 of 49,152 tokens hold all but .002 nats; twice as many
win less for a byte than neurons do at any budget (docs/measured.md)."""
_LOW = "int3"
_SORTING = 4  # rows that torch sorts at a time, by threads


class ShortlistForward(PlaneForward):
    """As `PlaneForward`, for a matrix with a row for each token of the vocabulary.

    Where it is asked for as few tokens as passes choose neurons for, it is read at int3, and a shortlist of its rows at
    int8: also behind a long prompt, of which the last token's logits alone are wanted. Else it is read at int8.

    Args:
        name, module, weight, kernels, inputs: as `PlaneForward`'s, of the head.
        choosing: what the feed-forward blocks share.
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        weight: PlaneWeight,
        kernels: Mapping[str, Kernels],
        inputs: Inputs,
        choosing: Choosing,
    ) -> None:
        super().__init__(name, module, weight, kernels, inputs)
        self._choosing = choosing
        self._alone = False  # it multiplies in its own way

    def _matmul(self, x: Tensor, tokens: Tensor, slots: Sequence[Tensor], *, alone: bool = False) -> Tensor:
        if not self._choosing.chooses(MAX_TOKENS if alone else len(tokens)):  # alone: a piece of a longer pass
            return super()._matmul(x, tokens, slots, alone=alone)
        kernels, (planes,) = self._kernels[slots[0].device.type], self._parts(slots)
        tokens = transformed(kernels, plain(tokens, kernels.device), self._weight, slots[0])
        out = torch.zeros(len(tokens), self.features, dtype=torch.float32, device=tokens.device)
        step = 1 if len(tokens) <= self._choosing.few else TOKENS_AT_ONCE
        for at in range(0, len(tokens), step):
            quantized = kernels.quantize_activations(tokens[at : at + step], self._weight.group)
            _shortlisted(kernels, quantized, planes, out[at : at + step])
        return out


def _shortlisted(kernels: Kernels, quantized: QuantizedActivations, planes: Planes, out: Tensor) -> None:
    """Logits of some tokens into `out`, which is 0; of one token the shortlist's rows alone are read again."""
    kernels.matmul(quantized, planes.at(_LOW), out)
    again = out.topk(shortlist(planes.rows), dim=1, sorted=False).indices
    if len(out) > 1:
        whole = torch.zeros_like(out)
        kernels.matmul(quantized, planes, whole)
        out.scatter_(1, again, whole.gather(1, again))
        return
    rows = again[0].sort().values  # memory is read in its order
    values = torch.zeros(1, len(rows), dtype=torch.float32, device=out.device)
    kernels.matmul(quantized, planes, values, rows)
    out[0].index_copy_(0, rows, values[0])


def shortlist(rows: int) -> int:
    """How many rows of a vocabulary's are multiplied again."""
    return -(-rows // ONE_IN)


def scratch_bytes(weight: PlaneWeight, tokens: int) -> int:
    """An upper bound of what choosing takes in passing: whole logits, the chosen ones, and a sort's pairs."""
    return weight.rows * (5 * min(tokens, TOKENS_AT_ONCE) + 16 * _SORTING)


def read_bytes(weight: PlaneWeight) -> int:
    """What one token's logits read."""
    planes = plane_widths(weight.columns, weight.group, len(weight.plane_at))
    scales = scale_row_bytes(weight.columns, weight.group)
    low, whole = sum(planes[: PRECISIONS[_LOW]]) + scales, sum(planes) + scales
    return weight.rows * low + shortlist(weight.rows) * whole
