"""The halves of a layer on CUDA against the reference: emulated on the CPU, and on a GPU where there is one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_cpu.cases import matrix
from cuda_on_cpu.emulate import Emulation, build
from torch import Tensor

from tiercache.kernels.blocks import AttentionWeights, FeedForwardWeights
from tiercache.kernels.contract import ACTIVATIONS
from tiercache.kernels.cuda.backend import CudaKernels
from tiercache.kernels.reference_blocks import ReferenceAttention, ReferenceFeedForward

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_A_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
NOISE = 1e-5  # of the largest number beside one: sums of fp32 in another order


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products by many threads that wait for one another would take most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulated kernels, built once."""
    return build(tmp_path_factory.getbasetemp() / "cuda-on-cpu")


@pytest.fixture(scope="session")
def kernels(library: Path) -> CudaKernels:
    """Kernels on the emulation; weights are decoded above 33 tokens, so that small tests reach both ways."""
    return CudaKernels(CPU, Emulation(library), switch=33)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention_weights(
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int, int] = (4, 2, 32),
    hidden: int = 192,
    precision: str = "int4",
    full: bool = True,
    group: int = 64,
) -> AttentionWeights:
    """Of a small layer; `full` has all that a layer may have, else it has nothing that it may lack."""
    queries, keys, size = heads
    rows = queries * size, keys * size, keys * size
    return AttentionWeights(
        norm=(1 + 0.3 * random(hidden)).to(dtype),
        eps=1e-5,
        inward=tuple(matrix(n, hidden, group, precision, seed) for seed, n in enumerate(rows)),  # type: ignore[arg-type]
        factors=random(hidden, seed=5).abs() + 0.5 if full else None,
        biases=tuple(0.3 * random(n, seed=6).to(dtype) if full else None for n in rows),  # type: ignore[arg-type]
        head_norms=((1 + 0.2 * random(size, seed=7)).to(dtype), random(size, seed=8).to(dtype)) if full else None,
        outward=matrix(hidden, queries * size, group, precision, 4),
        outward_factors=random(queries * size, seed=9).abs() + 0.5 if full else None,
        outward_bias=0.2 * random(hidden, seed=10).to(dtype) if full else None,
        heads=queries,
        key_heads=keys,
        head_dim=size,
        scaling=size**-0.5,
    )


def feed_forward_weights(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, int] = (192, 320),
    activation: str = "silu",
    precisions: tuple[str, str, str] = ("int4", "int4", "int4"),
    full: bool = True,
) -> FeedForwardWeights:
    hidden, neurons = shape
    gate, up, down = (matrix(neurons, hidden, 64, precision, seed) for seed, precision in enumerate(precisions))
    return FeedForwardWeights(
        norm=(1 + 0.3 * random(hidden)).to(dtype),
        eps=1e-6,
        inward=(gate, up),
        factors=random(hidden, seed=5).abs() + 0.5 if full else None,
        down=down,
        down_factors=random(hidden, seed=6).abs() + 0.5,
        activation=activation,
    )


def turns(tokens: int, size: int, dtype: torch.dtype, first: int = 0) -> tuple[Tensor, Tensor]:
    """cos and sin of positions."""
    angles = torch.arange(first, first + tokens)[:, None] * 10000 ** (-torch.arange(size // 2) / (size // 2))
    return torch.cat([angles, angles], 1).cos().to(dtype), torch.cat([angles, angles], 1).sin().to(dtype)


def cached(heads: int, slots: int, size: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values in a larger cache: no stride is what the shape says, the last one's apart."""
    both = random(2, heads, slots + 5, size + 16, seed=seed).to(dtype)
    return both[:1, :, 2 : slots + 2, 8:-8], both[1:, :, 2 : slots + 2, 8:-8]


def assert_near(found: Tensor, wanted: Tensor, scale: float = 1.0) -> None:
    step = HALF_A_STEP[found.dtype]
    wanted = wanted.double()
    allowed = step * wanted.abs() + NOISE * scale * (1 + wanted.abs().max()) + 2.0**-25
    off = (found.double() - wanted).abs()
    assert bool((off <= allowed).all()), f"off by {float(off.max())} of {float(wanted.abs().max())}"


def reference(weights: AttentionWeights | FeedForwardWeights) -> Any:
    if isinstance(weights, AttentionWeights):
        return ReferenceAttention(weights, torch.float64)
    return ReferenceFeedForward(weights, torch.float64)


SHAPES = [
    ((4, 2, 32), 192),
    ((3, 3, 64), 576),
    ((8, 1, 40), 200),
    ((5, 5, 8), 96),
    ((2, 1, 128), 1100),
    ((2, 2, 256), 64),
    ((9, 3, 80), 130),
]


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 33, 64])
@pytest.mark.parametrize(("heads", "hidden"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_projected_is_the_reference(
    kernels: CudaKernels, dtype: torch.dtype, heads: tuple[int, int, int], hidden: int, tokens: int
) -> None:
    full = (tokens + heads[0]) % 2 == 0
    weights = attention_weights(dtype, heads, hidden, ("int3", "int4", "int8")[tokens % 3], full)
    x = (3 * random(tokens, hidden + 4)).to(dtype)[:, 1:-3]
    cos, sin = turns(tokens, heads[2], (dtype, torch.float32)[tokens % 2])
    found = kernels.attention(weights).project(x, cos, sin)
    # The reference rounds keys and values to what x has; fp64 shows what they were before.
    wanted = reference(weights).project(x.double(), cos, sin)
    for a, b, kind in zip(found, wanted, (torch.float32, dtype, dtype), strict=True):
        assert a.dtype == kind
        assert a.shape == b.shape
        assert_near(a, b, 3.0)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 33, 64])
@pytest.mark.parametrize(("heads", "hidden"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_attended_to_is_the_reference(
    kernels: CudaKernels, dtype: torch.dtype, heads: tuple[int, int, int], hidden: int, tokens: int
) -> None:
    full = (tokens + heads[0]) % 2 == 0
    weights = attention_weights(dtype, heads, hidden, ("int3", "int4", "int8")[tokens % 3], full)
    x, queries = (3 * random(tokens, hidden)).to(dtype), 2 * random(tokens, heads[0], heads[2], seed=1)
    for slots in {tokens, 64, 65, 200, 600} - set(range(tokens)):
        keys, values = cached(heads[1], slots, heads[2], dtype, slots)
        mask = random(tokens, slots + 3, seed=slots)[:, 1:-2] > 0.3
        mask[:, slots - tokens :] |= torch.eye(tokens, dtype=torch.bool)
        for some in (None, mask):
            found = kernels.attention(weights).attend(x, queries, keys, values, some)
            assert found.dtype == dtype
            assert_near(found, reference(weights).attend(x.double(), queries, keys, values, some), 3.0)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 33, 64])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("precisions", [("int4",) * 3, ("int3", "int3", "int8"), ("int4", "int8", "int3")])
@pytest.mark.parametrize("shape", [(192, 320), (1100, 90)])
def test_the_feed_forward_half_is_the_reference(
    kernels: CudaKernels, shape: tuple[int, int], precisions: tuple[str, str, str], dtype: torch.dtype, tokens: int
) -> None:
    activation = ACTIVATIONS[(tokens + shape[0]) % len(ACTIVATIONS)]
    weights = feed_forward_weights(dtype, shape, activation, precisions, tokens % 2 == 0)
    x = (2 * random(tokens, shape[0] + 2)).to(dtype)[:, 1:-1]
    found = kernels.feed_forward(weights).forward(x)
    assert found.dtype == dtype
    assert_near(found, reference(weights).forward(x.double()), 3.0)
