"""The CPU backend for every instruction set at hand: within its bound of the reference, and the same bits always."""

from collections.abc import Callable
from dataclasses import replace

import kernel_bounds
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_trials import DTYPES, OPERATIONS, REFERENCE, SELECTING, Case, allowed, cases, result, run
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.kernels.contract import ACTIVATIONS, MAX_TOKENS, Kernels
from tiercache.kernels.cpu import build
from tiercache.kernels.cpu.backend import CpuKernels
from tiercache.quant.planes import Planes, encode

# More than a slice of neurons, a strip of tokens, a span of columns; one row, one column.
LARGE = (
    Case(530, 4200, 2),
    Case(600, 1100, 9, group=128, precision="int8"),
    Case(70, 200, 131, precision="int3"),
    Case(1, 65, 5),
    Case(65, 1, 5, precision="int8"),
    Case(70, 130, MAX_TOKENS, precision="int8"),
)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session")
def all_kernels() -> list[CpuKernels]:
    return [CpuKernels(isa) for isa in build.instruction_sets()]


@pytest.fixture(scope="session", params=build.ISAS)
def kernels(request: pytest.FixtureRequest) -> CpuKernels:
    if request.param not in build.instruction_sets():
        pytest.skip(f"this processor lacks {request.param}")
    return CpuKernels(request.param)


def assert_within_bounds(kernels: Kernels, operation: str, case: Case) -> None:
    wanted = result(REFERENCE, operation, case)
    assert wanted.isfinite().all()
    beyond = (result(kernels, operation, case).double() - wanted).abs() - allowed(operation, case, wanted)
    assert not beyond.numel() or float(beyond.max()) <= 0


@pytest.mark.parametrize("operation", ["product", "products", "product_down"])
@settings(max_examples=40)
@given(case=cases())
def test_products_are_within_their_bound(kernels: CpuKernels, operation: str, case: Case) -> None:
    if operation == "products":
        case = replace(case, rows_seed=None)
    assert_within_bounds(kernels, operation, case)


@pytest.mark.parametrize("operation", ["fc", "gated"])
@settings(max_examples=30)
@given(case=cases(extreme=False))
def test_blocks_are_within_their_bound(kernels: CpuKernels, operation: str, case: Case) -> None:
    assert_within_bounds(kernels, operation, case)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("operation", ["fc", "gated"])
def test_every_activation(kernels: CpuKernels, operation: str, activation: str) -> None:
    assert_within_bounds(kernels, operation, Case(130, 70, 6, activation=activation))


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("operation", ["products", "product_down"])
def test_large_shapes_are_within_their_bound(kernels: CpuKernels, operation: str, case: Case) -> None:
    assert_within_bounds(kernels, operation, case)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_bounds_tell_a_column_that_is_missing(operation: str) -> None:
    case = Case(130, 200, 3)
    x, wanted = case.x(operation), result(REFERENCE, operation, case)
    x[:, -1] = 0
    found = run(REFERENCE, operation, case, x, case.matrices(), case.start(operation), None)
    assert ((found - wanted).abs() > allowed(operation, case, wanted))[0].any()


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=30)
@given(case=cases())
@example(case=LARGE[0])
@example(case=LARGE[2])
def test_every_instruction_set_gives_the_same_bits(all_kernels: list[CpuKernels], operation: str, case: Case) -> None:
    first, *others = all_kernels
    if not others:
        pytest.skip("this processor has one instruction set")
    wanted = result(first, operation, case)
    for other in others:
        assert same(result(other, operation, case), wanted), other.name


def same(one: Tensor, other: Tensor) -> bool:
    """The same bits, except that NaN is NaN."""
    return torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)) and torch.equal(one.isnan(), other.isnan())


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=20)
@given(case=cases(extreme=False))
@example(case=LARGE[1])
@example(case=replace(LARGE[1], group=32))
def test_a_token_alone_has_the_same_bits(kernels: CpuKernels, operation: str, case: Case) -> None:
    weights, x, rows = case.matrices(), case.x(operation), case.chosen()
    together = run(kernels, operation, case, x, weights, case.start(operation), rows)
    alone = case.start(operation)
    for token in range(case.tokens):
        one = slice(token, token + 1)
        run(kernels, operation, case, x[one], weights, alone[one], rows)
    assert torch.equal(alone, together)


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=6)
@given(case=cases(extreme=False))
@example(case=LARGE[0])
@example(case=Case(520, 300, 70))
@example(case=Case(330, 600, 3, group=32))
@example(case=Case(700, 900, 1))  # few tokens, and more than the work that one thread does alone
def test_any_number_of_threads_gives_the_same_bits(kernels: CpuKernels, operation: str, case: Case) -> None:
    wanted = result(CpuKernels(kernels.isa, threads=1), operation, case)
    for threads in (2, 3):
        assert torch.equal(result(CpuKernels(kernels.isa, threads), operation, case), wanted)


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=15)
@given(case=cases(extreme=False), offset=st.integers(1, 63))
def test_no_placement_changes_a_bit(kernels: CpuKernels, operation: str, case: Case, offset: int) -> None:
    apart, x, rows = case.matrices(), case.x(operation), case.chosen()
    wanted = run(kernels, operation, case, x, apart, case.start(operation), rows)
    placed = [
        kernel_bounds.bundle(apart),
        kernel_bounds.bundle(apart, offset),
        [matrix for one in apart for matrix in kernel_bounds.bundle([one], offset)],
    ]
    gate, up, down = placed[1]
    here = replace(apart[2], planes=down.planes[:1] + placed[2][2].planes[1:])
    for weights in [*placed, [gate, up, here]]:
        assert torch.equal(run(kernels, operation, case, x, weights, case.start(operation), rows), wanted)


