"""The CUDA kernels against the reference: emulated on the CPU from the same source, and on a GPU where there is one."""

import ctypes
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_cpu.cases import PRECISIONS, activations, assert_close, dense, matrix, selection, spans, strided
from cuda_on_cpu.edge import at_the_edge
from cuda_on_cpu.emulate import Emulation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tiercache.errors import EnvironmentUnsupportedError, UsageError
from tiercache.kernels.contract import ACTIVATIONS, MAX_TOKENS
from tiercache.kernels.cuda import down_launches, launches, mma_launches, tiles
from tiercache.kernels.cuda.backend import CudaKernels
from tiercache.kernels.cuda.down_launches import Activations, Slices
from tiercache.kernels.cuda.row_lists import RowLists
from tiercache.kernels.reference import ReferenceKernels
from tiercache.quant.planes import Planes

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def kernels(emulated_cuda: Path) -> CudaKernels:
    """Kernels on the emulation of a card with matrix units for bytes."""
    return CudaKernels(CPU, Emulation(emulated_cuda), switch=24)


@pytest.fixture(scope="session")
def older(emulated_cuda: Path) -> CudaKernels:
    """Of a card whose matrix units take no bytes; it decodes above 24 tokens, so that small tests reach both ways."""
    return CudaKernels(CPU, Emulation(emulated_cuda, capability=(7, 5)), switch=24)


SHAPES = {
    "rows": st.integers(1, 40),
    "columns": st.one_of(st.integers(1, 300), st.integers(1000, 1100), st.integers(2040, 2200)),
    "group": st.sampled_from((32, 64, 128)),
    "precision": st.sampled_from(PRECISIONS),
    "tokens": st.one_of(st.integers(1, 9), st.integers(15, 17), st.integers(24, 26)),
    "seed": st.integers(0, 1 << 16),
}


KINDS = st.sampled_from((torch.float32, torch.float16, torch.bfloat16))


@settings(max_examples=120)
@given(st.data(), st.fixed_dictionaries(SHAPES), KINDS, st.sampled_from((0, 0, 1, 3, 4, 8)))
def test_product_is_the_reference(
    kernels: CudaKernels, older: CudaKernels, data: Any, shape: dict[str, Any], kind: torch.dtype, gap: int
) -> None:
    kernels = data.draw(st.sampled_from((kernels, older)))
    weight = matrix(shape["rows"], shape["columns"], shape["group"], shape["precision"], shape["seed"])
    rows = selection(data.draw, weight.rows)
    x = activations(shape["tokens"], weight.columns, kind, shape["seed"])
    count = weight.rows if rows is None else len(rows)
    out = torch.ones(x.shape[0], count + 2)[:, 1:-1]
    kernels.matmul(kernels.quantize_activations(x, weight.group), strided(weight, gap) if gap else weight, out, rows)
    magnitude = 1 + x.float().abs() @ spans(weight, rows).T
    assert_close(out, 1 + x.double() @ dense(weight, rows).double().T, magnitude)


@settings(max_examples=60)
@given(st.fixed_dictionaries(SHAPES), KINDS, st.sampled_from((0, 1, 4, 8)), st.sampled_from(ACTIVATIONS))
def test_older_cards_come_to_the_same(
    kernels: CudaKernels, older: CudaKernels, shape: dict[str, Any], kind: torch.dtype, gap: int, activation: str
) -> None:
    weight = matrix(shape["rows"], shape["columns"], shape["group"], shape["precision"], shape["seed"])
    placed, x = strided(weight, gap), activations(shape["tokens"], weight.columns, kind, shape["seed"])
    results = []
    for each in (kernels, older):
        out, ffn = torch.zeros(shape["tokens"], weight.rows), torch.zeros(shape["tokens"], weight.columns)
        given_x = each.quantize_activations(x, weight.group)
        each.matmul(given_x, placed, out)
        each.ffn(given_x, [placed, placed], placed, activation, ffn)
        results.append((out, ffn))
    magnitude = x.float().abs() @ spans(weight).T
    assert_close(results[1][0], x.double() @ dense(weight).double().T, magnitude)
    assert_close(results[0][0], results[1][0], magnitude)
    inner = (1 + magnitude) ** (3 if activation == "relu2" else 2)
    assert_close(results[0][1], results[1][1], 2 * inner @ spans(weight))


