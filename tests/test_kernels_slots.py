"""Neurons whose planes lie in different slots: as the reference has them, the bits of rows laid together first."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from cuda_on_cpu.emulate import Emulation
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_trials import DTYPES, OPERATIONS, REFERENCE, Case, allowed
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.kernels.contract import ACTIVATIONS, Kernels, Selection, SlotRows
from tiercache.kernels.cpu import build
from tiercache.kernels.cpu.backend import CpuKernels
from tiercache.kernels.cuda import tiles
from tiercache.kernels.cuda.backend import CudaKernels
from tiercache.quant import planes as codes
from tiercache.quant.planes import GROUPS, PRECISIONS, Planes, encode

DIALECTS = (*build.ISAS, "cuda", "cuda, older", "cuda, far")
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="session", params=DIALECTS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param.startswith("cuda"):
        library: Path = request.getfixturevalue("emulated_cuda")
        far = "far" in request.param
        capability = (7, 5) if "older" in request.param else (8, 0)
        launcher = Emulation(library, far, capability=capability)
        return CudaKernels(
            CPU, launcher, switch=16
        )  # 17 tokens: brought near where they are far, decoded by older cards
    if request.param not in build.instruction_sets():
        pytest.skip(f"this processor lacks {request.param}")
    return CpuKernels(request.param)


@dataclass(frozen=True)
class Slots:
    """Gate, up and down of some neurons, scattered over slabs.

    Attributes:
        matrices: side by side in each slot, whatever the number of slots.
        rows: where the neurons lie.
        wanted: the same neurons as ordinary matrices.
    """

    matrices: list[Planes]
    rows: SlotRows
    wanted: list[Planes]


def slots(case: Case, count: int, room: Sequence[int], kind: torch.dtype = torch.int64, offset: int = 0) -> Slots:
    """`count` neurons drawn from a case's (which may come twice), the slabs larger by `room` (three planes, scales)."""
    draw = torch.Generator().manual_seed(case.seed + 7)
    neurons = torch.randint(0, case.rows, (count,), generator=draw)
    wanted = [taken(matrix, neurons) for matrix in replace(case, precision="int8").matrices()]
    kinds = [[matrix.planes[p] for matrix in wanted] for p in range(3)]
    kinds.append([matrix.scales.flatten(1).view(torch.uint8) for matrix in wanted])
    lists, slabs = [], []
    for parts, extra in zip(kinds, room, strict=True):
        places = torch.randperm(count + extra, generator=draw)[:count]
        width = parts[0].shape[1]
        size = (count + extra) * 3 * width
        slab = torch.randint(0, 256, (offset + size,), generator=draw).to(torch.uint8)[offset:].view(-1, 3, width)
        for part, source in enumerate(parts):
            slab[places, part] = source
        lists.append(places.to(kind))
        slabs.append(slab)
    matrices = []
    for part in range(3):
        scales = slabs[3][:, part].view(torch.float16).unflatten(1, (-1, 2))
        planes = tuple(slab[:, part] for slab in slabs[:3])
        whole = Planes(planes, scales, case.columns, case.group, slabs=True)
        matrices.append(whole.at(case.precision))
    ordinary = [matrix.at(case.precision) for matrix in wanted]
    return Slots(matrices, SlotRows(tuple(lists[:3]), lists[3]), ordinary)


def taken(weight: Planes, rows: Tensor) -> Planes:
    planes = tuple(plane[rows] for plane in weight.planes)
    return replace(weight, planes=planes, scales=weight.scales[rows])


def run(kernels: Kernels, operation: str, case: Case, weights: Sequence[Planes], count: int, rows: Selection) -> Tensor:
    """An operation on `count` neurons, added to something."""
    gate, up, down = weights
    shape = replace(case, rows=count, rows_seed=None)
    x, out = shape.x(operation), shape.start(operation)
    if operation == "product_down":
        kernels.matmul_transposed(x, down, out, rows)
        return out
    ready = kernels.quantize_activations(x, case.group)
    if operation == "product":
        kernels.matmul(ready, gate, out, rows)
    elif operation == "products":
        kernels.matmuls(ready, [gate, up], [out[:, :count], out[:, count:]], rows)
    else:
        kernels.ffn(ready, [gate] if operation == "fc" else [gate, up], down, case.activation, out, rows)
    return out


def assert_right(kernels: Kernels, operation: str, case: Case, found: Slots) -> None:
    """The bits of ordinary matrices, by lists and by none; the reference's results, as near as a backend comes."""
    count = found.rows.count
    out = run(kernels, operation, case, found.matrices, count, found.rows)
    assert torch.equal(out, run(kernels, operation, case, found.wanted, count, None))
    listed = SlotRows((torch.arange(count),) * 3, torch.arange(count, dtype=torch.int32))
    assert torch.equal(out, run(kernels, operation, case, found.wanted, count, listed))
    wanted = run(REFERENCE, operation, case, found.wanted, count, None)
    assert torch.equal(run(REFERENCE, operation, case, found.matrices, count, found.rows), wanted)
    beyond = (out.double() - wanted).abs() - bound(operation, case, found, wanted)
    assert not beyond.numel() or float(beyond.max()) <= 0