@pytest.mark.parametrize("operation", SELECTING)
@pytest.mark.parametrize("tokens", [2, 7])
def test_a_list_of_all_rows_is_all_rows(kernels: CpuKernels, operation: str, tokens: int) -> None:
    case = Case(600, 140, tokens)
    x, weights = case.x(operation), kernel_bounds.bundle(case.matrices())
    wanted = run(kernels, operation, case, x, weights, case.start(operation), None)
    rows = torch.arange(case.rows)
    assert torch.equal(run(kernels, operation, case, x, weights, case.start(operation), rows), wanted)


@pytest.mark.parametrize("operation", SELECTING)
@pytest.mark.parametrize("tokens", [0, 2, 7])
def test_nothing_is_added_for_no_rows_or_no_tokens(kernels: CpuKernels, operation: str, tokens: int) -> None:
    case = Case(70, 80, tokens)
    rows = torch.tensor([], dtype=torch.int64) if tokens else None
    x, out = case.x(operation), case.start(operation)
    if tokens and operation == "product":
        out = out[:, :0]
    if tokens and operation == "product_down":
        x = x[:, :0]
    before = out.clone()
    assert torch.equal(run(kernels, operation, case, x, case.matrices(), out, rows), before)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_what_is_not_finite_stays_in_its_token(
    kernels: CpuKernels, operation: str, tokens: int, value: float, group: int
) -> None:
    case = Case(600, 150, tokens, group, activation="relu")
    x, weights = case.x(operation), case.matrices()
    clean = run(kernels, operation, case, x, weights, case.start(operation), None)
    for place in (0, x.shape[1] // 2, x.shape[1] - 1):
        bad = x.clone()
        bad[1, place] = value  # the rest of this token is zero
        out = run(kernels, operation, case, bad, weights, case.start(operation), None)
        assert not out[1].isfinite().any()
        others = torch.arange(tokens) != 1
        assert torch.equal(out[others], clean[others])


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 9])
def test_activations_may_lie_anyhow(kernels: CpuKernels, operation: str, dtype: torch.dtype, tokens: int) -> None:
    case = Case(70, 90, tokens, dtype=dtype)
    x, weights = case.x(operation), case.matrices()
    wanted = run(kernels, operation, case, x.float(), weights, case.start(operation), None)
    wide = torch.zeros(tokens, 2 * x.shape[1] + 5, dtype=dtype)
    for view in (wide[:, 5 : 5 + x.shape[1]], wide[:, 1 : 1 + 2 * x.shape[1] : 2], torch.zeros_like(x.T).T):
        view.copy_(x)
        assert torch.equal(run(kernels, operation, case, view, weights, case.start(operation), None), wanted)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("tokens", [2, 9])
def test_only_the_results_are_written(kernels: CpuKernels, operation: str, tokens: int) -> None:
    case = Case(65, 67, tokens)
    outputs = case.start(operation).shape[1]
    around = torch.full((tokens + 2, outputs + 9), 3.0)
    run(kernels, operation, case, case.x(operation), case.matrices(), around[1:-1, 4 : 4 + outputs], None)
    around[1:-1, 4 : 4 + outputs] = 3.0
    assert around.eq(3.0).all()


@pytest.mark.parametrize("unlike", ["precision", "stride"])
def test_matrices_of_unlike_layout_are_multiplied_as_well(kernels: CpuKernels, unlike: str) -> None:
    case = Case(70, 90, 3)
    gate, up, down = case.matrices()
    weights = [gate, up.at("int3") if unlike == "precision" else kernel_bounds.bundle([up, down])[0], down]
    one, other = case.start("products"), case.start("products")
    run(kernels, "products", case, case.x("products"), weights, one, None)
    run(REFERENCE, "products", case, case.x("products"), weights, other, None)
    wide = replace(case, precision="int3") if unlike == "precision" else case
    bound = torch.maximum(allowed("products", case, other), allowed("products", wide, other))
    assert ((one - other).abs() <= bound).all()


