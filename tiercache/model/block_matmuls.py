"""The matmuls of one feed-forward block's planes, with its factors and biases.

Knows modules, kernels and planes; not which neurons are wanted.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tiercache.kernels.contract import MAX_TOKENS, Kernels, Parts, QuantizedActivations, Selection
from tiercache.model.block_planes import BlockPlanes, Group
from tiercache.model.linear import plain


class BlockMatmuls:
    """The matmuls of one block; all but the biases need its planes to be open.

    Attributes:
        planes: of the block.
        inward: how many inward matrices it has.
        kernels: multiply where the planes are.
        cpu_kernels: multiply in main memory.

    Args:
        modules: its inward modules, in the order of the block's, and the outward one.
        kernels: who multiplies, by the kind of device.
    """

    def __init__(self, planes: BlockPlanes, modules: Sequence[nn.Module], kernels: Mapping[str, Kernels]) -> None:
        self.planes, self.inward = planes, planes.block.parts - 1
        self.kernels, self.cpu_kernels = kernels[planes.device.type], kernels["cpu"]
        self._owns = [own for _, own in planes.block.inward]
        self._modules = tuple(modules)  # their biases are asked for when needed: attaching replaces them

    def matrix(self, x: Tensor) -> Tensor:
        """x [..., features] as [tokens, features], where the planes are."""
        return plain(x.reshape(-1, x.shape[-1]), self.planes.device)

    def transform(self, tokens: Tensor) -> Tensor:
        """Inputs [tokens, features] as the inward planes want them."""
        return self.kernels.hadamard(tokens, self.planes.input_factors)

    def transform_back(self, sums: Tensor) -> Tensor:
        """What sums of down rows stand for."""
        return self.kernels.hadamard(sums, after=self.planes.output_factors)

    def quantize_activations(self, x: Tensor) -> QuantizedActivations:
        """Transformed inputs, ready for inward matmuls."""
        return self.kernels.quantize_activations(x, self.planes.block.group)

    def multiply(
        self,
        quantized: QuantizedActivations,
        parts: Parts,
        which: Sequence[int],
        some: slice | Tensor = slice(None),  # noqa: B008
        rows: Selection = None,
    ) -> list[Tensor]:
        """Products of the inward matrices `which`, biases included.

        Args:
            quantized: the inputs.
            parts: the matrices.
            which: of them.
            some: which neurons of the block `parts` hold, or `rows` select.
            rows: where these neurons lie; None for all that `parts` hold.
        """
        shape = quantized.tokens, len(some) if isinstance(some, Tensor) else parts[0].rows
        made = [torch.zeros(shape, dtype=torch.float32, device=self.planes.device) for _ in which]
        if which:
            self.kernels.matmuls(quantized, [parts[part] for part in which], made, rows)
        for part, out in zip(which, made, strict=True):
            if (bias := self._bias_of(part)) is not None:
                out += bias.to(self.planes.device)[some]
        return made

    def multiply_on_cpu(self, x: Tensor, group: Group) -> list[Tensor]:
        """What the planes above add to all inward products of one token, multiplied in main memory; without biases."""
        outs = [torch.zeros(1, len(group.neurons), dtype=torch.float32) for _ in range(self.inward)]
        quantized = self.cpu_kernels.quantize_activations(x.cpu(), self.planes.block.group)
        self.cpu_kernels.matmuls(quantized, group.parts[: self.inward], outs, group.rows)
        return outs

    def add_down(self, hidden: Tensor, group: Group, out: Tensor) -> None:
        """Add one token's down products of a group to `out`."""
        some = hidden.index_select(1, group.neurons.to(hidden.device))
        if not group.added:
            self.kernels.matmul_transposed(some, group.parts[-1], out, group.rows)
            return
        sums = torch.zeros(out.shape, dtype=torch.float32)
        self.cpu_kernels.matmul_transposed(some.cpu(), group.parts[-1], sums, group.rows)
        out += sums.to(out.device)

    def down(self, hidden: Tensor, precision: int) -> Tensor:
        """hidden [tokens, neurons] times the down matrix at a precision that is always there, fp32."""
        out = torch.zeros(len(hidden), self.planes.block.columns, dtype=torch.float32, device=hidden.device)
        part = self.planes.whole(precision)[-1]
        for at in range(0, len(hidden), MAX_TOKENS):
            self.kernels.matmul_transposed(hidden[at : at + MAX_TOKENS], part, out[at : at + MAX_TOKENS])
        return self.transform_back(out)

    def down_bias(self) -> Tensor | None:
        """The bias of the outward module."""
        return _bias(self._modules[-1])

    def _bias_of(self, part: int) -> Tensor | None:
        """The bias of an inward matrix: a fused module's lies in halves."""
        for own, module in zip(self._owns, self._modules, strict=False):
            if part in own and (bias := _bias(module)) is not None:
                return bias.view(len(own), -1)[own.index(part)]
        return None


def _bias(module: nn.Module) -> Tensor | None:
    bias = module.bias
    return bias.detach() if isinstance(bias, Tensor) else None