@settings(max_examples=120)
@given(st.data(), st.fixed_dictionaries(SHAPES), KINDS, st.sampled_from((0, 0, 1, 3, 4, 8)))
def test_product_down_is_the_reference(
    kernels: CudaKernels, older: CudaKernels, data: Any, shape: dict[str, Any], kind: torch.dtype, gap: int
) -> None:
    kernels = data.draw(st.sampled_from((kernels, older)))
    high = data.draw(st.sampled_from((1, 10)))  # several slices of the rows
    weight = matrix(high * shape["rows"], shape["columns"], shape["group"], shape["precision"], shape["seed"])
    rows = selection(data.draw, weight.rows)
    x = activations(shape["tokens"], weight.rows if rows is None else len(rows), kind, shape["seed"])
    out = torch.ones(x.shape[0], weight.columns + 2)[:, 1:-1]
    kernels.matmul_transposed(x, strided(weight, gap) if gap else weight, out, rows)
    magnitude = 1 + x.float().abs() @ spans(weight, rows)
    assert_close(out, 1 + x.double() @ dense(weight, rows).double(), magnitude)


@settings(max_examples=60)
@given(st.data(), st.fixed_dictionaries(SHAPES), st.sampled_from(ACTIVATIONS), st.integers(1, 2), st.booleans())
def test_ffn_is_the_reference(
    kernels: CudaKernels,
    older: CudaKernels,
    data: Any,
    shape: dict[str, Any],
    activation: str,
    inward: int,
    mixed: bool,
) -> None:
    kernels = data.draw(st.sampled_from((kernels, older)))
    given_rungs = [shape["precision"], "int8" if mixed else shape["precision"], shape["precision"]]
    parts = [
        matrix(shape["rows"], shape["columns"], shape["group"], precision, i) for i, precision in enumerate(given_rungs)
    ]
    rows = selection(data.draw, shape["rows"])
    x = torch.randn(shape["tokens"], shape["columns"], generator=torch.Generator().manual_seed(shape["seed"]))
    out, wanted = torch.ones(2, *x.shape)
    kernels.ffn(kernels.quantize_activations(x, shape["group"]), parts[:inward], parts[2], activation, out, rows)
    slow = ReferenceKernels(dtype=torch.float64)
    slow.ffn(slow.quantize_activations(x, shape["group"]), parts[:inward], parts[2], activation, wanted, rows)
    inner = [1 + x.abs() @ spans(part, rows).T for part in parts[:inward]]
    hidden = inner[0] ** (2 if activation == "relu2" else 1) * (inner[1] if inward == 2 else 1)
    assert_close(out, wanted, 1 + 2 * hidden @ spans(parts[2], rows))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("group", "columns"), [(32, 100), (64, 1), (64, 200), (128, 300)])
def test_decoded_weights_are_the_same_bits(kernels: CudaKernels, precision: str, group: int, columns: int) -> None:
    weight = matrix(5, columns, group, precision)
    rows = torch.tensor([4, 0, 0], dtype=torch.int32)
    assert torch.equal(kernels._decoded(strided(weight, 1), RowLists((rows,))), dense(weight, rows))
    assert torch.equal(kernels._decoded(weight, RowLists()), dense(weight))
    assert torch.equal(kernels._decoded(weight, RowLists((rows,))), dense(weight, rows))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_one_row_of_everything(kernels: CudaKernels, precision: str, group: int) -> None:
    weight, x = matrix(1, 1, group, precision), torch.full((1, 1), 3.0)
    out, down = torch.zeros(2, 1, 1)
    kernels.matmul(kernels.quantize_activations(x, group), weight, out)
    kernels.matmul_transposed(x, weight, down)
    assert_close(out, 3 * dense(weight), 3 * spans(weight))
    assert_close(down, 3 * dense(weight), 3 * spans(weight))


