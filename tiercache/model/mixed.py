"""The forwards of a feed-forward block whose neurons get planes one by one: ranked for each token, then multiplied.

The module that is called first with an input ranks the neurons and makes the inward products; the down matrix then
reads only the neurons that were chosen. Activation and everything else between them stay the model's own code.

    mixed     each token's neurons at the recipe's precisions; a pass of many tokens runs dense, at the top precision
    exact     every neuron at the top precision
    resident  as mixed, with what lies in the slots of an HBM tier, which stay as they are (without one: as mixed)

Knows modules, recipes and planes; not where planes come from.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from policies.precision import PRECISION_NAMES, TOP, Recipe, Sizes
from tiercache.errors import UsageError
from tiercache.kernels.contract import MAX_TOKENS, Kernels, QuantizedActivations
from tiercache.model.importance import SCORERS, Activation, first, largest, needed, scores
from tiercache.model.linear import plain
from tiercache.model.neurons import BlockPlanes, Group, Parts
from tiercache.quant.planes import scale_row_bytes
from tiercache.stats import NeuronStats

Kind = Literal["mixed", "exact", "resident"]
SLICE = 128
"""Tokens whose neurons are chosen at a time in passes of many."""


@dataclass
class Choosing:
    """What all blocks of a model share: how the passes at hand choose neurons.

    Attributes:
        kind: see the module.
        few: passes of up to so many tokens, over the batch, choose neurons token by token.
        always: passes of more tokens choose as well, by masks over dense products.
        stats: where to count.
        in_order: neurons are wanted most important first within a precision, too (where uploads are capped).
        trace: is told each token's choice of each block, in turn: (block, neurons by importance).
    """

    kind: Kind = "mixed"
    few: int = 4
    always: bool = False
    stats: NeuronStats = field(default_factory=NeuronStats)
    trace: Callable[[int, np.ndarray], None] | None = None
    in_order: bool = False

    def chooses(self, tokens: int) -> bool:
        """Whether a pass of so many tokens, over the batch, chooses for each of them."""
        return self.kind == "resident" or (self.kind == "mixed" and (self.always or tokens <= self.few))

    @contextmanager
    def passes(self, kind: Kind) -> Iterator[None]:
        """Passes within run as `kind`."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    @contextmanager
    def every_token(self) -> Iterator[None]:
        """Passes of any length within choose neurons for each token, as single tokens do."""
        before, self.always = self.always, True
        try:
            yield
        finally:
            self.always = before


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
        recipe: see above.
        norms: see above.
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
        self._inward = block.parts - 1
        self._owns = [own for _, own in block.inward]
        self._modules = tuple(modules)  # their biases are asked for when needed: attaching replaces them
        self._activation, self._choosing = activation, choosing
        self._kernels, self._host = kernels[planes.device.type], kernels["cpu"]
        self.sizes = Sizes(block.widths, scale_row_bytes(block.columns, block.group), self._inward)
        self._x: Tensor | None = None
        self._values: list[Tensor] = []
        self._chosen: list[list[Group]] = []
        self._masks: list[Tensor] | None = None

    def inward(self, place: int, x: Tensor) -> Tensor:
        """The forward of inward module `place`: x [..., features] -> [..., its rows]."""
        if self._x is not x:
            self.forget()
            self._begin(x)
        own = self._owns[place]
        made = self._values[own[0]] if len(own) == 1 else torch.cat([self._values[part] for part in own], dim=1)
        return made.view(*x.shape[:-1], -1).to(x.dtype)

    def outward(self, hidden: Tensor) -> Tensor:
        """The forward of the outward module: hidden [..., neurons] -> [..., features]."""
        if self._x is None:
            raise UsageError("a down matrix is multiplied before its block's inward ones; this model is not supported")
        tokens = plain(hidden.reshape(-1, hidden.shape[-1]), self.planes.device)
        out = torch.zeros(len(tokens), self.planes.block.columns, dtype=torch.float32, device=tokens.device)
        if self._chosen:
            for token, groups in enumerate(self._chosen):
                for group in groups:
                    self._down(tokens[token : token + 1], group, out[token : token + 1])
        else:
            self._dense_down(tokens, out)
        out = self._outputs(out)
        if self.watch is not None and self._masks is None and not self._chosen:
            self.watch(Seen(self._x.reshape(-1, self._x.shape[-1]), tokens, out))
        self.forget()
        bias = _bias(self._modules[-1])
        result = out if bias is None else out + bias.to(out.device)
        return result.view(*hidden.shape[:-1], -1).to(hidden.device, hidden.dtype)

    def forget(self) -> None:
        """The block's turn is over, or was cut off."""
        self._x, self._values, self._chosen, self._masks = None, [], [], None
        self.planes.close()

    def matmuls(self, x: Tensor, precision: int) -> list[Tensor]:
        """All inward products of x at a precision that is always there, biases included; within the block's turn."""
        quantized = self._quantize_activations(self._tokens(x))
        return self._inward_products(quantized, self.planes.whole(precision), tuple(range(self._inward)))

    def down(self, hidden: Tensor, precision: int) -> Tensor:
        """hidden [tokens, neurons] times the down matrix at a precision that is always there, fp32; within the turn."""
        out = torch.zeros(len(hidden), self.planes.block.columns, dtype=torch.float32, device=hidden.device)
        part = self.planes.whole(precision)[-1]
        for at in range(0, len(hidden), MAX_TOKENS):
            self._kernels.matmul_transposed(hidden[at : at + MAX_TOKENS], part, out[at : at + MAX_TOKENS])
        return self._outputs(out)

    def _begin(self, x: Tensor) -> None:
        """Open the block and make every inward product that is going to be asked for."""
        self.planes.open()
        self._x = x
        tokens = self._tokens(x)
        choosing = self._choosing
        single = choosing.kind == "resident" or (choosing.kind == "mixed" and len(tokens) <= choosing.few)
        shape = (len(tokens), self.planes.block.neurons)
        self._values = [torch.zeros(shape, dtype=torch.float32, device=tokens.device) for _ in range(self._inward)]
        if single:
            for token in range(len(tokens)):
                self._choose(tokens[token : token + 1], token, last=token + 1 == len(tokens))
        elif choosing.kind == "mixed" and choosing.always:
            self._mask(tokens)
        else:
            self._dense_inward(tokens)

    def _choose(self, x: Tensor, token: int, *, last: bool) -> None:
        """Rank one token's neurons, and make its inward products at their precisions; `last`: no other follows."""
        recipe, choosing = self.recipe.capped(self.planes.top), self._choosing
        quantized = self._quantize_activations(x)
        ranked = self._rank(x, quantized, recipe, token)
        counts = recipe.counts(self.planes.block.neurons)
        score = scores(
            [self._values[part][token : token + 1] if part in ranked else None for part in range(self._inward)],
            self._activation,
            self.norms,
        )
        order = first(score[0].float(), counts, in_order=choosing.in_order)
        groups = self.planes.groups(order, counts, keep=choosing.kind == "resident")
        for group in groups:
            if group.added:
                self._raise(x, token, group)
                continue
            parts = tuple(p for p in range(self._inward) if group.precision > recipe.rank or p not in ranked)
            made = self._inward_products(quantized, group.parts, parts, group)
            for part, value in zip(parts, made, strict=True):
                self._values[part][token].index_copy_(0, group.neurons, value[0])
        keep_all = last or self._choosing.kind == "resident"
        self._chosen.append(groups if keep_all else [self.planes.held(group) for group in groups])
        self._count(recipe, order)

    def _raise(self, x: Tensor, token: int, group: Group) -> None:
        """Add to inward products what the planes above give, multiplied in main memory."""
        neurons = group.neurons.to(self.planes.device)
        outs = [torch.zeros(1, len(neurons), dtype=torch.float32) for _ in range(self._inward)]
        quantized = self._host.quantize_activations(x.cpu(), self.planes.block.group)
        self._host.matmuls(quantized, group.parts[: self._inward], outs, group.rows)
        for value, out in zip(self._values, outs, strict=True):
            value[token].index_add_(0, neurons, out[0].to(value.device))

    def _down(self, hidden: Tensor, group: Group, out: Tensor) -> None:
        """Add one token's down products of a group to `out`."""
        some = hidden.index_select(1, group.neurons.to(hidden.device))
        if not group.added:
            self._kernels.matmul_transposed(some, group.parts[-1], out, group.rows)
            return
        below = torch.zeros(out.shape, dtype=torch.float32)
        self._host.matmul_transposed(some.cpu(), group.parts[-1], below, group.rows)
        out += below.to(out.device)

    def _rank(self, x: Tensor, quantized: QuantizedActivations, recipe: Recipe, token: int) -> tuple[int, ...]:
        """Make the products that the recipe ranks by, of all neurons; which parts they are of."""
        ranked = needed(recipe.scorer, self._inward)
        channels = SCORERS[recipe.scorer].channels
        if channels < 1:  # of the model's own inputs: transformed ones are all about as large
            assert self._x is not None
            own = plain(self._x.reshape(-1, self._x.shape[-1])[token : token + len(x)], self.planes.device)
            quantized = self._quantize_activations(self._tokens(largest(own, channels)))
        made = self._inward_products(quantized, self.planes.whole(recipe.rank), ranked)
        for part, value in zip(ranked, made, strict=True):
            self._values[part][token : token + len(x)] = value
        return ranked

    def _mask(self, x: Tensor) -> None:
        """As `_choose`, for many tokens: dense products at each precision, of which each token takes its neurons'."""
        recipe = self.recipe.capped(self.planes.top)
        ranked = needed(recipe.scorer, self._inward)
        self._masks = [self._rungs(x[at : at + SLICE], at, recipe) for at in range(0, len(x), SLICE)]
        precisions = range(1, self.planes.top + 1)
        wanted = {
            precision: tuple(p for p in range(self._inward) if precision > recipe.rank or p not in ranked)
            for precision in precisions
        }
        counts = recipe.counts(self.planes.block.neurons)
        for some, parts in self.planes.chunks(slice(0, self._inward)):
            for at in range(0, len(x), SLICE):
                quantized, masks = self._quantize_activations(x[at : at + SLICE]), self._masks[at // SLICE][:, some]
                for precision in (precision for precision in precisions if counts[TOP - precision]):
                    made = self._inward_products(
                        quantized, [p.at(PRECISION_NAMES[precision]) for p in parts], wanted[precision], some=some
                    )
                    for part, value in zip(wanted[precision], made, strict=True):
                        target = self._values[part][at : at + SLICE, some]
                        target.copy_(torch.where(masks == precision, value, target))

    def _rungs(self, x: Tensor, at: int, recipe: Recipe) -> Tensor:
        """Rank the neurons of tokens from `at` on: the precision of each, uint8 [tokens, neurons]."""
        ranked = self._rank(x, self._quantize_activations(x), recipe, at)
        known = [self._values[part][at : at + len(x)] if part in ranked else None for part in range(self._inward)]
        counts = recipe.counts(self.planes.block.neurons)
        order = scores(known, self._activation, self.norms).topk(sum(counts), dim=1).indices
        precisions = torch.zeros(len(x), self.planes.block.neurons, dtype=torch.uint8, device=x.device)
        for precision, some in zip((3, 2, 1), order.split(counts, dim=1), strict=True):
            precisions.scatter_(1, some, precision)
        for token in order:
            self._count(recipe, token)
        return precisions

    def _dense_inward(self, x: Tensor) -> None:
        pieces = [self._quantize_activations(x[at : at + MAX_TOKENS]) for at in range(0, len(x), MAX_TOKENS)]
        for some, parts in self.planes.chunks(slice(0, self._inward)):
            for place, quantized in enumerate(pieces):
                at = place * MAX_TOKENS
                made = self._inward_products(quantized, parts, tuple(range(self._inward)), some=some)
                for part, value in enumerate(made):
                    self._values[part][at : at + MAX_TOKENS, some] = value

    def _dense_down(self, hidden: Tensor, out: Tensor) -> None:
        """Every neuron at the top precision, or each token's at their precisions where masks say so."""
        precisions = None if self._masks is None else torch.cat(self._masks)
        for some, parts in self.planes.chunks(slice(self._inward, None)):
            for at in range(0, len(hidden), MAX_TOKENS):
                here = slice(at, at + MAX_TOKENS)
                piece = hidden[here, some]
                if precisions is None:
                    self._kernels.matmul_transposed(piece, parts[-1], out[here])
                    continue
                for precision in range(1, self.planes.top + 1):
                    mask = precisions[here, some] == precision
                    if bool(mask.any()):
                        chosen = piece.where(mask, 0)
                        self._kernels.matmul_transposed(chosen, parts[-1].at(PRECISION_NAMES[precision]), out[here])

    def _tokens(self, x: Tensor) -> Tensor:
        """The block's inputs as a matrix, as the planes want them; within its turn."""
        tokens = plain(x.reshape(-1, x.shape[-1]), self.planes.device)
        return self._kernels.hadamard(tokens, self.planes.input_factors)

    def _outputs(self, sums: Tensor) -> Tensor:
        """What sums of down rows stand for; within the turn."""
        return self._kernels.hadamard(sums, after=self.planes.output_factors)

    def _quantize_activations(self, x: Tensor) -> QuantizedActivations:
        return self._kernels.quantize_activations(x, self.planes.block.group)

    def _inward_products(
        self,
        quantized: QuantizedActivations,
        parts: Parts,
        which: Sequence[int],
        group: Group | None = None,
        some: slice | None = None,
    ) -> list[Tensor]:
        """Products of some inward matrices, biases included: of a group's neurons, or of all that `parts` hold."""
        if not which:
            return []
        rows = None if group is None else group.rows
        count = parts[0].rows if group is None else len(group.neurons)
        device = self.planes.device
        outs = [torch.zeros(quantized.tokens, count, dtype=torch.float32, device=device) for _ in which]
        self._kernels.matmuls(quantized, [parts[part] for part in which], outs, rows)
        for part, out in zip(which, outs, strict=True):
            bias = self._bias_of(part)
            if bias is not None:
                taken = bias.to(device)
                out += taken[group.neurons] if group is not None else taken if some is None else taken[some]
        return outs

    def _bias_of(self, part: int) -> Tensor | None:
        """The bias of an inward matrix: a fused module's lies in halves."""
        for own, module in zip(self._owns, self._modules, strict=False):
            if part in own and (bias := _bias(module)) is not None:
                return bias.view(len(own), -1)[own.index(part)]
        return None

    def _count(self, recipe: Recipe, order: Tensor) -> None:
        """One token of this block."""
        block, stats = self.planes.block, self._choosing.stats
        if self._choosing.kind != "resident":
            stats.tokens += block.layer == 0
            stats.read_bytes += recipe.read_bytes(block.neurons, self.sizes)
        if self._choosing.trace is not None:
            self._choosing.trace(block.layer, order.cpu().numpy())


class MixedForward:
    """The forward of one module of a block; `place` None for the outward one."""

    def __init__(self, block: MixedBlock, place: int | None) -> None:
        self._block, self._place = block, place

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs], in the dtype of x."""
        if x.requires_grad and torch.is_grad_enabled():
            raise UsageError("gradients cannot flow through planes; call the model under torch.no_grad()")
        return self._block.outward(x) if self._place is None else self._block.inward(self._place, x)


def scratch_bytes(neurons: int, features: int, inward: int, tokens: int) -> int:
    """An upper bound of what a block's turn takes in passing, whatever way it chooses."""
    values = 4 * inward * tokens * neurons
    slices = min(tokens, SLICE) * neurons * (4 * (inward + 3) + 8 + 2)  # products, scores, order, masks
    outputs = 4 * tokens * (neurons + 3 * features) + tokens * neurons
    return values + slices + outputs


def _bias(module: nn.Module) -> Tensor | None:
    bias = module.bias
    return bias.detach() if isinstance(bias, Tensor) else None
