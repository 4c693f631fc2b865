"""What torch itself offers for products with a matrix of 4, 8 or 16 bits a weight: the peers of the plane kernels.

Two of the three are private operators of torch, which may be missing or change; whoever calls them expects any error
and goes on without that peer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tiercache.store.format import align

GROUP = 64  # weights that share a scale in the int4 peers, as in a plane store

Packed = tuple[Tensor, ...]


@dataclass(frozen=True)
class Peer:
    """A product W x of torch.

    Attributes:
        name: in the results.
        pack: makes a random W [rows, columns] from a pool of bytes, on its device.
        product: of x, bf16 [tokens, columns], with what was packed: [tokens, rows].
    """

    name: str
    pack: Callable[[int, int, Tensor], Packed]
    matmul: Callable[[Tensor, Packed], Tensor]


def bound_call(peer: Peer, kernel: str, x: Tensor, ready: Sequence[Sequence[Packed]]) -> Callable[[int], Tensor]:
    """What a peer does in place of `kernel`: one product, or those of a gated feed-forward block; copies in turn."""

    def call(number: int) -> Tensor:
        packed = ready[number % len(ready)]
        if kernel != "ffn":
            return peer.matmul(x, packed[0])
        gate, up, down = packed
        return peer.matmul(functional.silu(peer.matmul(x, gate)) * peer.matmul(x, up), down)

    return call


def shapes(kernel: str, rows: int, columns: int) -> tuple[tuple[int, int], ...]:
    """The matrices [outputs, inputs] that a peer multiplies by in place of `kernel` over [rows, columns]."""
    inward, down = (rows, columns), (columns, rows)
    return {"product": (inward,), "product_down": (down,), "ffn": (inward, inward, down)}[kernel]


def copies(packed: Sequence[Packed], count: int, memory: Callable[[int], Tensor]) -> list[tuple[Packed, ...]]:
    """The same matrices, side by side `count` times in memory of the caller's kind."""
    one = sum(align(tensor.nbytes) for matrix in packed for tensor in matrix)
    place, at = memory(one * count), 0
    made = []
    for _ in range(count):
        copy = []
        for matrix in packed:
            tensors = []
            for tensor in matrix:
                target = place[at : at + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
                tensors.append(target.copy_(tensor))
                at += align(tensor.nbytes)
            copy.append(tuple(tensors))
        made.append(tuple(copy))
    return made


def nbytes(packed: Sequence[Packed]) -> int:
    """Weights and scales."""
    return sum(tensor.nbytes for matrix in packed for tensor in matrix)


def _bytes(rows: int, columns: int, pool: Tensor) -> Tensor:
    """uint8 [rows, columns], repeating the pool."""
    count = rows * columns
    return pool.repeat(-(-count // pool.numel()))[:count].view(rows, columns)


def _scales(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.full(shape, 1 / 256, dtype=torch.bfloat16, device=like.device)


def _pack_bf16(rows: int, columns: int, pool: Tensor) -> Packed:
    return (_bytes(rows, columns, (pool.bfloat16() - 128) / 2048),)


def _pack_int8(rows: int, columns: int, pool: Tensor) -> Packed:
    return _bytes(rows, columns, pool).view(torch.int8), _scales((rows,), pool)


def _pack_int4_cpu(rows: int, columns: int, pool: Tensor) -> Packed:
    codes = _bytes(rows, columns, (pool & 15).int())
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return packed, _scales((columns // GROUP, rows, 2), pool)


def _pack_int4_cuda(rows: int, columns: int, pool: Tensor) -> Packed:
    packed = torch.ops.aten._convert_weight_to_int4pack(_bytes(rows, columns // 2, pool), 8)
    return packed, _scales((columns // GROUP, rows, 2), pool)


def _int4(operator: str) -> Callable[[Tensor, Packed], Tensor]:
    def matmul(x: Tensor, packed: Packed) -> Tensor:
        result: Tensor = getattr(torch.ops.aten, operator)(x, packed[0], GROUP, packed[1])
        return result

    return matmul


def _int8(x: Tensor, packed: Packed) -> Tensor:
    result: Tensor = torch.ops.aten._weight_int8pack_mm(x, packed[0], packed[1])
    return result


BF16 = Peer("torch bf16", _pack_bf16, lambda x, packed: functional.linear(x, packed[0]))
INT8 = Peer("torch int8", _pack_int8, _int8)
CPU_PEERS = (BF16, INT8, Peer("torch int4", _pack_int4_cpu, _int4("_weight_int4pack_mm_for_cpu")))
CUDA_PEERS = (BF16, Peer("torch int4", _pack_int4_cuda, _int4("_weight_int4pack_mm")))