@pytest.mark.parametrize("tokens", [1, 8, 11, 25])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_placement_changes_a_bit(emulated_cuda: Path, monkeypatch: Any, tokens: int, precision: str) -> None:
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 100_000)  # several tiles
    up, down = matrix(150, 1100, 64, precision), matrix(150, 200, 64, precision, 1)
    rows = torch.randint(0, 150, (130,), dtype=torch.int32)
    results = []
    for far, gap in ((False, 0), (True, 0), (False, 3), (True, 8)):
        kernels = CudaKernels(CPU, Emulation(emulated_cuda, far), switch=24)
        x = torch.randn(tokens, 1100, generator=torch.Generator().manual_seed(1))
        w, v = (strided(each, gap) if gap else each for each in (up, down))
        quantized = kernels.quantize_activations(x, 64)
        out, sums, ffn = torch.zeros(tokens, 130), torch.zeros(tokens, 200), torch.zeros(tokens, 200)
        kernels.matmul(quantized, w, out, rows)
        kernels.matmul_transposed(out, v, sums, rows)
        kernels.ffn(quantized, [w, w], v, "silu", ffn, rows)
        results.append(torch.cat([out, sums, ffn], 1))
    assert_close(results[0][:, :130], x @ dense(up, rows).T, x.abs() @ spans(up, rows).T)
    for other in results[1:]:
        assert torch.equal(results[0], other)


def test_no_size_of_shared_memory_changes_a_bit(emulated_cuda: Path) -> None:
    weight, x, found, shared = matrix(4, 12_400, 64, "int4"), torch.randn(1, 12_400), [], []
    for capability in ((6, 1), (7, 5)):
        launcher = Emulation(emulated_cuda, capability=capability)
        kernels, out = CudaKernels(CPU, launcher), torch.zeros(1, 4)
        kernels.matmul(kernels.quantize_activations(x, 64), weight, out)
        found.append(out)
        shared.append(launcher.launched[-1].shared_bytes)
    assert torch.equal(*found)
    assert shared == [11 * 4160, 7 * 4160]


