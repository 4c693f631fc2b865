"""The gated feed-forward half of a layer on a card.

`attention` says what is made once, and which results have the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from tiercache.kernels.activation import check_activation
from tiercache.kernels.blocks import FeedForward, FeedForwardWeights
from tiercache.kernels.contract import ACTIVATIONS
from tiercache.kernels.cuda import down_launches, launches, layer_calls
from tiercache.kernels.cuda.card import KINDS, Card, bytes_of_floats
from tiercache.kernels.cuda.down_launches import Activations, Slices
from tiercache.kernels.cuda.launches import Blocks
from tiercache.kernels.cuda.layer_calls import EnterArguments, SettleArguments
from tiercache.kernels.cuda.layer_products import check_matrix, entered, packed_sizes, products_call, rows_of
from tiercache.kernels.cuda.runs import Graph, Run


@dataclass(frozen=True, eq=False)
class _Ready:
    """The calls for some tokens, and the arguments that change."""

    run: Run
    enter: EnterArguments
    settle: SettleArguments


class CudaFeedForward(FeedForward):
    """See `blocks.FeedForward` and the module.

    Raises:
        UsageError: weights that do not fit one another.
    """

    def __init__(self, weights: FeedForwardWeights, card: Card) -> None:
        w = self._w = weights
        self._card, self._hidden, self._group = card, w.inward[0].columns, w.inward[0].group
        self._neurons, self._scratch = w.down.rows, card.scratch.of_halves()
        self._graphs: WeakSet[Graph] | None = WeakSet() if w.stays else None
        check_activation(w.activation)
        for name, planes in zip(("gate", "up"), w.inward, strict=True):
            check_matrix(name, planes, self._neurons, self._hidden, self._group)
        check_matrix("down", w.down, self._neurons, self._hidden, w.down.group)
        self._norm = card.vector("the norm", w.norm, self._hidden), KINDS[w.norm.dtype], w.eps
        self._factors = card.vector("factors", w.factors, self._hidden, fp32=True)
        self._down_factors = card.vector("down factors", w.down_factors, self._hidden, fp32=True)
        self._inward = [launches.matrix(planes, card.launcher.address) for planes in w.inward]
        self._down = launches.matrix(w.down, card.launcher.address)
        self._together = len(w.inward[0].planes) == len(w.inward[1].planes)
        self._ready: dict[tuple[int, torch.dtype, int], _Ready] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = rows_of(x, self._hidden, self._card)
        tokens, out = x.shape[0], torch.empty_like(x, memory_format=torch.contiguous_format)
        if not tokens:
            return out
        if tokens > self._card.switch or not self._together:
            self._forward_many(x, out)
            return out
        stream = self._card.launcher.stream()
        with self._card.lock:
            ready = self._ready.get((tokens, x.dtype, stream)) or self._made_ready(tokens, x.dtype, stream)
            enter, settle = ready.enter, ready.settle
            enter.x = settle.x = x.data_ptr()
            enter.pitch = settle.pitch = x.stride(0)
            settle.out = out.data_ptr()
            self._card.launcher.run(ready.run)
        return out

    def _made_ready(self, tokens: int, kind: torch.dtype, stream: int) -> _Ready:
        size, down, card = Blocks.of(tokens).size, self._w.down, self._card
        group, groups, multiprocessors = self._down.group, self._down.groups, card.launcher.multiprocessors
        slices = Slices.of(self._neurons, group, groups, multiprocessors, card.by_matrix_units)
        merged = slices.merged(tokens, group, groups, multiprocessors)
        parts = -(-slices.count // merged), slices.padded(tokens), groups * group
        sizes = [bytes_of_floats(Blocks.of(tokens).padded, self._neurons), bytes_of_floats(*parts)]
        inputs = packed_sizes(tokens, self._hidden, self._group, card)
        *packed, inner, partial = self._scratch.pieces(stream, [*inputs, *sizes])
        to = layer_calls.packed(packed, self._group, (tokens, self._hidden), card.by_matrix_units)
        enter = layer_calls.enter_call((0, 0, KINDS[kind]), self._norm, self._factors, to)
        activation = ACTIVATIONS.index(self._w.activation)
        given = Activations(inner, 0, tokens, size, (self._neurons * size, 1, size))
        settle = self._settling(KINDS[kind], partial, parts)
        calls = (
            enter,
            products_call(self._inward, self._w.inward[0], packed, inner, tokens, activation, card),
            down_launches.down_call(self._down, len(down.planes), given, (), partial, self._neurons, slices, merged),
            layer_calls.settle_call(settle, tokens),
        )
        assert isinstance(enter.arguments, EnterArguments)
        ready = _Ready(Run(calls, stream, self._graphs), enter.arguments, settle)
        self._ready[tokens, kind, stream] = ready
        return ready

    def _forward_many(self, x: Tensor, out: Tensor) -> None:
        tokens = len(x)
        found = torch.zeros(tokens, self._hidden, dtype=torch.float32, device=self._card.device)
        given = entered(x, self._norm, self._factors, self._group, self._card)
        self._card.kernels.ffn(given, self._w.inward, self._w.down, self._w.activation, found)
        settle = self._settling(KINDS[x.dtype], found.data_ptr(), (1, tokens, self._hidden))
        settle.x, settle.pitch, settle.out = x.data_ptr(), x.stride(0), out.data_ptr()
        self._card.launcher.launch(layer_calls.settle_call(settle, tokens))

    def _settling(self, kind: int, partial: int, shape: tuple[int, int, int]) -> SettleArguments:
        made = SettleArguments(partial=partial, factors=self._down_factors, kind=kind, columns=self._hidden)
        made.slices, made.padded_tokens, made.padded_columns = shape
        return made