def bound(operation: str, case: Case, found: Slots, wanted: Tensor) -> Tensor:
    """`allowed` of a case that has these neurons as its rows."""

    class ExactPlacement(Case):
        def matrices(self) -> tuple[Planes, ...]:
            return tuple(found.wanted)

    shape = replace(case, rows=found.rows.count, rows_seed=None)
    return allowed(operation, ExactPlacement(**vars(shape)), wanted)


@st.composite
def scattered(draw: st.DrawFn) -> tuple[Case, Slots]:
    case = Case(
        20,
        draw(st.sampled_from((1, 64, 70, 130, 300))),
        draw(st.sampled_from((1, 4, 12, 17))),
        draw(st.sampled_from(GROUPS)),
        draw(st.sampled_from(sorted(PRECISIONS))),
        draw(st.sampled_from(DTYPES)),
        activation=draw(st.sampled_from(ACTIVATIONS)),
        seed=draw(st.integers(0, 99)),
    )
    count = draw(st.integers(1, 80))
    room = draw(st.lists(st.integers(0, 30), min_size=4, max_size=4))
    offset = 2 * draw(st.integers(0, 9))  # fp16 stands at even bytes
    return case, slots(case, count, room, draw(st.sampled_from((torch.int32, torch.int64))), offset)


@pytest.mark.parametrize("operation", OPERATIONS)
@settings(max_examples=25)
@given(drawn=scattered())
@example(drawn=(Case(20, 300, 1), slots(Case(20, 300, 1), 530, (0, 40, 9, 200))))  # more than a slice
@example(drawn=(Case(9, 2100, 4, precision="int8"), slots(Case(9, 2100, 4, precision="int8"), 40, (3, 0, 90, 1))))
def test_scattered_neurons_have_the_bits_of_neurons_side_by_side(
    kernels: Kernels, operation: str, drawn: tuple[Case, Slots]
) -> None:
    assert_right(kernels, operation, *drawn)


@pytest.mark.parametrize("precision", sorted(PRECISIONS))
@pytest.mark.parametrize("tokens", [1, 4, 17])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_rung_and_number_of_tokens(kernels: Kernels, operation: str, tokens: int, precision: str) -> None:
    case = Case(30, 200, tokens, precision=precision)
    assert_right(kernels, operation, case, slots(case, 70, (5, 60, 17, 0)))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("tokens", [12, 17])
def test_lists_are_cut_with_the_tiles(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, operation: str, tokens: int
) -> None:
    if not isinstance(kernels, CudaKernels):
        pytest.skip("the CPU's kernels have no tiles")
    monkeypatch.setattr(tiles, "SCRATCH_BYTES", 20_000)
    case = Case(30, 200, tokens, precision="int8")
    assert_right(kernels, operation, case, slots(case, 70, (5, 60, 17, 0)))


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("tokens", [1, 17])
def test_a_lower_rung_takes_the_first_lists(kernels: Kernels, operation: str, tokens: int) -> None:
    """Three lists or two for two planes; the third may name what there is not."""
    case = Case(30, 200, tokens)
    found = slots(case, 40, (5, 60, 17, 0))
    wanted = run(kernels, operation, case, found.matrices, 40, found.rows)
    for more in ((), (torch.full((40,), 1 << 40),)):
        rows = SlotRows((*found.rows.planes[:2], *more), found.rows.scales)
        if not (more and isinstance(kernels, CudaKernels)):  # which holds lists as int32
            assert torch.equal(run(kernels, operation, case, found.matrices, 40, rows), wanted)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("tokens", [1, 17])
def test_lists_of_one_place_are_an_ordinary_list(kernels: Kernels, operation: str, tokens: int) -> None:
    case = Case(50, 200, tokens, precision="int8")
    rows = torch.randint(0, 50, (33,), generator=torch.Generator().manual_seed(1))
    wanted = run(kernels, operation, case, case.matrices(), 33, rows)
    assert torch.equal(run(kernels, operation, case, case.matrices(), 33, SlotRows((rows,) * 3, rows)), wanted)
    strided = torch.stack([rows, rows], dim=1)[:, 0]
    assert torch.equal(run(kernels, operation, case, case.matrices(), 33, strided), wanted)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("tokens", [0, 1, 17])
def test_empty_lists_add_nothing(kernels: Kernels, operation: str, tokens: int) -> None:
    case = Case(5, 100, tokens)
    found = slots(case, 0 if tokens else 3, (0, 4, 2, 1))
    out = run(kernels, operation, case, found.matrices, found.rows.count, found.rows)
    shape = replace(case, rows=found.rows.count)
    assert torch.equal(out, shape.start(operation))