@pytest.mark.parametrize(("group", "columns"), [(32, 1056), (64, 1100), (128, 1200)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_alignment_changes_a_bit(kernels: CudaKernels, precision: str, group: int, columns: int) -> None:
    weight, x = matrix(30, columns, group, precision), torch.randn(2, 1200)
    results, found = [], []
    for gap in (None, 8, 4, 1):
        placed = weight if gap is None else strided(weight, gap)
        found.append(launches.matrix(placed, Tensor.data_ptr).aligned)
        out, down = torch.zeros(2, 30), torch.zeros(2, columns)
        kernels.matmul(kernels.quantize_activations(x[:, :columns], group), placed, out)
        kernels.matmul_transposed(x[:, :30], placed, down)
        results.append(torch.cat([out, down], 1))
    assert found[0] == (4 if group == 32 else 16)  # 33 groups of 32: an odd number of 12 bytes
    assert found[2:] == [4, 0]
    for other in results[1:]:
        assert torch.equal(results[0], other)


@pytest.mark.parametrize(
    ("capability", "group"), [((7, 5), 64), *(((8, 0), group) for group in (32, 64, 128))], ids=str
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_token_is_the_same_in_any_company(
    emulated_cuda: Path, monkeypatch: Any, precision: str, group: int, capability: tuple[int, int]
) -> None:
    """Whatever the number of tokens; along the input on a card of any size, across the rows on one size of card."""
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 60_000)  # several tiles
    weight, x = matrix(20, 2300, group, precision), torch.randn(35, 2300)
    up, down = matrix(80, 300, group, precision), matrix(80, 70, group, precision, 1)
    alike: dict[tuple[int, int], Tensor] = {}
    for far, size in ((False, 1), (True, 1), (False, 3)):
        launcher = Emulation(emulated_cuda, far, multiprocessors=size, capability=capability)
        kernels = CudaKernels(CPU, launcher, switch=20)
        for tokens in (1, 2, 4, 9, 20, *([35] if capability == (8, 0) else [])):
            out, across, ffn = torch.zeros(tokens, 20), *torch.zeros(2, tokens, 70)
            kernels.matmul(kernels.quantize_activations(x[:tokens], group), weight, out)
            kernels.matmul_transposed(x[:tokens, :80], down, across)
            given_x = kernels.quantize_activations(x[:tokens, :300], group)
            kernels.ffn(given_x, [up, up], down, "silu", ffn)
            for token in range(tokens):
                both = torch.cat([across[token], ffn[token]])
                assert torch.equal(alike.setdefault((token, 0), out[token]), out[token])
                assert torch.equal(alike.setdefault((token, size), both), both)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
@pytest.mark.parametrize(("group", "precision"), [(32, "int8"), (64, "int4"), (128, "int3")])
def test_many_tokens_across_the_rows_have_the_bits_of_few(
    emulated_cuda: Path, monkeypatch: Any, precision: str, group: int, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(down_launches, "_LEAST_ROWS", 1)  # many slices of a small matrix: blocks add up some of them
    weight, x = matrix(1100, 300, group, precision), torch.randn(65, 1100)
    by_units = capability == (9, 0)
    launcher = Emulation(emulated_cuda, multiprocessors=17 if by_units else 11, capability=capability)
    kernels, whole = CudaKernels(CPU, launcher, switch=65), torch.zeros(65, 300)
    kernels.matmul_transposed(x, weight, whole)
    assert_close(whole, x @ dense(weight), x.abs() @ spans(weight))
    for tokens in (1, 3, 6, 20, 64):
        out = torch.zeros(tokens, 300)
        kernels.matmul_transposed(x[:tokens], weight, out)
        assert torch.equal(out, whole[:tokens])
    calls = [call for call in launcher.launched if call.kernel.startswith("down")]
    assert {call.kernel.split("_")[0] for call in calls} == ({"downmma"} if by_units else {"down", "downs"})
    assert {int(call.kernel.split("_")[2]) for call in calls} == ({1, 2} if by_units else {1, 4, 8, 16, 32, 64})
    assert len({call.arguments.merged for call in calls} - {1}) == 1 < len({call.arguments.merged for call in calls})


@pytest.mark.parametrize("tokens", [1, 3, 8, 10, 25])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_stays_so_and_spreads_to_no_other_token(
    kernels: CudaKernels, precision: str, bad: float, tokens: int
) -> None:
    weight = matrix(20, 130, 64, precision)
    weight.scales[3] = 0  # rows of nothing but zeros
    x, y = torch.randn(tokens, 130), torch.randn(tokens, 20)
    x[0, 129] = y[0, 19] = bad
    out, down, ffn = torch.zeros(tokens, 20), torch.zeros(tokens, 130), torch.zeros(tokens, 130)
    quantized = kernels.quantize_activations(x, 64)
    kernels.matmul(quantized, weight, out)
    kernels.matmul_transposed(y, weight, down)
    kernels.ffn(quantized, [weight, weight], weight, "silu", ffn)
    for each in (out, down, ffn):
        assert not each[0].isfinite().any()
        assert each[1:].isfinite().all()


def test_nothing_to_do(kernels: CudaKernels) -> None:
    weight, none = matrix(4, 100, 64, "int4"), torch.zeros(0, dtype=torch.int32)
    out = torch.ones(3, 100)
    kernels.matmul_transposed(torch.randn(3, 0), weight, out, none)
    kernels.matmul(kernels.quantize_activations(torch.randn(3, 100), 64), weight, torch.ones(3, 0), none)
    kernels.ffn(kernels.quantize_activations(torch.randn(3, 100), 64), [weight], weight, "relu", out, none)
    assert torch.equal(out, torch.ones(3, 100))
    kernels.matmul(kernels.quantize_activations(torch.randn(0, 100), 64), weight, torch.ones(0, 4))
    kernels.matmul_transposed(torch.randn(0, 4), weight, torch.ones(0, 100))
    kernels.gather([weight.planes[0]], none, torch.ones(0, dtype=torch.uint8))


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 70), st.integers(0, 9)), min_size=1, max_size=18),
    st.lists(st.integers(0, 6), max_size=9),
    st.integers(0, 3),
    st.sampled_from((1, 4, 16)),
)
def test_gather_is_the_reference(
    kernels: CudaKernels, shapes: list[tuple[int, int]], rows: list[int], offset: int, unit: int
) -> None:
    pieces = [torch.randint(0, 256, (7, unit * (w + gap)), dtype=torch.uint8)[:, : unit * w] for w, gap in shapes]
    index = torch.tensor(rows, dtype=torch.int64)
    size = len(rows) * sum(piece.shape[1] for piece in pieces)
    found, wanted = torch.zeros(2, size + 9, dtype=torch.uint8)
    kernels.gather(pieces, index, found[offset : offset + size])
    ReferenceKernels().gather(pieces, index, wanted[offset : offset + size])
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_no_byte_is_read_past_the_end(in_child: Callable[..., Any], emulated_cuda: Path, precision: str) -> None:
    for group in (32, 64, 128):
        assert in_child(at_the_edge, str(emulated_cuda), precision, group)


