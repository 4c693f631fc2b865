"""The turn of one feed-forward block in one pass: its inward products and, later, its down products.

One class for each way of choosing neurons:

    TokenPass     token by token: mixed passes of few tokens
    ResidentPass  likewise, with what lies in the slots
    MaskedPass    for many tokens at a time, by masks over dense products: mixed passes that choose for every token
    DensePass     every neuron at the top precision: exact passes, and mixed ones of many tokens

Knows recipes and planes; not modules.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from policies.precision import PRECISION_NAMES, TOP, Recipe, Sizes
from tiercache.kernels.contract import MAX_TOKENS, QuantizedActivations
from tiercache.model.block_matmuls import BlockMatmuls
from tiercache.model.block_planes import Group
from tiercache.model.choosing import TOKENS_AT_ONCE, Choosing
from tiercache.model.importance import SCORERS, Activation, first, largest, needed, scores


@dataclass(frozen=True)
class Ranking:
    """How a block's neurons are chosen.

    Attributes:
        recipe: which scorer ranks them, and how many get which precision.
        activation: of the block.
        norms: of its down columns, [neurons].
        sizes: bytes of its rows, for the statistics.
        choosing: what all blocks share.
    """

    recipe: Recipe
    activation: Activation
    norms: Tensor
    sizes: Sizes
    choosing: Choosing


class BlockPass:
    """A block's turn.

    Attributes:
        x: the input that it is for, [..., features].
        values: of each inward matrix its products with x, [tokens, neurons], fp32.

    The planes of the block are open.
    """

    def __init__(self, matmuls: BlockMatmuls, ranking: Ranking, x: Tensor) -> None:
        self.x, self._matmuls, self._ranking, self._planes = x, matmuls, ranking, matmuls.planes
        self._recipe = ranking.recipe.capped(matmuls.planes.top)
        tokens = matmuls.transform(matmuls.matrix(x))
        shape = (len(tokens), self._planes.block.neurons)
        self.values = [torch.zeros(shape, dtype=torch.float32, device=tokens.device) for _ in range(matmuls.inward)]
        self._fill_values(tokens)

    def _fill_values(self, x: Tensor) -> None:
        """Make every inward product that is going to be asked for; x is [tokens, features], transformed."""
        raise NotImplementedError

    def add_down(self, hidden: Tensor, out: Tensor) -> None:
        """Add the down products of hidden [tokens, neurons] to `out` [tokens, features]."""
        raise NotImplementedError

    def _rank(self, x: Tensor, quantized: QuantizedActivations, token: int) -> tuple[int, ...]:
        """Make the products that neurons are ranked by, for tokens from `token` on; which matrices they are of."""
        scorer, here = self._recipe.scorer, slice(token, token + len(x))
        ranked, channels = needed(scorer, self._matmuls.inward), SCORERS[scorer].channels
        if channels < 1:  # of the model's own inputs: transformed ones are all about as large
            own = self._matmuls.matrix(self.x.reshape(-1, self.x.shape[-1])[here])
            quantized = self._matmuls.quantize_activations(self._matmuls.transform(largest(own, channels)))
        made = self._matmuls.multiply(quantized, self._planes.whole(self._recipe.rank), ranked)
        for part, value in zip(ranked, made, strict=True):
            self.values[part][here] = value
        return ranked

    def _scores(self, here: slice, ranked: tuple[int, ...]) -> Tensor:
        """How much neurons matter to some tokens, by the products that `_rank` has made."""
        known = [value[here] if part in ranked else None for part, value in enumerate(self.values)]
        return scores(known, self._ranking.activation, self._ranking.norms)

    def _missing(self, precision: int, ranked: tuple[int, ...]) -> tuple[int, ...]:
        """The inward matrices whose products at a precision ranking has not made."""
        return tuple(p for p in range(self._matmuls.inward) if precision > self._recipe.rank or p not in ranked)

    def _count(self, order: Tensor) -> None:
        """Enter one token of the block into the statistics."""
        block, choosing = self._planes.block, self._ranking.choosing
        choosing.stats.tokens += block.layer == 0
        choosing.stats.read_bytes += self._recipe.read_bytes(block.neurons, self._ranking.sizes)
        self._trace(order)

    def _trace(self, order: Tensor) -> None:
        if self._ranking.choosing.trace is not None:
            self._ranking.choosing.trace(self._planes.block.layer, order.cpu().numpy())


class TokenPass(BlockPass):
    """Each token's neurons are chosen and multiplied on their own. See `BlockPass`."""

    resident = False

    def _fill_values(self, x: Tensor) -> None:
        self._chosen: list[list[Group]] = []
        for token in range(len(x)):
            groups = self._choose(x[token : token + 1], token)
            keep = self.resident or token + 1 == len(x)  # no other token takes the slots
            self._chosen.append(groups if keep else [self._planes.held(group) for group in groups])

    def _choose(self, x: Tensor, token: int) -> list[Group]:
        """Rank one token's neurons, and make its inward products at their precisions."""
        quantized = self._matmuls.quantize_activations(x)
        ranked = self._rank(x, quantized, token)
        counts = self._recipe.counts(self._planes.block.neurons)
        score = self._scores(slice(token, token + 1), ranked)
        order = first(score[0].float(), counts, in_order=self._ranking.choosing.in_order)
        groups = self._planes.groups(order, counts, keep=self.resident)
        for group in groups:
            if group.added:
                self._add_on_cpu(x, token, group)
                continue
            parts = self._missing(group.precision, ranked)
            made = self._matmuls.multiply(quantized, group.parts, parts, group.neurons, group.rows)
            for part, value in zip(parts, made, strict=True):
                self.values[part][token].index_copy_(0, group.neurons, value[0])
        self._count(order)
        return groups

    def _add_on_cpu(self, x: Tensor, token: int, group: Group) -> None:
        """Add to inward products what the planes above give, multiplied in main memory."""
        neurons = group.neurons.to(self._planes.device)
        for value, out in zip(self.values, self._matmuls.multiply_on_cpu(x, group), strict=True):
            value[token].index_add_(0, neurons, out[0].to(value.device))

    def add_down(self, hidden: Tensor, out: Tensor) -> None:
        for token, groups in enumerate(self._chosen):
            for group in groups:
                self._matmuls.add_down(hidden[token : token + 1], group, out[token : token + 1])


