"""The forwards of a feed-forward block whose neurons get planes one by one: ranked for each token, then multiplied.

A block has one turn in a pass. The turn begins when an inward module is called with a new input: the block then
ranks the neurons and makes all inward products. The turn ends when the outward module has multiplied by the neurons
that were chosen. Activation and everything else between them stay the model's own code.

Knows modules and planes; not where planes come from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from policies.precision import Recipe, Sizes
from tiercache.errors import UsageError
from tiercache.kernels.contract import Kernels
from tiercache.model.block_matmuls import BlockMatmuls
from tiercache.model.block_passes import BlockPass, DensePass, MaskedPass, Ranking, ResidentPass, TokenPass
from tiercache.model.block_planes import BlockPlanes
from tiercache.model.choosing import TOKENS_AT_ONCE, Choosing
from tiercache.model.importance import Activation
from tiercache.model.linear import refuse_gradients
from tiercache.quant.planes import scale_row_bytes


@dataclass(frozen=True)
class Seen:
    """What a block had in one dense pass, for whoever calibrates.

    Attributes:
        x: inputs [tokens, features].
        hidden: what the down matrix was multiplied with, [tokens, neurons].
        output: what it gave, [tokens, features], fp32.
    """

    x: Tensor
    hidden: Tensor
    output: Tensor


class MixedBlock:
    """One feed-forward block.

    Attributes:
        planes: where its planes are.
        recipe: how its neurons are chosen; may be set between passes.
        norms: of its down columns, [neurons]; may be set before the first mixed pass.
        watch: is told of each dense pass, if set.

    Args:
        planes: of the block.
        modules: its inward modules, in the order of the block's, and the outward one.
        activation: between them.
        kernels: who multiplies, by the kind of device.
        choosing: shared by all blocks.
    """

    def __init__(
        self,
        planes: BlockPlanes,
        modules: Sequence[nn.Module],
        activation: Activation,
        kernels: Mapping[str, Kernels],
        choosing: Choosing,
        recipe: Recipe,
        norms: Tensor,
    ) -> None:
        self.planes, self.recipe, self.norms = planes, recipe, norms
        self.watch: Callable[[Seen], None] | None = None
        block = planes.block
        self.sizes = Sizes(block.widths, scale_row_bytes(block.columns, block.group), block.parts - 1)
        self._owns = [own for _, own in block.inward]
        self._matmuls = BlockMatmuls(planes, modules, kernels)
        self._activation, self._choosing = activation, choosing
        self._turn: BlockPass | None = None

    def inward(self, place: int, x: Tensor) -> Tensor:
        """The forward of inward module `place`: x [..., features] -> [..., its rows]."""
        refuse_gradients(x)
        if self._turn is None or self._turn.x is not x:
            self.forget()
            self.planes.open()
            ranking = Ranking(self.recipe, self._activation, self.norms, self.sizes, self._choosing)
            self._turn = self._pass_of(x)(self._matmuls, ranking, x)
        values = [self._turn.values[part] for part in self._owns[place]]
        made = values[0] if len(values) == 1 else torch.cat(values, dim=1)
        return made.view(*x.shape[:-1], -1).to(x.dtype)

    def outward(self, hidden: Tensor) -> Tensor:
        """The forward of the outward module: hidden [..., neurons] -> [..., features]."""
        refuse_gradients(hidden)
        if self._turn is None:
            raise UsageError("a down matrix is multiplied before its block's inward ones; this model is not supported")
        tokens = self._matmuls.matrix(hidden)
        out = torch.zeros(len(tokens), self.planes.block.columns, dtype=torch.float32, device=tokens.device)
        self._turn.add_down(tokens, out)
        out = self._matmuls.transform_back(out)
        if self.watch is not None and isinstance(self._turn, DensePass):
            x = self._turn.x
            self.watch(Seen(x.reshape(-1, x.shape[-1]), tokens, out))
        self.forget()
        bias = self._matmuls.down_bias()
        result = out if bias is None else out + bias.to(out.device)
        return result.view(*hidden.shape[:-1], -1).to(hidden.device, hidden.dtype)

    def forget(self) -> None:
        """The block's turn is over, or was interrupted."""
        self._turn = None
        self.planes.close()

    def matmuls(self, x: Tensor, precision: int) -> list[Tensor]:
        """All inward products of x at a precision that is always there, biases included; within the block's turn."""
        made = self._matmuls
        quantized = made.quantize_activations(made.transform(made.matrix(x)))
        return made.multiply(quantized, self.planes.whole(precision), tuple(range(made.inward)))

    def down(self, hidden: Tensor, precision: int) -> Tensor:
        """hidden [tokens, neurons] times the down matrix at a precision that is always there, fp32; within the turn."""
        return self._matmuls.down(hidden, precision)

    def _pass_of(self, x: Tensor) -> type[BlockPass]:
        """How the pass at hand chooses neurons."""
        choosing = self._choosing
        if choosing.kind == "resident":
            return ResidentPass
        if choosing.kind == "mixed" and x.shape[:-1].numel() <= choosing.few:
            return TokenPass
        return MaskedPass if choosing.kind == "mixed" and choosing.always else DensePass


def scratch_bytes(neurons: int, features: int, inward: int, tokens: int) -> int:
    """An upper bound of what a block's turn takes in passing, whatever way it chooses."""
    values = 4 * inward * tokens * neurons
    slices = min(tokens, TOKENS_AT_ONCE) * neurons * (4 * (inward + 3) + 8 + 2)  # products, scores, order, masks
    outputs = 4 * tokens * (neurons + 3 * features) + tokens * neurons
    return values + slices + outputs