def test_structures_are_laid_out_as_the_compiler_has_them(kernels: CudaKernels) -> None:
    emulation: Any = kernels._launcher
    names = {
        "rows_3_8_4": launches.RowsArguments,
        "mma_3_2_64": mma_launches.ProductArguments,
        "dots_3_1_64": mma_launches.ProductArguments,
        "digits": mma_launches.DigitsArguments,
        "down_1_1_32": down_launches.DownArguments,
        "downs_1_8_32": down_launches.DownArguments,
        "decode_2_0_0": launches.DecodeArguments,
        "prepare": launches.PrepareArguments,
        "sum": down_launches.SumArguments,
        "gather": launches.GatherArguments,
        "hadamard": launches.HadamardArguments,
    }
    for kernel, structure in names.items():
        assert emulation.argument_bytes(kernel) == ctypes.sizeof(structure)


def test_grids_fit_every_card() -> None:
    found = launches.MatrixArguments(groups=448, group=64)
    for count, tokens, mps in ((28672, 8, 82), (128256, 1, 24), (256000, 32, 132), (1, 3, 24), (256000, 512, 82)):
        for group in (32, 64, 128):
            shaped = launches.MatrixArguments(groups=28672 // group, group=group)
            call = launches.rows_call([shaped], 2, (0, 0), (), (0, 0), (count, tokens, 28672), (-1, mps, 48 << 10))
            assert call.shared_bytes <= 48 << 10
            assert call.grid[1] <= 65535
            assert call.grid[1] * launches.WARPS * int(call.kernel[-1]) >= count
            for planes in (1, 2, 3):
                call = mma_launches.mma_call([shaped], planes, (0, 0), (), (0, 0), (count, tokens), (-1, mps))
                assert call.shared_bytes <= 48 << 10
                assert call.grid[1] <= 65535
        by_units = Slices.of(count, 64, 448, mps, by_matrix_units=True)
        call = down_launches.down_call(found, 3, Activations(0, 0, tokens, 8, (0, 0, 0)), (), 0, count, by_units)
        assert call.shared_bytes <= 48 << 10
        assert call.grid[1] * 256 >= 28672
        assert call.grid[0] * int(call.kernel.split("_")[2]) * 8 >= tokens
        assert by_units.size % 64 == 0
        assert (by_units.count - 1) * by_units.size < count <= by_units.count * by_units.size
        slices = Slices.of(count, 64, 448, mps, by_matrix_units=False)
        call = down_launches.down_call(found, 3, Activations(0, 0, tokens, 8, (0, 0, 0)), (), 0, count, slices)
        assert call.shared_bytes <= 48 << 10
        size = int(call.kernel.split("_")[2])
        words = slices.wide * 4 // size if size <= 4 else 256 // size
        assert call.grid[0] * words * 16 >= 28672
        assert call.grid[2] * size >= tokens
        assert slices.wide * slices.classes <= down_launches.LINE_THREADS
        assert (slices.count - 1) * slices.size < count <= slices.count * slices.size
    with pytest.raises(UsageError, match="cut them"):
        launches.rows_call([found], 2, (0, 0), (), (0, 0), (3_000_000, 1, 28672), (-1, 82, 48 << 10))


def test_what_cannot_be_meant_is_refused(emulated_cuda: Path) -> None:
    launcher = Emulation(emulated_cuda)
    kernels = CudaKernels(CPU, launcher)
    weight = matrix(4, 100, 64, "int4")
    x, out = kernels.quantize_activations(torch.randn(2, 100), 64), torch.zeros(2, 4)
    with pytest.raises(UsageError, match="prepared in groups of 32"):
        kernels.matmul(kernels.quantize_activations(torch.randn(2, 100), 32), weight, out)
    with pytest.raises(UsageError, match="rows 0 to 4 of a matrix of 4"):
        kernels.matmul(x, weight, out, torch.tensor([0, 4]))
    with pytest.raises(UsageError, match="unknown activation"):
        kernels.ffn(x, [weight], weight, "swish", torch.zeros(2, 100))
    with pytest.raises(UsageError, match="expected fp32"):
        kernels.matmul(x, weight, out.double())
    with pytest.raises(UsageError, match="tokens in one call"):
        kernels.quantize_activations(torch.zeros(513, 100), 64)
    with pytest.raises(UsageError, match="side by side"):
        kernels.matmul(x, Planes((weight.planes[0].T.contiguous().T,), weight.scales, 100, 64), out)
    with pytest.raises(UsageError, match="of a piece of 4"):
        kernels.gather([weight.planes[0]], torch.tensor([4]), torch.zeros(100, dtype=torch.uint8))
    launcher.refused = weight.planes[1]
    with pytest.raises(UsageError, match="pageable"):
        kernels.matmul(x, weight, out)
    assert not out.any()


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EnvironmentUnsupportedError, match="torch sees no CUDA device"):
        CudaKernels(torch.device("cuda"))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 300), KINDS, st.booleans(), st.booleans())
