"""The backend for NVIDIA cards, compute capability 5.0 on: CUDA C, compiled for the card at hand.

From capability 8.0 on, products are the matrix units' (mma.cu, across the rows downmma.cu), which read planes as they
are: activations as whole numbers of 23 bits, groups' sums exact, the rest fp32. A token's results have the same bits
however many came with it. Older cards multiply in fp32 (rows.cu, down.cu, downs.cu), with such bits up to `switch`
tokens. More of them go by way of fp32 weights in a bounded scratch tile and torch's matmul: fp32 as well, for a 16-bit
weight is off by up to 2**-12 or 2**-9 of itself, more than these kernels may be. Which way, and in which order sums are
made, depends on shapes and the card alone, never on where planes lie or how they are aligned: no placement changes a
bit.

Planes and scales may lie on the device or in page-locked host memory; kernels read the latter over the link, planes
once per call.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.kernels import contract
from tiercache.kernels.activation import activate, check_activation
from tiercache.kernels.blocks import Attention, AttentionWeights, FeedForward, FeedForwardWeights
from tiercache.kernels.contract import ACTIVATIONS, Kernels, Parts, QuantizedActivations, Selection
from tiercache.kernels.cuda import down_launches, launches, mma_launches
from tiercache.kernels.cuda.attention import CudaAttention
from tiercache.kernels.cuda.card import KINDS, Card, SharedScratch
from tiercache.kernels.cuda.down_launches import Activations, Slices
from tiercache.kernels.cuda.driver import Driver
from tiercache.kernels.cuda.feed_forward import CudaFeedForward
from tiercache.kernels.cuda.launches import Blocks
from tiercache.kernels.cuda.layer_calls import Heads
from tiercache.kernels.cuda.precision import full_precision
from tiercache.kernels.cuda.row_lists import RowLists
from tiercache.kernels.cuda.tiles import Tile, Tiler
from tiercache.quant.planes import Planes
from tiercache.tiers.device import on_host

DEFAULT_SWITCH = 65
"""Tokens up to which any card multiplies planes as they are, with bits that no company changes: a root and 64 nodes."""


class CudaKernels(Kernels):
    """See `contract.Kernels`. Row lists that lie on the device are not checked for range: that would stall the stream.

    Args:
        device: the CUDA device.
        launcher: what runs the kernels; None for the device's driver. The tests give an emulation.
        switch: tokens above which layers keep no calls ready, and cards before capability 8.0 decode weights first.

    Raises:
        EnvironmentUnsupportedError: no such device, or no compiler for it.
    """

    def __init__(self, device: torch.device, launcher: Driver | None = None, switch: int = DEFAULT_SWITCH) -> None:
        if launcher is None:
            launcher = Driver(device)
            device = launcher.device
        self.device, self._launcher = device, launcher
        self.name = f"cuda (sm_{launcher.capability[0]}{launcher.capability[1]})"
        self._by_matrix_units = launcher.capability >= mma_launches.LEAST_CAPABILITY
        switch = max(switch, launches.FEW_TOKENS)
        self._switch = contract.MAX_TOKENS if self._by_matrix_units else switch
        self._tiler = Tiler(launcher, device, self._switch)
        self._card = Card(launcher, device, switch, self, SharedScratch(device), threading.Lock())

    def quantize_activations(self, x: Tensor, group: int) -> QuantizedActivations:
        tokens, columns = x.shape
        self._check_input(x, columns)
        if tokens > self._switch:
            return QuantizedActivations(tokens, columns, group, (x.float(),))
        if self._by_matrix_units:
            return self._digits(x, group)
        blocks, chunks = Blocks.of(tokens), launches.chunks_of(columns)
        packed = self._empty(blocks.count, chunks, blocks.size, launches.CHUNK_COLUMNS)
        sums = self._empty(blocks.count, chunks, blocks.size, launches.CHUNK_COLUMNS // group)
        if tokens:
            into = (packed.data_ptr(), sums.data_ptr())
            strides = (x.stride(0), x.stride(1))
            self._launcher.launch(
                launches.prepare_call(self._at(x), strides, KINDS[x.dtype], (tokens, columns), group, into)
            )
        return QuantizedActivations(tokens, columns, group, (packed, sums))

    def _digits(self, x: Tensor, group: int) -> QuantizedActivations:
        """Of x [tokens, columns], for matrix units."""
        tokens, columns = x.shape
        size = mma_launches.digit_bytes(tokens, columns, group)
        digits = torch.empty(size, dtype=torch.uint8, device=self.device)
        factors = self._empty(mma_launches.factor_count(tokens, columns, group))
        if tokens:
            into, strides = (digits.data_ptr(), factors.data_ptr()), (x.stride(0), x.stride(1))
            kind = KINDS[x.dtype]
            call = mma_launches.digits_call(self._at(x), strides, kind, (tokens, columns), group, into)
            self._launcher.launch(call)
        return QuantizedActivations(tokens, columns, group, (digits, factors))

    def hadamard(self, x: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        contract.check_transform(x, before, after)
        if x.device != self.device:
            raise UsageError(f"x is on {x.device}, these kernels are of {self.device}")
        out = self._empty(*x.shape)
        if out.numel():
            first, last = (0 if factor is None else self._at(factor) for factor in (before, after))
            shape, strides, kind = (x.shape[0], x.shape[1]), (x.stride(0), x.stride(1)), KINDS[x.dtype]
            call = launches.hadamard_call(self._at(x), strides, kind, shape, (first, last), out.data_ptr())
            self._launcher.launch(call)
        return out

    def matmul(self, x: QuantizedActivations, weight: Planes, out: Tensor, rows: Selection = None) -> None:
        _check_prepared(x, weight)
        contract.check_output(out, x.tokens, contract.checked_rows(rows, weight), self.device)
        for some, (near,), chosen in self._tiles(x.tokens, (weight,), rows):
            self._matmul(x, near, out[:, some], chosen)

    def matmul_transposed(self, x: Tensor, weight: Planes, out: Tensor, rows: Selection = None) -> None:
        self._check_input(x, contract.checked_rows(rows, weight))
        contract.check_output(out, x.shape[0], weight.columns, self.device)
        lists, tokens = RowLists.of(rows, self.device), x.shape[0]
        if tokens > self._switch:
            for some, (near,), chosen in self._tiler.tiles(tokens, (weight,), lists):
                with full_precision():
                    out += x[:, some].float() @ self._decoded(near, chosen)
            return
        slices, merged = self._slices(tokens, (weight,), lists)
        partial = self._partial(weight, tokens, slices, merged)
        for some, (near,), chosen in self._tiler.tiles(tokens, (weight,), lists, slices.size):
            whole = 1 << (tokens - 1).bit_length()  # one block
            strides = (0, x.stride(0), x.stride(1))
            given = Activations(self._at(x[:, some]), KINDS[x.dtype], tokens, whole, strides)
            self._spread(given, near, partial[some.start // slices.size :], chosen, slices, merged)
        self._add_up(partial, tokens, weight, out)

    def ffn(
        self, x: QuantizedActivations, inward: Parts, down: Planes, activation: str, out: Tensor, rows: Selection = None
    ) -> None:
        check_activation(activation)
        if not 1 <= len(inward) <= 2 or any(each.rows != down.rows for each in inward):
            raise UsageError(
                f"{[each.rows for each in (*inward, down)]} rows; need 1 or 2 inward matrices as high as down"
            )
        for each in inward:
            _check_prepared(x, each)
        contract.checked_rows(rows, down, *inward)
        contract.check_output(out, x.tokens, down.columns, self.device)
        lists = RowLists.of(rows, self.device)
        if x.tokens > self._switch or len({len(each.planes) for each in inward}) > 1:
            hidden = self._act(x, inward, activation, rows)
            self.matmul_transposed(hidden, down, out, rows)
            return
        slices, merged = self._slices(x.tokens, (*inward, down), lists)
        partial = self._partial(down, x.tokens, slices, merged)
        for some, near, chosen in self._tiler.tiles(x.tokens, (*inward, down), lists, slices.size):
            hidden = self._hidden(x, near[:-1], activation, chosen)
            strides = (hidden.stride(0), 1, hidden.stride(1))
            given = Activations(hidden.data_ptr(), 0, x.tokens, hidden.shape[2], strides)
            self._spread(given, near[-1], partial[some.start // slices.size :], chosen, slices, merged)
        self._add_up(partial, x.tokens, down, out)

    def takes_heads(self, heads: int, key_heads: int, head_dim: int) -> bool:
        return Heads.fit(heads, key_heads, head_dim)

    def attention(self, weights: AttentionWeights) -> Attention:
        return CudaAttention(weights, self._card)

    def feed_forward(self, weights: FeedForwardWeights) -> FeedForward:
        return CudaFeedForward(weights, self._card)

    def gather(self, pieces: Sequence[Tensor], rows: Tensor, out: Tensor) -> None:
        """See `contract.Kernels`. Pieces and `out` may lie on the device or in page-locked host memory."""
        nbytes = rows.numel() * sum(piece.shape[1] for piece in pieces)
        if out.dtype != torch.uint8 or out.ndim != 1 or not out.is_contiguous() or out.numel() < nbytes:
            raise UsageError(f"out is {out.dtype} {list(out.shape)}, expected {nbytes} bytes (uint8) in one piece")
        for piece in pieces:
            if piece.dtype != torch.uint8 or piece.ndim != 2 or (piece.shape[1] > 1 and piece.stride(1) != 1):
                raise UsageError(
                    f"a piece is {piece.dtype} {list(piece.shape)}, expected uint8 [n, width], rows in one piece"
                )
            if on_host(rows.device) and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(piece):
                raise UsageError(f"rows {int(rows.min())} to {int(rows.max())} of a piece of {len(piece)}")
        self._tiler.gather(pieces, rows.to(self.device, torch.int32).contiguous(), out)

    def _tiles(self, tokens: int, weights: Parts, rows: Selection) -> Iterator[Tile]:
        return self._tiler.tiles(tokens, weights, RowLists.of(rows, self.device))

    def _matmul(self, x: QuantizedActivations, weight: Planes, out: Tensor, rows: RowLists) -> None:
        if x.tokens > self._switch:
            with full_precision():
                out += x.data[0] @ self._decoded(weight, rows).T
            return
        self._launch_rows(x, [weight], (out.data_ptr(), out.stride(0)), rows, -1)

    def _launch_rows(
        self, x: QuantizedActivations, weights: Parts, out: tuple[int, int], rows: RowLists, activation: int
    ) -> None:
        packed, sums = x.data
        matrices = [launches.matrix(weight, self._at) for weight in weights]
        given = (packed.data_ptr(), sums.data_ptr())
        count, planes = rows.count(weights[0]), len(weights[0].planes)
        what = (matrices, planes, given, rows.pointers(planes), out)
        if self._by_matrix_units:
            call = mma_launches.mma_call(*what, (count, x.tokens), (activation, self._launcher.multiprocessors))
        else:
            shape = (count, x.tokens, x.columns)
            tile = launches.tile_bytes(self._launcher.capability)
            call = launches.rows_call(*what, shape, (activation, self._launcher.multiprocessors, tile))
        self._launcher.launch(call)

    def _hidden(self, x: QuantizedActivations, inward: Parts, activation: str, rows: RowLists) -> Tensor:
        """act(gate x) * up x in one launch: [blocks, rows, tokens of a block]."""
        blocks = Blocks.of(x.tokens)
        hidden = self._empty(blocks.count, rows.count(inward[0]), blocks.size)
        self._launch_rows(x, inward, (hidden.data_ptr(), 0), rows, ACTIVATIONS.index(activation))
        return hidden

    def _act(self, x: QuantizedActivations, inward: Parts, activation: str, rows: Selection) -> Tensor:
        """The same as [tokens, rows], matrix by matrix: for many tokens, or precisions that differ."""
        count = contract.checked_rows(rows, *inward)
        parts = [torch.zeros(x.tokens, count, device=self.device, dtype=torch.float32) for _ in inward]
        for weight, part in zip(inward, parts, strict=True):
            self.matmul(x, weight, part, rows)
        hidden = activate(activation, parts[0])
        return hidden if len(parts) == 1 else hidden * parts[1]

    def _slices(self, tokens: int, weights: Parts, rows: RowLists) -> tuple[Slices, int]:
        """Of the last matrix; and how many of them are added up at once, which tiles would cut apart."""
        down, multiprocessors = weights[-1], self._launcher.multiprocessors
        group, groups = down.group, down.scales.shape[1]
        slices = Slices.of(rows.count(down), group, groups, multiprocessors, self._by_matrix_units)
        if not self._tiler.in_one_pass(tokens, weights):
            return slices, 1
        return slices, slices.merged(tokens, group, groups, multiprocessors)

    def _partial(self, weight: Planes, tokens: int, slices: Slices, merged: int) -> Tensor:
        """Room for sums of as many slices: [slices / merged, padded tokens, padded columns]."""
        count = -(-slices.count // merged)
        return self._empty(count, slices.padded(tokens), weight.scales.shape[1] * weight.group)

    def _spread(
        self, x: Activations, weight: Planes, partial: Tensor, rows: RowLists, slices: Slices, merged: int
    ) -> None:
        """x W, slice for slice of the rows, into the first of `partial`."""
        found, planes = launches.matrix(weight, self._at), len(weight.planes)
        given = (x, rows.pointers(planes), partial.data_ptr(), rows.count(weight), slices, merged)
        self._launcher.launch(down_launches.down_call(found, planes, *given))

    def _add_up(self, partial: Tensor, tokens: int, weight: Planes, out: Tensor) -> None:
        """out += the sum of the slices."""
        if tokens and len(partial):
            into, (parts, room, width) = (out.data_ptr(), out.stride(0)), partial.shape
            call = down_launches.sum_call(partial.data_ptr(), into, tokens, weight.columns, (parts, room, width))
            self._launcher.launch(call)

    def _decoded(self, weight: Planes, rows: RowLists) -> Tensor:
        """The weights in fp32 [rows, columns]."""
        found, count, planes = launches.matrix(weight, self._at), rows.count(weight), len(weight.planes)
        values = self._empty(count, found.groups * found.group)
        shape = count, weight.columns
        self._launcher.launch(launches.decode_call(found, planes, rows.pointers(planes), shape, values.data_ptr()))
        return values[:, : weight.columns]

    def _at(self, tensor: Tensor) -> int:
        return self._launcher.address(tensor)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.device)

    def _check_input(self, x: Tensor, features: int) -> None:
        contract.check_activations(x, features)
        if x.device != self.device:
            raise UsageError(f"x is on {x.device}, these kernels are of {self.device}")


def _check_prepared(x: QuantizedActivations, weight: Planes) -> None:
    if (x.columns, x.group) != (weight.columns, weight.group):
        raise UsageError(
            f"x has {x.columns} columns prepared in groups of {x.group}, the matrix {weight.columns} in {weight.group}"
        )