def test_int64_lists_in_one_piece_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    case, given = Case(30, 200, 1), CpuKernels()
    found = slots(case, 20, (1, 2, 3, 4))
    seen: list[int] = []
    matmul = given._library.tc_product

    def spy(matrix: object, *rest: object) -> None:
        seen.extend(matrix._obj.index)  # type: ignore[attr-defined]
        matmul(matrix, *rest)

    monkeypatch.setattr(given._library, "tc_product", spy)
    run(given, "product", case, found.matrices, 20, found.rows)
    lists = found.rows.planes
    assert seen == [lists[0].data_ptr(), lists[1].data_ptr(), None, found.rows.scales.data_ptr()]


COUNT = 6
CASE = Case(10, 70, 2)
FOUND = slots(CASE, COUNT, (3, 1, 4, 2))  # slabs of 9, 7, 10 and 8
GOOD = FOUND.rows


def with_list(p: int, rows: Tensor) -> SlotRows:
    lists = [*GOOD.planes, GOOD.scales]
    lists[p] = rows
    return SlotRows(tuple(lists[:3]), lists[3])


def last(row: int) -> Tensor:
    return torch.tensor([0] * (COUNT - 1) + [row])


WRONG: dict[str, tuple[Callable[[], Selection], str]] = {
    "no list": (lambda: None, "give SlotRows"),
    "an ordinary list": (lambda: torch.arange(COUNT), "give SlotRows"),
    "unequal lengths": (lambda: with_list(1, torch.arange(COUNT - 1)), "5 rows of a plane beside 6 of scales"),
    "scales of other length": (lambda: with_list(3, torch.arange(2)), "6 rows of a plane beside 2"),
    "floats": (lambda: with_list(0, torch.zeros(COUNT)), "expected a list of int32 or int64"),
    "bytes": (lambda: with_list(3, torch.zeros(COUNT, dtype=torch.uint8)), "expected a list of int32 or int64"),
    "a square": (lambda: with_list(2, torch.zeros(COUNT, 2, dtype=torch.int64)), "expected a list"),
    "no plane": (lambda: SlotRows((), GOOD.scales), "lists of rows for 0 planes"),
    "four planes": (lambda: SlotRows((GOOD.scales,) * 4, GOOD.scales), "lists of rows for 4 planes"),
    "too few planes": (lambda: SlotRows(GOOD.planes[:1], GOOD.scales), "for 1 planes of a matrix that holds 2"),
    "a row beyond plane 0": (lambda: with_list(0, last(9)), "rows 0 to 9 of plane 0, a slab of 9"),
    "a row beyond plane 1": (lambda: with_list(1, last(7)), "rows 0 to 7 of plane 1, a slab of 7"),
    "a row below": (lambda: with_list(1, last(-1)), "rows -1 to 0 of plane 1, a slab of 7"),
    "scales beyond": (lambda: with_list(3, last(8)), "rows 0 to 8 of scales, a slab of 8"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_selection_is_refused(kernels: Kernels, operation: str, wrong: str) -> None:
    given, says = WRONG[wrong]
    for each in (kernels, REFERENCE):
        with pytest.raises(UsageError, match=says):
            run(each, operation, CASE, FOUND.matrices, COUNT, given())


@pytest.mark.parametrize("operation", ["fc", "gated"])
def test_every_matrix_of_a_block_is_looked_at(kernels: Kernels, operation: str) -> None:
    """The inward matrix may hold fewer slots than down does."""
    short = [Planes((w.planes[0][:4], w.planes[1]), w.scales, 70, 64, slabs=True) for w in FOUND.matrices[:2]]
    with pytest.raises(UsageError, match="rows 0 to 4 of plane 0, a slab of 4"):
        run(kernels, operation, CASE, [*short, FOUND.matrices[2]], COUNT, with_list(0, last(4)))


def test_lists_elsewhere_are_refused() -> None:
    with pytest.raises(UsageError, match="rows is on meta"):
        run(CpuKernels("portable"), "product", CASE, FOUND.matrices, COUNT, with_list(1, GOOD.scales.to("meta")))


def test_slabs_are_planes_with_rows_of_their_own() -> None:
    gate = FOUND.matrices[0]
    assert gate.slabs
    assert gate.at("int3").slabs
    assert gate.rows == len(gate.scales) == 8
    assert not encode(torch.zeros(2, 70)).at("int3").slabs
    with pytest.raises(UsageError, match="plane 0"):  # not without saying so
        Planes(gate.planes, gate.scales, 70, 64)
    with pytest.raises(UsageError, match="plane 1 is"):  # widths count as ever
        Planes((gate.planes[0], gate.planes[1][:, :-1]), gate.scales, 70, 64, slabs=True)
    with pytest.raises(UsageError, match="plane 0 is"):
        Planes((gate.planes[0][0, 0],), gate.scales, 70, 64, slabs=True)
    with pytest.raises(UsageError, match="scales is"):
        Planes(gate.planes, gate.scales[:, :1], 70, 64, slabs=True)


def test_slabs_are_not_decoded() -> None:
    with pytest.raises(UsageError, match="no rows of their own"):
        codes.decode(FOUND.matrices[0], torch.float32)