def test_hadamard_is_the_references_to_the_bit(
    kernels: CudaKernels, tokens: int, columns: int, kind: torch.dtype, before: bool, after: bool
) -> None:
    x = activations(tokens, columns, kind, columns)
    first, last = (torch.rand(columns) + 0.5 if wanted else None for wanted in (before, after))
    want = ReferenceKernels().hadamard(x, first, last)
    assert torch.equal(kernels.hadamard(x, first, last), want)


def test_hadamard_takes_more_tokens_than_products_do(kernels: CudaKernels) -> None:
    x = torch.randn(MAX_TOKENS + 1, 64)
    assert torch.equal(kernels.hadamard(x), ReferenceKernels().hadamard(x))


@pytest.fixture(scope="session")
def on_gpu() -> CudaKernels:
    """The kernels of the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    return CudaKernels(torch.device("cuda"))


@lru_cache(4)  # tests of one precision come one after another, and coding takes most of the time of each
def _coded(columns: int, group: int, precision: str) -> tuple[Planes, Planes]:
    return matrix(700, columns, group, precision), matrix(700, columns, group, precision, 1)


def _moved(weight: Planes, to: Callable[[Tensor], Tensor]) -> Planes:
    return replace(weight, planes=tuple(to(plane) for plane in weight.planes), scales=to(weight.scales))


@pytest.mark.gpu
@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 20, 64])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("group", [32, 64, 128])
def test_a_gpu_gives_the_reference(on_gpu: CudaKernels, group: int, precision: str, tokens: int, pinned: bool) -> None:
    for columns, gap in ((3000, 0), (3001, 3)):
        up, down = _coded(columns, group, precision)
        there = [
            _moved(strided(each, gap) if gap else each, lambda t: t.pin_memory() if pinned else t.to(on_gpu.device))
            for each in (up, down)
        ]
        rows = torch.randint(0, 700, (333,), dtype=torch.int32)
        x, index = torch.randn(tokens, columns), rows.to(on_gpu.device)
        quantized = on_gpu.quantize_activations(x.to(on_gpu.device), group)
        out, sums, ffn = (torch.zeros(tokens, n, device=on_gpu.device) for n in (333, columns, columns))
        on_gpu.matmul(quantized, there[0], out, index)
        on_gpu.matmul_transposed(out, there[1], sums, index)
        on_gpu.ffn(quantized, [there[0], there[1]], there[1], "silu", ffn, index)
        torch.cuda.synchronize()
        assert_close(out.cpu(), x @ dense(up, rows).T, x.abs() @ spans(up, rows).T)
        assert_close(sums.cpu(), out.cpu() @ dense(down, rows), out.cpu().abs() @ spans(down, rows))
        slow, wanted = ReferenceKernels(dtype=torch.float64), torch.zeros(tokens, columns)
        slow.ffn(slow.quantize_activations(x, group), [up, down], down, "silu", wanted, rows)
        inner = [1 + x.abs() @ spans(each, rows).T for each in (up, down)]
        assert_close(ffn.cpu(), wanted, 2 * (inner[0] * inner[1]) @ spans(down, rows))


@pytest.mark.gpu
def test_a_gpu_gathers_from_either_memory_into_either(on_gpu: CudaKernels) -> None:
    here = [torch.randint(0, 256, (50, width), dtype=torch.uint8) for width in (64, 100, 33)]
    pieces = [here[0].pin_memory(), here[1].to(on_gpu.device), here[2].pin_memory()]
    rows, wanted = torch.randint(0, 50, (20,)), torch.zeros(20 * 197, dtype=torch.uint8)
    ReferenceKernels().gather(here, rows, wanted)
    for out in (torch.zeros_like(wanted).pin_memory(), torch.zeros_like(wanted, device=on_gpu.device)):
        on_gpu.gather(pieces, rows, out)
        torch.cuda.synchronize()
        assert torch.equal(out.cpu(), wanted)
    with pytest.raises(UsageError, match="pageable"):
        on_gpu.gather(here, rows, torch.zeros_like(wanted, device=on_gpu.device))
