"""A layer in three calls: the backends' halves against the reference, and a token's bits whatever comes with it."""

import os
import signal
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.kernels.blocks import Attention, AttentionWeights, FeedForwardWeights
from tiercache.kernels.cpu.backend import CpuKernels
from tiercache.kernels.cpu.build import instruction_sets
from tiercache.kernels.reference import ReferenceKernels
from tiercache.quant.planes import Planes, encode

CPU = torch.device("cpu")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TOKENS = (1, 2, 3, 4, 9, 33, 64)


def planes(rows: int, columns: int, seed: int, group: int = 64, precision: str = "int8") -> Planes:
    return encode(0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)), group).at(precision)


def numbers(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attention_weights(
    dtype: torch.dtype, *, hidden: int = 192, heads: int = 6, key_heads: int = 2, dim: int = 32, extras: bool = True
) -> AttentionWeights:
    width, key_width = heads * dim, key_heads * dim
    inward = (planes(width, hidden, 1), planes(key_width, hidden, 2), planes(key_width, hidden, 3))
    return AttentionWeights(
        norm=1 + 0.1 * numbers(hidden, seed=4, dtype=dtype),
        eps=1e-5,
        inward=inward,
        factors=1 + numbers(hidden, seed=5).abs() if extras else None,
        biases=tuple(numbers(p.rows, seed=6 + i, dtype=dtype) if extras else None for i, p in enumerate(inward)),  # type: ignore[arg-type]
        head_norms=(numbers(dim, seed=9, dtype=dtype), numbers(dim, seed=10, dtype=dtype)) if extras else None,
        outward=planes(hidden, width, 11, precision="int4"),
        outward_factors=1 + numbers(width, seed=12).abs() if extras else None,
        outward_bias=numbers(hidden, seed=13, dtype=dtype) if extras else None,
        heads=heads,
        key_heads=key_heads,
        head_dim=dim,
        scaling=dim**-0.5,
    )


def feed_forward_weights(dtype: torch.dtype, *, hidden: int = 192, neurons: int = 320) -> FeedForwardWeights:
    return FeedForwardWeights(
        norm=1 + 0.1 * numbers(hidden, seed=21, dtype=dtype),
        eps=1e-6,
        inward=(planes(neurons, hidden, 22), planes(neurons, hidden, 23)),
        factors=1 + numbers(hidden, seed=24).abs(),
        down=planes(neurons, hidden, 25, precision="int4"),
        down_factors=1 + numbers(hidden, seed=26).abs(),
        activation="silu",
    )


def rotary(positions: Tensor, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = positions[:, None] * 10000 ** -(torch.arange(0, dim, 2) / dim)
    both = torch.cat([angles, angles], dim=1)
    return both.cos().to(dtype), both.sin().to(dtype)


def close(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    """Within what 16-bit fixed point of the activations and a rounding to the dtype may do."""
    unit = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    scale = wanted.float().square().mean().sqrt()
    assert (found.float() - wanted.float()).abs().max() <= unit * scale * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("extras", [True, False], ids=["extras", "plain"])
@pytest.mark.parametrize("isa", instruction_sets())
def test_the_attention_half_is_the_references(dtype: torch.dtype, extras: bool, isa: str) -> None:
    weights = attention_weights(dtype, extras=extras)
    fast, slow = CpuKernels(isa).attention(weights), ReferenceKernels().attention(weights)
    past = numbers(2, 1, weights.key_heads, 300, weights.head_dim, seed=30, dtype=dtype)
    for tokens in TOKENS:
        x = numbers(tokens, 192, seed=31, dtype=dtype)
        cos, sin = rotary(torch.arange(300, 300 + tokens), weights.head_dim, dtype)
        queries, *new = fast.project(x, cos, sin)
        for found, wanted in zip((queries, *new), slow.project(x, cos, sin), strict=True):
            assert found.shape == wanted.shape
            close(found, wanted, dtype)
        keys, values = (torch.cat([a, b], dim=2) for a, b in zip(past, new, strict=True))
        roomy = torch.zeros(1, weights.key_heads, 500, weights.head_dim, dtype=dtype)
        roomy[:, :, : keys.shape[2]] = keys
        for mask in (None, some_mask(tokens, keys.shape[2])):
            found = fast.attend(x, queries, roomy[:, :, : keys.shape[2]], values, mask)
            close(found, slow.attend(x, queries, keys, values, mask), dtype)
            assert torch.equal(step_into_room(fast, x, (cos, sin), past, (keys, values), mask), found)


def step_into_room(
    half: Attention,
    x: Tensor,
    turns: tuple[Tensor, Tensor],
    past: Sequence[Tensor],
    wanted: Sequence[Tensor],
    mask: Tensor | None,
) -> Tensor:
    """What a step gives that writes its keys and values behind the past, and nowhere else."""
    slots = wanted[0].shape[2]
    rooms = [torch.full((*part.shape[:2], slots + 20, part.shape[3]), 7.0, dtype=x.dtype) for part in past]
    for room, part in zip(rooms, past, strict=True):
        room[:, :, : part.shape[2]] = part
    found = half.step(x, *turns, *(room[:, :, :slots] for room in rooms), mask)
    for room, part in zip(rooms, wanted, strict=True):
        assert torch.equal(room[:, :, :slots], part)
        assert (room[:, :, slots:] == 7).all()
    return found


@pytest.mark.parametrize("isa", instruction_sets())
def test_a_linear_call_is_transform_quantize_and_matmul(isa: str) -> None:
    kernels, weight, factors = CpuKernels(isa), planes(500, 192, 90), 1 + numbers(192, seed=91).abs()
    for dtype in DTYPES:
        for tokens in TOKENS:
            x, out = numbers(tokens, 192, seed=92, dtype=dtype), torch.zeros(tokens, 500)
            kernels.matmul(kernels.quantize_activations(kernels.hadamard(x, factors), 64), weight, out)
            assert torch.equal(kernels.linear(x, weight, factors), out.to(dtype))


def some_mask(tokens: int, slots: int) -> Tensor:
    generator = torch.Generator().manual_seed(slots)
    mask = torch.rand(tokens, slots, generator=generator) < 0.7
    mask[:, 0] = True
    return mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", instruction_sets())
def test_the_feed_forward_half_is_the_references(dtype: torch.dtype, isa: str) -> None:
    weights = feed_forward_weights(dtype)
    fast, slow = CpuKernels(isa).feed_forward(weights), ReferenceKernels().feed_forward(weights)
    for tokens in TOKENS:
        x = numbers(tokens, 192, seed=31, dtype=dtype)
        close(fast.forward(x), slow.forward(x), dtype)


@pytest.mark.parametrize("isa", instruction_sets())
def test_a_token_has_the_same_bits_alone_and_among_others(isa: str) -> None:
    kernels, dtype, past = CpuKernels(isa), torch.bfloat16, 290
    attention, feed_forward = (
        kernels.attention(attention_weights(dtype)),
        kernels.feed_forward(feed_forward_weights(dtype)),
    )
    x = numbers(40, 192, seed=33, dtype=dtype)
    before = numbers(2, 1, 2, past, 32, seed=34, dtype=dtype)
    cos, sin = rotary(torch.arange(past, past + 40), 32, dtype)
    queries, *new = attention.project(x, cos, sin)
    keys, values = (torch.cat([a, b], dim=2) for a, b in zip(before, new, strict=True))
    together = feed_forward.forward(attention.attend(x, queries, keys, values, None))
    for token in range(40):
        here = slice(token, token + 1)
        own, *_ = attention.project(x[here], cos[here], sin[here])
        end = past + token + 1
        alone = attention.attend(x[here], own, keys[:, :, :end], values[:, :, :end], None)
        assert torch.equal(feed_forward.forward(alone), together[here])


def test_a_path_of_a_tree_has_the_bits_of_tokens_in_a_row() -> None:
    dtype, past, path = torch.bfloat16, 250, [0, 2, 5, 11, 12]  # slots of the path among 16 nodes
    attention = CpuKernels().attention(attention_weights(dtype))
    keys, values = numbers(2, 1, 2, past + 16, 32, seed=40, dtype=dtype)
    x, queries = numbers(16, 192, seed=41, dtype=dtype), numbers(16, 6, 32, seed=42)
    mask = torch.rand(16, past + 16, generator=torch.Generator().manual_seed(1)) < 0.5
    for place, node in enumerate(path):
        mask[node] = False
        mask[node, :past] = True
        mask[node, [past + slot for slot in path[: place + 1]]] = True
    tree = attention.attend(x, queries, keys, values, mask)
    slots = [*range(past), *(past + slot for slot in path)]
    row = attention.attend(x[path], queries[path], keys[:, :, slots], values[:, :, slots], None)
    assert torch.equal(tree[path], row)


def test_every_instruction_set_and_number_of_threads_gives_the_same_bits() -> None:
    dtype = torch.bfloat16
    weights, forward = attention_weights(dtype), feed_forward_weights(dtype)
    keys, values = numbers(2, 1, 2, 700, 32, seed=50, dtype=dtype)
    cos, sin = rotary(torch.arange(5), 32, dtype)
    for tokens in (1, 5):
        x, found = numbers(tokens, 192, seed=51, dtype=dtype), []
        for isa in instruction_sets():
            for threads in (1, 2, 3):
                kernels = CpuKernels(isa, threads)
                half = kernels.attention(weights)
                queries, *new = half.project(x, cos[:tokens], sin[:tokens])
                out = half.attend(x, queries, keys, values, None)
                found.append((queries, *new, out, kernels.feed_forward(forward).forward(out)))
        for other in found[1:]:
            assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_token_that_attends_to_nothing_adds_nothing() -> None:
    attention = CpuKernels().attention(attention_weights(torch.float32, extras=False))
    keys, values = numbers(2, 1, 2, 20, 32, seed=60)
    x, queries = numbers(2, 192, seed=61), numbers(2, 6, 32, seed=62)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, 3] = True
    found = attention.attend(x, queries, keys, values, mask)
    assert torch.equal(found[1], x[1])
    assert not torch.equal(found[0], x[0])


@pytest.mark.parametrize(("heads", "key_heads", "dim"), [(4, 2, 15), (2, 1, 258), (3, 2, 16)])
def test_heads_that_are_not_taken_are_refused(heads: int, key_heads: int, dim: int) -> None:
    kernels = CpuKernels()
    assert kernels.takes_heads(6, 2, 32)
    assert not kernels.takes_heads(heads, key_heads, dim)
    with pytest.raises(UsageError, match=f"{heads} heads of {dim}"):
        kernels.attention(attention_weights(torch.float32, heads=heads, key_heads=key_heads, dim=dim, extras=False))


def test_infinity_and_nan_come_out() -> None:
    attention, feed_forward = attention_weights(torch.bfloat16), feed_forward_weights(torch.bfloat16)
    kernels = CpuKernels()
    for value in (torch.nan, torch.inf):
        x = numbers(2, 192, seed=70, dtype=torch.bfloat16)
        x[1, 5] = value
        out = kernels.feed_forward(feed_forward).forward(x)
        assert out[0].isfinite().all()
        assert not out[1].isfinite().any()
        cos, sin = rotary(torch.arange(2), 32, torch.bfloat16)
        queries, keys, values = kernels.attention(attention).project(x, cos, sin)
        assert queries[0].isfinite().all()
        assert queries[1].isnan().all()
        out = kernels.attention(attention).attend(x, queries, keys, values, None)
        assert out[0].isfinite().all()
        assert not out[1].isfinite().any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_threads_work_in_a_child_of_fork() -> None:
    weights = feed_forward_weights(torch.float32, hidden=1024, neurons=2048)
    half = CpuKernels(threads=2).feed_forward(weights)
    x = numbers(4, 1024, seed=80)
    wanted = half.forward(x)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a lost thread would be waited for without end
        os._exit(0 if torch.equal(half.forward(x), wanted) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_step_writes_into_no_cache_of_another_shape() -> None:
    weights = attention_weights(torch.float32, extras=False)
    half, x = CpuKernels().attention(weights), numbers(2, 192, seed=31)
    turn = rotary(torch.arange(2), weights.head_dim, torch.float32)
    good = torch.zeros(1, weights.key_heads, 5, weights.head_dim)
    for keys, values in (
        (good[:, :1], good),
        (good, good[..., :-8]),
        (good, good.bfloat16()),
        (good[:, :, :1], good[:, :, :1]),
    ):
        with pytest.raises(UsageError, match="with room for 2 tokens"):
            half.step(x, *turn, keys, values, None)