class ResidentPass(TokenPass):
    """As `TokenPass`, with what lies in the slots, which stay as they are; it is not counted."""

    resident = True

    def _count(self, order: Tensor) -> None:
        self._trace(order)


class MaskedPass(BlockPass):
    """Dense products at each precision, of which each token takes its neurons'. See `BlockPass`."""

    def _fill_values(self, x: Tensor) -> None:
        starts = range(0, len(x), TOKENS_AT_ONCE)
        masks = [self._choose(x[at : at + TOKENS_AT_ONCE], at) for at in starts]
        ranked = needed(self._recipe.scorer, self._matmuls.inward)
        counts = self._recipe.counts(self._planes.block.neurons)
        precisions = [precision for precision in range(1, self._planes.top + 1) if counts[TOP - precision]]
        for some, parts in self._planes.chunks(slice(0, self._matmuls.inward)):
            for at, mask in zip(starts, masks, strict=True):
                here = slice(at, at + TOKENS_AT_ONCE)
                quantized = self._matmuls.quantize_activations(x[here])
                for precision in precisions:
                    which = self._missing(precision, ranked)
                    at_precision = [part.at(PRECISION_NAMES[precision]) for part in parts]
                    made = self._matmuls.multiply(quantized, at_precision, which, some)
                    for part, value in zip(which, made, strict=True):
                        target = self.values[part][here, some]
                        target.copy_(torch.where(mask[:, some] == precision, value, target))
        self._precisions = torch.cat(masks)

    def _choose(self, x: Tensor, at: int) -> Tensor:
        """Rank the neurons of tokens from `at` on: the precision of each, uint8 [tokens, neurons]."""
        ranked = self._rank(x, self._matmuls.quantize_activations(x), at)
        neurons = self._planes.block.neurons
        counts = self._recipe.counts(neurons)
        order = self._scores(slice(at, at + len(x)), ranked).topk(sum(counts), dim=1).indices
        precisions = torch.zeros(len(x), neurons, dtype=torch.uint8, device=x.device)
        for precision, some in zip((3, 2, 1), order.split(counts, dim=1), strict=True):
            precisions.scatter_(1, some, precision)
        for token in order:
            self._count(token)
        return precisions

    def add_down(self, hidden: Tensor, out: Tensor) -> None:
        for some, parts in self._planes.chunks(slice(self._matmuls.inward, None)):
            for at in range(0, len(hidden), MAX_TOKENS):
                here = slice(at, at + MAX_TOKENS)
                for precision in range(1, self._planes.top + 1):
                    mask = self._precisions[here, some] == precision
                    if bool(mask.any()):
                        chosen, part = hidden[here, some].where(mask, 0), parts[-1].at(PRECISION_NAMES[precision])
                        self._matmuls.kernels.matmul_transposed(chosen, part, out[here])


class DensePass(BlockPass):
    """Every neuron at the top precision. See `BlockPass`."""

    def _fill_values(self, x: Tensor) -> None:
        every = tuple(range(self._matmuls.inward))
        pieces = [self._matmuls.quantize_activations(x[at : at + MAX_TOKENS]) for at in range(0, len(x), MAX_TOKENS)]
        for some, parts in self._planes.chunks(slice(0, self._matmuls.inward)):
            for place, quantized in enumerate(pieces):
                here = slice(place * MAX_TOKENS, (place + 1) * MAX_TOKENS)
                for value, made in zip(self.values, self._matmuls.multiply(quantized, parts, every, some), strict=True):
                    value[here, some] = made

    def add_down(self, hidden: Tensor, out: Tensor) -> None:
        for some, parts in self._planes.chunks(slice(self._matmuls.inward, None)):
            for at in range(0, len(hidden), MAX_TOKENS):
                here = slice(at, at + MAX_TOKENS)
                self._matmuls.kernels.matmul_transposed(hidden[here, some], parts[-1], out[here])
