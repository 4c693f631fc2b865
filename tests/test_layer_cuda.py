"""The halves of a layer on CUDA against the reference: emulated on the CPU, and on a GPU where there is one."""

import ctypes
import gc
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_cpu.cases import matrix
from cuda_on_cpu.emulate import Emulation
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.kernels.blocks import AttentionWeights, FeedForwardWeights
from tiercache.kernels.contract import ACTIVATIONS
from tiercache.kernels.cuda import layer_calls
from tiercache.kernels.cuda.backend import CudaKernels
from tiercache.kernels.cuda.layer_calls import Heads, Units
from tiercache.kernels.reference_blocks import ReferenceAttention, ReferenceFeedForward
from tiercache.quant.planes import Planes

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF_A_STEP = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
NOISE = 1e-5  # of the largest number beside one: sums of fp32 in another order


@pytest.fixture(scope="session")
def kernels(emulated_cuda: Path) -> CudaKernels:
    """Kernels on the emulation; calls are kept ready up to 33 tokens, so that small tests reach both ways."""
    return CudaKernels(CPU, Emulation(emulated_cuda), switch=33)


@pytest.fixture(scope="session")
def older(emulated_cuda: Path) -> CudaKernels:
    """The same on a card without matrix units for bytes; above 33 tokens it decodes weights first."""
    return CudaKernels(CPU, Emulation(emulated_cuda, capability=(6, 1)), switch=33)


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
TOKENS = (1, 3, 8, 9, 33, 64)
EVERY_OTHER = [
    (*shape, tokens)
    for i, shape in enumerate(SHAPES)
    for j, tokens in enumerate(TOKENS)
    if (i + j) % 2 or tokens > 9  # with many tokens the two kinds of cards go different ways
]


