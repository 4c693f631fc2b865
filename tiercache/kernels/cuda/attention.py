"""The attention half of a layer on a card.

Few launches and little Python: all that stays the same from pass to pass is made once for each number of tokens, and a
pass writes what changes into it. A token's results have the same bits however many tokens come with it (before
capability 8.0, as long as all passes have as many as `switch` or fewer): a plain pass and a tree pass in which a
token's slots lie at the same places agree to the bit. Where the same tokens lie at other slots, sums are made in
another order, and results are as close as fp32 sums in any order are. A token that may attend to nothing gets zeros for
its attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakSet

import torch
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.kernels.blocks import Attention, AttentionWeights
from tiercache.kernels.cuda import layer_calls
from tiercache.kernels.cuda.card import KINDS, Card, bytes_of_floats
from tiercache.kernels.cuda.launches import Blocks
from tiercache.kernels.cuda.layer_calls import (
    SLICE,
    AttentionArguments,
    EnterArguments,
    Heads,
    LeaveArguments,
    RotateArguments,
    Units,
)
from tiercache.kernels.cuda.layer_products import Product, check_attention, empty_inputs, entered, packed_sizes, rows_of
from tiercache.kernels.cuda.pass_arguments import check_attended, point, turn, write
from tiercache.kernels.cuda.runs import Graph, Run

_DENSE = torch.contiguous_format


@dataclass(frozen=True, eq=False)
class _Projecting:
    """The calls of `project` for some tokens, and the arguments that change."""

    run: Run
    enter: EnterArguments
    rotate: RotateArguments


@dataclass(eq=False)
class _Attending:
    """The calls of `attend` for some tokens, and the arguments that change."""

    run: Run
    units: Units
    attention: AttentionArguments
    leave: LeaveArguments


@dataclass(frozen=True, eq=False)
class _Stepping:
    """The calls of `step` for some tokens: those of both parts; `queries`: the address of what lies between."""

    run: Run
    projecting: _Projecting
    attending: _Attending
    queries: int


class CudaAttention(Attention):
    """See `blocks.Attention` and the module.

    Raises:
        UsageError: heads or weights that the kernels do not take.
    """

    def __init__(self, weights: AttentionWeights, card: Card) -> None:
        w = self._w = weights
        self._card, self._heads = card, Heads(w.heads, w.key_heads, w.head_dim)
        self._scratch = card.scratch.of_halves()
        self._graphs: WeakSet[Graph] | None = WeakSet() if w.stays else None
        self._hidden, self._group = w.inward[0].columns, w.inward[0].group
        check_attention(w, self._heads)
        self._inward = [Product(planes, card) for planes in w.inward]
        self._outward = Product(w.outward, card)
        self._norm = card.vector("the norm", w.norm, self._hidden), KINDS[w.norm.dtype], w.eps
        self._factors = card.vector("factors", w.factors, self._hidden, fp32=True)
        columns = self._heads.columns
        self._outward_factors = card.vector("outward factors", w.outward_factors, columns, fp32=True)
        self._outward_bias = card.vector("outward bias", w.outward_bias, self._hidden)
        self._biases = [card.vector("a bias", b, p.rows) for b, p in zip(w.biases, w.inward, strict=True)]
        norms = w.head_norms or (None, None)
        self._head_norms = [card.vector("a norm of heads", norm, w.head_dim) for norm in norms]
        self._projecting: dict[tuple[int, torch.dtype, torch.dtype, int], _Projecting] = {}
        self._attending: dict[tuple[int, torch.dtype, torch.dtype, int], _Attending] = {}
        self._stepping: dict[tuple[int, torch.dtype, torch.dtype, int], _Stepping] = {}
        self._units: dict[tuple[int, int], Units] = {}
        self._shaped: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = rows_of(x, self._hidden, self._card)
        tokens = x.shape[0]
        cos, sin = turn(cos, sin, (tokens, self._heads.size), self._card)
        queries, keys = (torch.empty_like(each, memory_format=_DENSE) for each in self._projected(tokens, x.dtype))
        values = torch.empty_like(keys)
        if not tokens:
            return queries, keys, values
        if tokens > self._card.switch:
            self._project_many(x, (cos, sin), (queries, keys, values))
            return queries, keys, values
        stream = self._card.launcher.stream()
        with self._card.lock:
            wanted = tokens, x.dtype, cos.dtype, stream
            ready = self._projecting.get(wanted) or self._ready_to_project(*wanted)
            ready.enter.x, ready.enter.pitch = x.data_ptr(), x.stride(0)
            write(ready.rotate, (cos, sin), queries.data_ptr(), (keys, values))
            self._card.launcher.run(ready.run)
        return queries, keys, values

    def attend(self, x: Tensor, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        x = rows_of(x, self._hidden, self._card)
        tokens, slots = x.shape[0], keys.shape[2]
        check_attended(self._heads, self._card, (tokens, queries), (keys, values), mask)
        out = torch.empty_like(x, memory_format=_DENSE)
        if not tokens:
            return out
        if mask is not None and mask.stride(1) != 1:
            mask = mask.contiguous()
        if tokens > self._card.switch:
            self._attend_many(x, queries.contiguous(), (keys, values), mask, out)
            return out
        queries = queries.contiguous()
        units = self._units_of(tokens, slots)
        stream = self._card.launcher.stream()
        with self._card.lock:
            ready = self._attending.get((tokens, x.dtype, keys.dtype, stream))
            if ready is None or ready.units is not units:
                ready = self._ready_to_attend(tokens, x.dtype, keys.dtype, stream, units)
            point(ready.attention, queries.data_ptr(), keys, values, mask)
            leave = ready.leave
            leave.x, leave.pitch, leave.out = x.data_ptr(), x.stride(0), out.data_ptr()
            self._card.launcher.run(ready.run)
        return out

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """`project` and `attend` at once: the last slots of keys and values are there to be written."""
        x = rows_of(x, self._hidden, self._card)
        tokens, slots = x.shape[0], keys.shape[2]
        like, _ = self._projected(tokens, x.dtype)
        check_attended(self._heads, self._card, (tokens, like), (keys, values), mask)
        if tokens > slots:
            raise UsageError(f"{slots} slots for {tokens} new tokens; give keys and values with room for them")
        if not 0 < tokens <= self._card.switch or keys.dtype != x.dtype:
            queries, *new = self.project(x, cos, sin)
            for kept, each in zip((keys, values), new, strict=True):
                kept.narrow(2, slots - tokens, tokens).copy_(each)
            return self.attend(x, queries, keys, values, mask)
        cos, sin = turn(cos, sin, (tokens, self._heads.size), self._card)
        out = torch.empty_like(x, memory_format=_DENSE)
        if mask is not None and mask.stride(1) != 1:
            mask = mask.contiguous()
        units, stream = self._units_of(tokens, slots), self._card.launcher.stream()
        with self._card.lock:
            ready = self._stepping.get((tokens, x.dtype, cos.dtype, stream))
            if ready is None or ready.attending.units is not units:
                ready = self._ready_to_step(tokens, x.dtype, cos.dtype, stream, units)
            enter, leave = ready.projecting.enter, ready.attending.leave
            enter.x = leave.x = x.data_ptr()
            enter.pitch = leave.pitch = x.stride(0)
            leave.out = out.data_ptr()
            write(ready.projecting.rotate, (cos, sin), ready.queries, (keys, values), slots - tokens)
            point(ready.attending.attention, ready.queries, keys, values, mask)
            self._card.launcher.run(ready.run)
        return out

    def _ready_to_step(self, tokens: int, kind: torch.dtype, turn: torch.dtype, stream: int, units: Units) -> _Stepping:
        """Both parts have the same scratch, one after the other; queries lie behind whatever each has there."""
        first = self._ready_to_project(tokens, kind, turn, stream)
        second = self._ready_to_attend(tokens, kind, kind, stream, units)
        sizes = [*self._sizes_projecting(tokens), *self._sizes_attending(tokens, units)]
        *_, queries = self._scratch.pieces(stream, [*sizes, bytes_of_floats(tokens, self._heads.columns)])
        run = Run([each.call for part in (first, second) for each in part.run.calls], stream, self._graphs)
        ready = _Stepping(run, first, second, queries)
        self._stepping[tokens, kind, turn, stream] = ready
        return ready

    def _sizes_projecting(self, tokens: int) -> list[int]:
        """Bytes of scratch: inputs, queries, keys, values."""
        padded = Blocks.of(tokens).padded
        found = [bytes_of_floats(padded, product.planes.rows) for product in self._inward]
        return [*packed_sizes(tokens, self._hidden, self._group, self._card), *found]

    def _sizes_attending(self, tokens: int, units: Units) -> list[int]:
        """Bytes of scratch: inputs, their product, what units attended to, and its weights."""
        columns = self._heads.columns
        weights = bytes_of_floats(2, units.count, tokens, self._heads.queries)
        found = bytes_of_floats(Blocks.of(tokens).padded, self._hidden)
        packed = packed_sizes(tokens, columns, self._w.outward.group, self._card)
        return [*packed, found, bytes_of_floats(units.count, tokens, columns), weights]

    def _projected(self, tokens: int, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        """What queries and keys are like, of one number each: `empty_like` is the cheapest way to memory."""
        known = self._shaped.get((tokens, kind))
        if known is None:
            heads, one = self._heads, torch.empty(1, dtype=kind, device=self._card.device)
            queries = one.float().expand(tokens, heads.queries, heads.size)
            known = self._shaped[tokens, kind] = queries, one.expand(1, heads.keys, tokens, heads.size)
        return known

    def _ready_to_project(self, tokens: int, kind: torch.dtype, turn: torch.dtype, stream: int) -> _Projecting:
        *inputs, q, k, v = self._scratch.pieces(stream, self._sizes_projecting(tokens))
        to = layer_calls.packed(inputs, self._group, (tokens, self._hidden), self._card.by_matrix_units)
        enter = layer_calls.enter_call((0, 0, KINDS[kind]), self._norm, self._factors, to)
        rotate = self._rotation(tokens, Blocks.of(tokens).size, KINDS[kind], KINDS[turn])
        rotate.found[:] = q, k, v
        products = [product.call(inputs, at, tokens) for product, at in zip(self._inward, (q, k, v), strict=True)]
        calls = (enter, *products, layer_calls.rotate_call(rotate))
        assert isinstance(enter.arguments, EnterArguments)
        ready = self._projecting[tokens, kind, turn, stream] = _Projecting(
            Run(calls, stream, self._graphs), enter.arguments, rotate
        )
        return ready

    def _ready_to_attend(
        self, tokens: int, kind: torch.dtype, kept: torch.dtype, stream: int, units: Units
    ) -> _Attending:
        columns, group, card = self._heads.columns, self._w.outward.group, self._card
        *inputs, product, attended, weight = self._scratch.pieces(stream, self._sizes_attending(tokens, units))
        attention = self._attention(tokens, attended, weight)
        to = layer_calls.packed(inputs, group, (tokens, columns), card.by_matrix_units)
        leave = self._leaving(tokens, Blocks.of(tokens).size, KINDS[kind], product)
        calls = (
            layer_calls.attention_call(attention, KINDS[kept], units),
            layer_calls.combine_call((attended, weight), self._outward_factors, units, self._heads.size, to),
            self._outward.call(inputs, product, tokens),
            layer_calls.leave_call(leave),
        )
        ready = self._attending[tokens, kind, kept, stream] = _Attending(
            Run(calls, stream, self._graphs), units, attention, leave
        )
        return ready

    def _project_many(self, x: Tensor, turns: tuple[Tensor, Tensor], made: tuple[Tensor, Tensor, Tensor]) -> None:
        ready = entered(x, self._norm, self._factors, self._group, self._card)
        found = [product.found(ready) for product in self._inward]
        rotate = self._rotation(len(x), 1, KINDS[x.dtype], KINDS[turns[0].dtype])
        rotate.found[:] = [each.data_ptr() for each in found]
        write(rotate, turns, made[0].data_ptr(), made[1:])
        self._card.launcher.launch(layer_calls.rotate_call(rotate))

    def _attend_many(
        self, x: Tensor, queries: Tensor, kept: tuple[Tensor, Tensor], mask: Tensor | None, out: Tensor
    ) -> None:
        tokens, heads, launcher = len(x), self._heads, self._card.launcher
        units = self._units_of(tokens, kept[0].shape[2])
        attended = self._card.floats(units.count, tokens, heads.columns)
        weights = self._card.floats(units.count, tokens, heads.queries, 2)
        inputs, to = empty_inputs(tokens, heads.columns, self._w.outward.group, self._card)
        attention = self._attention(tokens, attended.data_ptr(), weights.data_ptr())
        point(attention, queries.data_ptr(), *kept, mask)
        launcher.launch(layer_calls.attention_call(attention, KINDS[kept[0].dtype], units))
        found = attended.data_ptr(), weights.data_ptr()
        launcher.launch(layer_calls.combine_call(found, self._outward_factors, units, heads.size, to))
        product = self._outward.found(inputs)
        leave = self._leaving(tokens, 1, KINDS[x.dtype], product.data_ptr())
        leave.x, leave.pitch, leave.out = x.data_ptr(), x.stride(0), out.data_ptr()
        launcher.launch(layer_calls.leave_call(leave))

    def _units_of(self, tokens: int, slots: int) -> Units:
        """How slots are cut up: one object for all numbers of slots that are cut alike."""
        known = self._units.get((tokens, -(-slots // SLICE)))
        if known is None:
            known = Units.of(tokens, slots, self._heads, self._card.launcher.multiprocessors)
            self._units[tokens, -(-slots // SLICE)] = known
        return known

    def _rotation(self, tokens: int, size: int, kind: int, turn: int) -> RotateArguments:
        heads = self._heads
        made = RotateArguments(eps=self._w.eps, heads=heads.queries, key_heads=heads.keys, head_dim=heads.size)
        made.bias[:], made.norm[:] = self._biases, self._head_norms
        made.tokens, made.padded_tokens = tokens, size
        made.kind, made.weight_kind, made.turn_kind = kind, self._norm[1], turn
        return made

    def _attention(self, tokens: int, attended: int, weights: int) -> AttentionArguments:
        heads = self._heads
        shape = {"tokens": tokens, "heads": heads.queries, "key_heads": heads.keys, "head_dim": heads.size}
        return AttentionArguments(attended=attended, weights=weights, scaling=self._w.scaling, **shape)

    def _leaving(self, tokens: int, size: int, kind: int, found: int) -> LeaveArguments:
        made = LeaveArguments(bias=self._outward_bias, found=found, kind=kind, bias_kind=self._norm[1])
        made.tokens, made.columns, made.padded_tokens = tokens, self._hidden, size
        return made
