"""Products inside a layer: with packed inputs into scratch for few tokens, by way of the backend for many.

Knows planes and the layout that rows.cu reads; nothing of attention or activations.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.kernels import contract
from tiercache.kernels.blocks import AttentionWeights
from tiercache.kernels.contract import ACTIVATIONS, QuantizedActivations
from tiercache.kernels.cuda import launches, layer_calls, mma_launches
from tiercache.kernels.cuda.card import KINDS, Card, bytes_of_floats
from tiercache.kernels.cuda.launches import CHUNK_COLUMNS, Blocks, chunks_of
from tiercache.kernels.cuda.layer_calls import Heads
from tiercache.kernels.cuda.mma_launches import PackedArguments
from tiercache.quant.planes import Planes

_STORE = ACTIVATIONS.index("identity")  # rows.cu then writes its results, where it would add them without one


class Product:
    """A matrix as the kernels see it, made once."""

    def __init__(self, planes: Planes, card: Card) -> None:
        self.planes, self._card = planes, card
        self._matrix = launches.matrix(planes, card.launcher.address)

    def call(self, inputs: Sequence[int], out: int, tokens: int) -> launches.Call:
        """Products with packed inputs, as [blocks, rows, tokens of a block] at `out`."""
        return products_call([self._matrix], self.planes, inputs, out, tokens, _STORE, self._card)

    def found(self, x: QuantizedActivations) -> Tensor:
        """Products of any number of tokens: fp32 [tokens, rows]."""
        out = torch.zeros(x.tokens, self.planes.rows, dtype=torch.float32, device=self._card.device)
        self._card.kernels.matmul(x, self.planes, out)
        return out


def products_call(
    matrices: Sequence[launches.MatrixArguments],
    planes: Planes,
    inputs: Sequence[int],
    out: int,
    tokens: int,
    activation: int,
    card: Card,
) -> launches.Call:
    """Products of one or two matrices like `planes` with packed inputs, behind an activation."""
    given = (matrices, len(planes.planes), (inputs[0], inputs[1]), (), (out, 0))
    if card.by_matrix_units:
        return mma_launches.mma_call(*given, (planes.rows, tokens), (activation, card.launcher.multiprocessors))
    shape = planes.rows, tokens, planes.columns
    tile = launches.tile_bytes(card.launcher.capability)
    return launches.rows_call(*given, shape, (activation, card.launcher.multiprocessors, tile))


def packed_sizes(tokens: int, columns: int, group: int, card: Card) -> tuple[int, int]:
    """Bytes of inputs as products want them: of the numbers, and of what stands beside them."""
    if card.by_matrix_units:
        beside = mma_launches.factor_count(tokens, columns, group)
        return mma_launches.digit_bytes(tokens, columns, group), bytes_of_floats(beside)
    padded, chunks = Blocks.of(tokens).padded, chunks_of(columns)
    return (
        bytes_of_floats(padded, chunks, CHUNK_COLUMNS),
        bytes_of_floats(padded, chunks, CHUNK_COLUMNS // group),
    )


def rows_of(x: Tensor, columns: int, card: Card) -> Tensor:
    """x, its rows in one piece.

    Raises:
        UsageError: of another shape or kind, or elsewhere.
    """
    contract.check_activations(x, columns)
    if x.device != card.device:
        raise UsageError(f"x is on {x.device}, these kernels are of {card.device}")
    return x if x.stride(1) == 1 else x.contiguous()


def empty_inputs(tokens: int, columns: int, group: int, card: Card) -> tuple[QuantizedActivations, PackedArguments]:
    """Inputs that are still to be written, for the products of any number of tokens, and where to write them."""
    if tokens > card.switch and not card.by_matrix_units:
        data: tuple[Tensor, ...] = (card.floats(tokens, columns),)
        to = layer_calls.packed((data[0].data_ptr(), 0), 0, (tokens, columns))
    else:
        data = tuple(card.floats(size // 4) for size in packed_sizes(tokens, columns, group, card))
        inputs = [each.data_ptr() for each in data]
        to = layer_calls.packed(inputs, group, (tokens, columns), card.by_matrix_units)
    return QuantizedActivations(tokens, columns, group, data), to


def entered(x: Tensor, norm: tuple[int, int, float], factors: int, group: int, card: Card) -> QuantizedActivations:
    """x, normed and transformed, for the products of any number of tokens."""
    inputs, to = empty_inputs(x.shape[0], x.shape[1], group, card)
    call = layer_calls.enter_call((x.data_ptr(), x.stride(0), KINDS[x.dtype]), norm, factors, to)
    card.launcher.launch(call)
    return inputs


def check_matrix(what: str, planes: Planes, rows: int, columns: int, group: int) -> None:
    """Refuse a matrix of another shape or group, and slabs."""
    if (planes.rows, planes.columns, planes.group, planes.slabs) != (rows, columns, group, False):
        kind = "slabs" if planes.slabs else "a matrix"
        raise UsageError(
            f"{what} is {kind} [{planes.rows}, {planes.columns}] in groups of {planes.group}, "
            f"expected a matrix [{rows}, {columns}] in groups of {group}"
        )


def check_attention(w: AttentionWeights, heads: Heads) -> None:
    """Refuse matrices, biases and norms that do not fit one another."""
    hidden, group = w.inward[0].columns, w.inward[0].group
    for name, planes in zip(("queries", "keys", "values"), w.inward, strict=True):
        count = heads.queries if name == "queries" else heads.keys
        check_matrix(f"the matrix of {name}", planes, count * heads.size, hidden, group)
    check_matrix("the matrix of the outputs", w.outward, hidden, heads.columns, w.outward.group)
    for each in (*w.biases, *(w.head_norms or ()), w.outward_bias):
        if each is not None and each.dtype != w.norm.dtype:
            raise UsageError(
                f"a bias or a norm is {each.dtype}, the norm before is {w.norm.dtype}; give all in one dtype"
            )