@pytest.mark.parametrize(("heads", "hidden", "tokens"), EVERY_OTHER)
def test_what_is_projected_is_the_reference(
    kernels: CudaKernels, older: CudaKernels, heads: tuple[int, int, int], hidden: int, tokens: int
) -> None:
    kernels = (kernels, older)[(tokens // 2 + heads[2] // 8) % 2]
    dtype, full = DTYPES[(tokens + heads[2] // 8) % 3], (tokens + heads[0]) % 2 == 0
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


@pytest.mark.parametrize(("heads", "hidden", "tokens"), EVERY_OTHER)
def test_what_is_attended_to_is_the_reference(
    kernels: CudaKernels, older: CudaKernels, heads: tuple[int, int, int], hidden: int, tokens: int
) -> None:
    kernels = (kernels, older)[(tokens // 2 + heads[2] // 8) % 2]
    dtype, full = DTYPES[(tokens + heads[2] // 8) % 3], (tokens + heads[0]) % 2 == 0
    weights = attention_weights(dtype, heads, hidden, ("int3", "int4", "int8")[tokens % 3], full)
    x, queries = (3 * random(tokens, hidden)).to(dtype), 2 * random(tokens, heads[0], heads[2], seed=1)
    for slots in {tokens, 65, 600} - set(range(tokens)):
        keys, values = cached(heads[1], slots, heads[2], dtype, slots)
        mask = random(tokens, slots + 3, seed=slots)[:, 1:-2] > 0.3
        mask[:, slots - tokens :] |= torch.eye(tokens, dtype=torch.bool)
        for some in (None, mask):
            found = kernels.attention(weights).attend(x, queries, keys, values, some)
            assert found.dtype == dtype
            assert_near(found, reference(weights).attend(x.double(), queries, keys, values, some), 3.0)


@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 33, 64])
@pytest.mark.parametrize("precisions", [("int4",) * 3, ("int3", "int3", "int8"), ("int4", "int8", "int3")])
@pytest.mark.parametrize("shape", [(192, 320), (1100, 90)])
def test_the_feed_forward_half_is_the_reference(
    kernels: CudaKernels, older: CudaKernels, shape: tuple[int, int], precisions: tuple[str, str, str], tokens: int
) -> None:
    kernels = (kernels, older)[(tokens // 2 + shape[0] // 4) % 2]
    dtype = DTYPES[(tokens + len(set(precisions))) % 3]
    activation = ACTIVATIONS[(tokens + shape[0]) % len(ACTIVATIONS)]
    weights = feed_forward_weights(dtype, shape, activation, precisions, tokens % 2 == 0)
    x = (2 * random(tokens, shape[0] + 2)).to(dtype)[:, 1:-1]
    found = kernels.feed_forward(weights).forward(x)
    assert found.dtype == dtype
    assert_near(found, reference(weights).forward(x.double()), 3.0)


@pytest.mark.parametrize("tokens", [1, 9, 34])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_its_parts_bit_for_bit(kernels: CudaKernels, dtype: torch.dtype, tokens: int) -> None:
    half, x = kernels.attention(attention_weights(dtype)), random(tokens, 192).to(dtype)
    mask = random(tokens, 100, seed=2) > 0.3
    for kept in (dtype, torch.float32):  # of a cache that somebody else began
        for some in (None, mask, mask):
            (keys, values), turn = cached(2, 100, 32, kept, seed=4), turns(tokens, 32, dtype, 100 - tokens)
            queries, *new = half.project(x, *turn)
            wanted = [each.clone() for each in (keys, values)]
            for each, last in zip(wanted, new, strict=True):
                each[:, :, 100 - tokens :] = last
            out = half.attend(x, queries, *wanted, some)
            assert torch.equal(half.step(x, *turn, keys, values, some), out)
            assert torch.equal(keys, wanted[0])
            assert torch.equal(values, wanted[1])


def passes(kernels: CudaKernels, dtype: torch.dtype, x: Tensor, cache: tuple[Tensor, Tensor], first: int) -> Tensor:
    """A layer's output for tokens whose keys and values come behind the first slots of a cache, which they change."""
    attention, block = kernels.attention(attention_weights(dtype)), kernels.feed_forward(feed_forward_weights(dtype))
    queries, keys, values = attention.project(x, *turns(len(x), 32, dtype, first))
    cache[0][:, :, first : first + len(x)], cache[1][:, :, first : first + len(x)] = keys, values
    known = [each[:, :, : first + len(x)] for each in cache]
    return block.forward(attention.attend(x, queries, *known, None))


@pytest.mark.parametrize("capability", [(6, 1), (9, 0)])
def test_a_token_is_the_same_in_any_company(emulated_cuda: Path, capability: tuple[int, int]) -> None:
    by_units = capability == (9, 0)
    dtype, switch = (torch.bfloat16, 16) if by_units else (torch.float16, 33)  # then 33 tokens have no calls ready
    x = random(33, 192).to(dtype)
    results = []
    for steps, mps in (([33], 1), ([1] * 33, 1), ([2, 7, 1, 3, 8, 12], 1), ([1] * 33, 100), ([20, 13], 100)):
        kernels = CudaKernels(CPU, Emulation(emulated_cuda, False, mps, capability), switch=switch)
        cache, at, outs = cached(2, 1100, 32, dtype), 1060, []
        for tokens in steps:
            outs.append(passes(kernels, dtype, x[at - 1060 : at - 1060 + tokens], cache, at))
            at += tokens
        results.append(torch.cat(outs))
    assert results[0].isfinite().all()
    for other in results[1:3]:
        assert torch.equal(other, results[0])
    assert torch.equal(results[4], results[3])  # of another card: down.cu has other slices there


@pytest.mark.parametrize("slots", [60, 130, 600, 1200])
@pytest.mark.parametrize("tokens", [1, 5])
def test_no_cut_of_the_slots_changes_a_bit(emulated_cuda: Path, tokens: int, slots: int) -> None:
    weights = attention_weights(torch.float16)
    x, queries = random(tokens, 192).half(), 3 * random(tokens, 4, 32, seed=1)
    keys, values = cached(2, slots, 32, torch.float16)
    mask = random(tokens, slots, seed=2) > 0
    mask[:, :64] = False  # a slice that nobody attends to
    found, cuts = [], set()
    for mps in (1, 3, 1000):
        launcher = Emulation(emulated_cuda, multiprocessors=mps)
        found.append(CudaKernels(CPU, launcher).attention(weights).attend(x, queries, keys, values, mask))
        cuts.add(launcher.launched[0].grid[0])
    assert len(cuts) >= min(2, -(-slots // 64)) - (slots <= 64)
    assert len(cuts) == 3 or slots <= 600
    for other in found[1:]:
        assert torch.equal(other, found[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_tree_in_place_is_the_plain_pass(kernels: CudaKernels, dtype: torch.dtype) -> None:
    """The tokens of a path, among siblings that it does not see, which come behind it in the cache."""
    half = kernels.attention(attention_weights(dtype))
    x, queries = random(9, 192).to(dtype), random(9, 4, 32, seed=1)
    keys, values = cached(2, 100, 32, dtype)
    mask = torch.ones(9, 100, dtype=torch.bool).tril(91)
    mask[5:, 94:96] = False  # siblings of the path see a part of it
    tree = half.attend(x, queries, keys, values, mask)
    for tokens in (1, 5):
        plain = half.attend(x[:tokens], queries[:tokens], keys[:, :, : 91 + tokens], values[:, :, : 91 + tokens], None)
        assert torch.equal(plain, tree[:tokens])


def test_what_is_masked_out_counts_for_nothing(kernels: CudaKernels) -> None:
    half = kernels.attention(attention_weights())
    x, queries = random(2, 192), random(2, 4, 32, seed=1)
    keys, values = cached(2, 300, 32, torch.float32)
    mask = torch.zeros(2, 300, dtype=torch.bool)
    mask[0, 70:200] = True
    before = half.attend(x, queries, keys, values, mask)
    keys[:, :, :70] = values[:, :, 200:] = 1e30
    after = half.attend(x, queries, keys, values, mask)
    assert torch.equal(before, after)
    assert_near(after[1], x[1].double() + attention_weights().outward_bias.double())  # attends to nothing
    keys[:, :, 100, 0] = torch.nan
    spoiled = half.attend(x, queries, keys, values, mask)
    assert spoiled[0].isnan().all()
    assert torch.equal(spoiled[1], after[1])


@pytest.mark.parametrize("capability", [(6, 1), (9, 0)])
@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_a_layer_is_few_launches(emulated_cuda: Path, tokens: int, capability: tuple[int, int]) -> None:
    launcher = Emulation(emulated_cuda, capability=capability)
    kernels = CudaKernels(CPU, launcher)
    attention, block = kernels.attention(attention_weights()), kernels.feed_forward(feed_forward_weights())
    keys, values = cached(2, 200, 32, torch.float32)
    x = random(tokens, 192)
    queries, *_ = attention.project(x, *turns(tokens, 32, torch.float32))
    block.forward(attention.attend(x, queries, keys, values, None))
    assert len(launcher.launched) <= 14


def test_scratch_is_shared_and_what_is_ready_stays_right(emulated_cuda: Path) -> None:
    kernels = CudaKernels(CPU, Emulation(emulated_cuda))
    layers = [kernels.feed_forward(feed_forward_weights(shape=shape)) for shape in ((192, 320), (256, 700))]
    inputs = [random(tokens, layer._hidden, seed=tokens) for tokens in (1, 4, 9) for layer in layers]
    fresh = [layer.forward(x) for x, layer in zip(inputs, layers * 3, strict=True)]
    grown = kernels._card.scratch.nbytes
    again = [layer.forward(x) for x, layer in zip(inputs, layers * 3, strict=True)]
    assert kernels._card.scratch.nbytes == grown
    for a, b in zip(fresh, again, strict=True):
        assert torch.equal(a, b)
    layers.clear()
    gc.collect()
    assert kernels._card.scratch.nbytes == 0  # closed models leave none


def test_nothing_to_do(kernels: CudaKernels) -> None:
    attention, block = kernels.attention(attention_weights()), kernels.feed_forward(feed_forward_weights())
    none = torch.zeros(0, 192)
    queries, keys, values = attention.project(none, torch.zeros(0, 32), torch.zeros(0, 32))
    assert (queries.shape, keys.shape, values.shape) == ((0, 4, 32), (1, 2, 0, 32), (1, 2, 0, 32))
    cache = cached(2, 5, 32, torch.float32)
    assert block.forward(attention.attend(none, queries, *cache, None)).shape == (0, 192)


def test_what_cannot_be_meant_is_refused(kernels: CudaKernels) -> None:
    weights, keys = attention_weights(), cached(2, 9, 32, torch.float32)
    half, x, queries = kernels.attention(weights), random(2, 192), random(2, 4, 32)
    with pytest.raises(UsageError, match="heads of 12 numbers"):
        kernels.attention(replace(weights, head_dim=12))
    with pytest.raises(UsageError, match=r"matrix of keys .* \[64, 192\]"):
        kernels.attention(replace(weights, inward=(weights.inward[0],) * 3))
    with pytest.raises(UsageError, match="give all in one dtype"):
        kernels.attention(replace(weights, outward_bias=random(192).half()))
    with pytest.raises(UsageError, match=r"factors is .*float64"):
        kernels.attention(replace(weights, factors=random(192).double()))
    with pytest.raises(UsageError, match=r"expected .*\[tokens, 192\]"):
        half.project(random(2, 190), *turns(2, 32, torch.float32))
    with pytest.raises(UsageError, match="cos and sin are"):
        half.project(x, *turns(3, 32, torch.float32))
    with pytest.raises(UsageError, match="1 slots for 2 new tokens"):
        half.step(x, *turns(2, 32, torch.float32), *cached(2, 1, 32, torch.float32), None)
    with pytest.raises(UsageError, match="queries, keys, values are"):
        half.attend(x, queries.half(), *keys, None)
    with pytest.raises(UsageError, match="queries, keys, values are"):
        half.attend(x, queries, keys[0], keys[1].half(), None)
    with pytest.raises(UsageError, match=r"the mask is .*expected bool \[2, 9\]"):
        half.attend(x, queries, *keys, torch.ones(2, 8, dtype=torch.bool))
    block = feed_forward_weights()
    with pytest.raises(UsageError, match="unknown activation"):
        kernels.feed_forward(replace(block, activation="swish"))
    with pytest.raises(UsageError, match="down is a matrix"):
        kernels.feed_forward(replace(block, down=matrix(320, 100, 64, "int4")))


def test_structures_are_laid_out_as_the_compiler_has_them(kernels: CudaKernels) -> None:
    emulation: Any = kernels._launcher
    names = {
        "layer_enter": layer_calls.EnterArguments,
        "layer_rotate": layer_calls.RotateArguments,
        "layer_combine": layer_calls.CombineArguments,
        "layer_leave": layer_calls.LeaveArguments,
        "layer_settle": layer_calls.SettleArguments,
        "attention_1_8_2": layer_calls.AttentionArguments,
    }
    for kernel, structure in names.items():
        assert emulation.argument_bytes(kernel) == ctypes.sizeof(structure)


@pytest.mark.parametrize("heads", [Heads(32, 4, 64), Heads(64, 8, 128), Heads(32, 32, 128), Heads(16, 1, 256)])
@pytest.mark.parametrize("multiprocessors", [24, 82, 132])
def test_units_take_all_slots_and_fit_a_card(heads: Heads, multiprocessors: int) -> None:
    for tokens in (1, 2, 8, 64, 512):
        for slots in (1, 64, 65, 3000, 40_000, 131_072):
            units = Units.of(tokens, slots, heads, multiprocessors)
            slices = -(-slots // layer_calls.SLICE)
            assert (units.count - 1) * units.per_unit < slices <= units.count * units.per_unit
            assert units.tiles * units.queries >= tokens * heads.queries // heads.keys
            arguments = layer_calls.AttentionArguments(head_dim=heads.size, key_heads=heads.keys)
            call = layer_calls.attention_call(arguments, 2, units)
            assert call.shared_bytes <= 48 << 10
            assert max(call.grid[1:]) <= 65535
            assert call.grid[0] == 1 or call.grid[1] * call.grid[2] < 2 * multiprocessors


def moved(weights: Any, device: torch.device) -> Any:
    """The same weights on a device."""
    if isinstance(weights, Tensor):
        return weights.to(device)
    if isinstance(weights, tuple):
        return tuple(moved(each, device) for each in weights)
    if isinstance(weights, Planes | AttentionWeights | FeedForwardWeights):
        return replace(weights, **{f.name: moved(getattr(weights, f.name), device) for f in fields(weights)})
    assert not is_dataclass(weights)
    return weights


@pytest.fixture(scope="session")
def on_gpu() -> CudaKernels:
    """The kernels of the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return CudaKernels(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 9, 32, 64, 300])
@pytest.mark.parametrize("heads", [(32, 4, 64), (16, 16, 128), (12, 3, 80), (4, 2, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_the_reference(
    on_gpu: CudaKernels, dtype: torch.dtype, heads: tuple[int, int, int], tokens: int
) -> None:
    device, hidden = on_gpu.device, 2048
    weights, block = attention_weights(dtype, heads, hidden), feed_forward_weights(dtype, (hidden, 3000))
    half, other = on_gpu.attention(moved(weights, device)), on_gpu.feed_forward(moved(block, device))
    x = random(tokens, hidden).to(dtype)
    cos, sin = turns(tokens, heads[2], dtype)
    found = half.project(*(each.to(device) for each in (x, cos, sin)))
    for a, b in zip(found, reference(weights).project(x.double(), cos, sin), strict=True):
        assert_near(a.cpu(), b, 3.0)
    assert_near(other.forward(x.to(device)).cpu(), reference(block).forward(x.double()), 3.0)
    queries = random(tokens, heads[0], heads[2], seed=1)
    for slots in (tokens, 700, 5000) if tokens <= 64 else (tokens, 700):  # the reference takes its time
        keys, values = cached(heads[1], slots, heads[2], dtype)
        mask = random(tokens, slots, seed=2) > 0.5
        mask[:, slots - tokens :] |= torch.eye(tokens, dtype=torch.bool)
        for some in (None, mask):
            there = [None if each is None else each.to(device) for each in (x, queries, keys, values, some)]
            assert_near(
                half.attend(*there).cpu(), reference(weights).attend(x.double(), queries, keys, values, some), 3.0
            )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_a_token_is_the_same_in_any_company(on_gpu: CudaKernels, dtype: torch.dtype) -> None:
    device, weights = on_gpu.device, attention_weights(dtype, (32, 4, 64), 2048)
    half = on_gpu.attention(moved(weights, device))
    block = on_gpu.feed_forward(moved(feed_forward_weights(dtype, (2048, 3000)), device))
    x, queries = random(32, 2048).to(device, dtype), random(32, 32, 64, seed=1).to(device)
    keys, values = (each.to(device) for each in cached(4, 9000, 64, dtype))
    turn = [each.to(device) for each in turns(32, 64, dtype)]
    together = half.attend(x, queries, keys, values, None), block.forward(x), half.project(x, *turn)[0]
    for first, tokens in ((0, 1), (31, 1), (7, 3), (12, 20)):
        some, end = slice(first, first + tokens), 9000 - 32 + first + tokens
        alone = half.attend(x[some], queries[some], keys[:, :, :end], values[:, :, :end], None)
        assert torch.equal(alone, together[0][some])
        assert torch.equal(block.forward(x[some]), together[1][some])
        assert torch.equal(half.project(x[some], *(each[some] for each in turn))[0], together[2][some])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 5, 9, 65, 100])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_a_step_is_its_parts_bit_for_bit(on_gpu: CudaKernels, dtype: torch.dtype, tokens: int) -> None:
    device = on_gpu.device
    half = on_gpu.attention(moved(attention_weights(dtype, (32, 4, 64), 2048), device))
    for slots in (tokens, 700, 9000)[tokens > 1 :]:
        x, turn = random(tokens, 2048).to(device, dtype), moved(turns(tokens, 64, dtype, slots - tokens), device)
        mask = (random(tokens, slots, seed=2) > 0.3).to(device)
        for some in (None, mask):
            keys, values = moved(cached(4, slots, 64, dtype, seed=4), device)
            queries, *new = half.project(x, *turn)
            wanted = [each.clone() for each in (keys, values)]
            for each, last in zip(wanted, new, strict=True):
                each[:, :, slots - tokens :] = last
            out = half.attend(x, queries, *wanted, some)
            assert torch.equal(half.step(x, *turn, keys, values, some), out)
            assert torch.equal(keys, wanted[0])
            assert torch.equal(values, wanted[1])
            if some is None:
                wanted_out = reference(attention_weights(dtype, (32, 4, 64), 2048)).attend(
                    *(each.cpu() for each in (x.double(), queries, *wanted)), None
                )
                assert_near(out.cpu(), wanted_out, 3.0)