@settings(max_examples=30)
@given(st.integers(1, 200), st.lists(st.integers(0, 199)), st.lists(st.integers(1, 70), max_size=3), st.booleans())
def test_gather_copies_rows(kernels: CpuKernels, count: int, rows: list[int], widths: list[int], spread: bool) -> None:
    index = torch.tensor([row % count for row in rows], dtype=torch.int32 if spread else torch.int64)
    draw = torch.Generator().manual_seed(count)
    pieces = [torch.randint(0, 256, (count, width + 3), generator=draw).to(torch.uint8)[:, 3:] for width in widths]
    out = torch.full((len(rows) * sum(widths) + 2 * spread,), 77, dtype=torch.uint8)
    kernels.gather(pieces, index, out)
    wanted = [piece[index.long()].flatten() for piece in pieces]
    assert torch.equal(out, torch.cat([*wanted, torch.full((2 * spread,), 77, dtype=torch.uint8)]))


def _bad_calls() -> dict[str, Callable[[CpuKernels], object]]:
    """Calls that are refused, by what is wrong with them."""
    gate, up, down = Case(10, 70, 3).matrices()
    x, out = torch.zeros(3, 70), torch.zeros(3, 10)
    hidden, back = torch.zeros(3, 10), torch.zeros(3, 70)
    piece, packed = torch.zeros(10, 4, dtype=torch.uint8), torch.zeros(8, dtype=torch.uint8)
    broad = encode(torch.zeros(10, 70), 128)
    columnwise = Planes(tuple(p.T.contiguous().T for p in gate.planes), gate.scales, 70, 64)
    zero = torch.tensor([0])

    def with_rows(rows: Tensor) -> Callable[[CpuKernels], None]:
        return lambda k: k.matmul(k.quantize_activations(x, 64), gate, out, rows)

    def into(target: Tensor) -> Callable[[CpuKernels], None]:
        return lambda k: k.matmul(k.quantize_activations(x, 64), gate, target)

    return {
        "x of doubles": lambda k: k.quantize_activations(x.double(), 64),
        "x of one dimension": lambda k: k.quantize_activations(x[0], 64),
        "too many tokens": lambda k: k.quantize_activations(torch.zeros(MAX_TOKENS + 1, 2), 64),
        "another number of columns": lambda k: k.matmul(k.quantize_activations(x[:, 1:], 64), gate, out),
        "another group": lambda k: k.matmul(k.quantize_activations(x, 64), broad, out),
        "another group of several": lambda k: k.matmuls(k.quantize_activations(x, 64), [broad, broad], [out, out]),
        "x for another matrix": lambda k: k.matmul_transposed(hidden[:, 1:], down, back),
        "out of doubles": into(out.double()),
        "out of fewer tokens": into(out[1:]),
        "out of fewer rows": into(out[:, 1:]),
        "out by columns": into(torch.zeros(10, 3).T),
        "out elsewhere": into(out.to("meta")),
        "down's out": lambda k: k.matmul_transposed(hidden, down, back[:, 1:]),
        "floating rows": with_rows(zero.float()),
        "rows in a square": with_rows(torch.zeros(2, 2, dtype=torch.int64)),
        "a row below": with_rows(torch.tensor([-1])),
        "a row beyond": with_rows(torch.tensor([10])),
        "a row of down beyond": lambda k: k.matmul_transposed(hidden[:, :1], down, back, torch.tensor([10])),
        "an activation": lambda k: k.ffn(k.quantize_activations(x, 64), [gate, up], down, "swish", back),
        "another number of neurons": lambda k: k.ffn(k.quantize_activations(x, 64), [_first(gate)], down, "silu", back),
        "three inward matrices": lambda k: k.ffn(k.quantize_activations(x, 64), [gate, up, down], down, "silu", back),
        "gate and up unlike": lambda k: k.ffn(k.quantize_activations(x, 64), [gate, up.at("int3")], down, "silu", back),
        "a row of a block beyond": lambda k: k.ffn(
            k.quantize_activations(x, 64), [gate, up], down, "silu", back, 10 + zero
        ),
        "planes by columns": lambda k: k.matmul(k.quantize_activations(x, 64), columnwise, out),
        "to gather into too little": lambda k: k.gather([piece], torch.arange(3), packed),
        "to gather into floats": lambda k: k.gather([piece], zero, packed.float()),
        "to gather a row beyond": lambda k: k.gather([piece], 10 + zero, packed),
        "to gather floats": lambda k: k.gather([piece.float()], zero, packed),
    }


def _first(weight: Planes) -> Planes:
    return kernel_bounds.chosen(weight, torch.tensor([0]))


@pytest.mark.parametrize("wrong", _bad_calls())
def test_what_cannot_be_multiplied_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError):
        _bad_calls()[wrong](CpuKernels("portable"))


def test_the_reader_of_the_roof_loads_every_byte(kernels: CpuKernels) -> None:
    memory = torch.zeros(8 * 256 * 3 + 77, dtype=torch.uint8)
    for at in range(memory.numel()):
        memory[at] = 1 + at % 255
        assert kernels.read(memory.data_ptr(), memory.numel()) == 1 + at % 255
        memory[at] = 0
