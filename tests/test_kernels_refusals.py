"""What the CPU kernels must not be given: a wrong pointer would end the process, so each is refused by name."""

from collections.abc import Callable

import pytest
import torch

from tiercache.errors import UsageError
from tiercache.kernels.cpu import build
from tiercache.kernels.cpu.backend import CpuKernels
from tiercache.quant.planes import Planes, encode

ROWS, COLUMNS, TOKENS = 5, 60, 2


@pytest.fixture(scope="module")
def kernels() -> CpuKernels:
    return CpuKernels("portable")


def parted_scales(weight: Planes) -> Planes:
    """One group, whose lo and step do not lie side by side."""
    scales = weight.scales.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    return Planes(weight.planes, scales, weight.columns, weight.group)


def on_meta(weight: Planes) -> Planes:
    planes = tuple(plane.to("meta") for plane in weight.planes)
    return Planes(planes, weight.scales.to("meta"), weight.columns, weight.group)


X = torch.randn(TOKENS, COLUMNS)
HIDDEN = torch.zeros(TOKENS, ROWS)
WEIGHT = encode(torch.randn(ROWS, COLUMNS), 64)
BYTES = torch.zeros(4, 4, dtype=torch.uint8)
ROOM = torch.zeros(99, dtype=torch.uint8)
CASES: dict[str, tuple[Callable[[CpuKernels], object], str]] = {
    "no such group": (lambda k: k.quantize_activations(X, 48), "groups of 48"),
    "group of nothing": (lambda k: k.quantize_activations(X, 0), "groups of 0"),
    "a number": (lambda k: k.quantize_activations(torch.tensor(1.0), 64), "expected fp32"),
    "x elsewhere": (lambda k: k.quantize_activations(X.to("meta"), 64), "on meta"),
    "x of down elsewhere": (
        lambda k: k.matmul_transposed(torch.zeros(TOKENS, ROWS, device="meta"), WEIGHT, torch.zeros(TOKENS, COLUMNS)),
        "on meta",
    ),
    "weights elsewhere": (
        lambda k: k.matmul(k.quantize_activations(X, 64), on_meta(WEIGHT), torch.zeros(TOKENS, ROWS)),
        "on meta",
    ),
    "parted scales": (
        lambda k: k.matmul(k.quantize_activations(X, 64), parted_scales(WEIGHT), torch.zeros(TOKENS, ROWS)),
        "scales",
    ),
    "rows elsewhere": (
        lambda k: k.matmul(
            k.quantize_activations(X, 64),
            WEIGHT,
            torch.zeros(TOKENS, 2),
            torch.zeros(2, dtype=torch.int64, device="meta"),
        ),
        "rows is on meta",
    ),
    "an output missing": (
        lambda k: k.matmuls(k.quantize_activations(X, 64), [WEIGHT, WEIGHT], [torch.zeros(TOKENS, ROWS)]),
        "2 matrices and 1 outputs",
    ),
    "x to transform elsewhere": (lambda k: k.hadamard(X.to("meta")), "x is on meta"),
    "whole numbers to transform": (lambda k: k.hadamard(torch.ones(2, 64, dtype=torch.int32)), "expected fp32"),
    "factors too few": (lambda k: k.hadamard(X, torch.ones(COLUMNS - 1)), "factors are"),
    "factors apart": (lambda k: k.hadamard(X, after=torch.ones(2 * COLUMNS)[::2]), "in one piece"),
    "factors elsewhere": (lambda k: k.hadamard(X, torch.ones(COLUMNS, device="meta")), "factors are on meta"),
    "rows of floats": (lambda k: k.gather([BYTES], torch.tensor([1.0]), ROOM), "rows is"),
    "rows beyond": (lambda k: k.gather([BYTES], torch.tensor([4]), ROOM), "rows 4 to 4 of a matrix of 4"),
    "pieces elsewhere": (lambda k: k.gather([BYTES.to("meta")], torch.tensor([1]), ROOM), "on meta"),
    "no room": (lambda k: k.gather([BYTES], torch.tensor([1, 2]), ROOM[:7]), "at least 8 bytes"),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, kernels: CpuKernels) -> None:
    attempt, says = CASES[name]
    with pytest.raises(UsageError, match=says):
        attempt(kernels)


def test_a_bad_second_output_leaves_the_first_alone(kernels: CpuKernels) -> None:
    first = torch.zeros(TOKENS, ROWS)
    with pytest.raises(UsageError, match="out is"):
        kernels.matmuls(kernels.quantize_activations(X, 64), [WEIGHT, WEIGHT], [first, torch.zeros(TOKENS, ROWS + 1)])
    assert not first.any()


@pytest.mark.skipif(len(build.instruction_sets()) < 2, reason="this processor has one instruction set")
def test_what_another_backend_prepared(kernels: CpuKernels) -> None:
    other = CpuKernels(build.instruction_sets()[0])
    with pytest.raises(UsageError, match="prepare them again"):
        other.matmul(kernels.quantize_activations(X, 64), WEIGHT, torch.zeros(TOKENS, ROWS))
