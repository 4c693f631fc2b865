"""What is timed: which kernel over which matrices, one call of it, and what the reference says of its results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from tiercache.bench import workset
from tiercache.bench.shapes import GROUP, SHAPES
from tiercache.kernels.contract import Kernels
from tiercache.kernels.reference import ReferenceKernels, activate
from tiercache.quant.planes import Planes

BUNDLE_KERNELS = ("products", "product_down", "ffn")
SHAPE_NAMES: Mapping[str, str] = MappingProxyType(
    {"7b": "llama-2-7b", "70b": "llama-2-70b", **{name: name for name in SHAPES}}
)
_ACTIVATION = "silu"
_SAMPLE_ROWS, _SAMPLE_GROUPS = 128, 4
_REFERENCE_ROWS = 2048  # decoded at a time


@dataclass(frozen=True)
class Case:
    """A kernel over matrices of [rows, columns], `parts` of which lie side by side.

    In a bundle, whose parts are gate, up and down, gate and up are multiplied together, as the engine does: `products`
    of both in one walk. `product` is for matrices that lie by themselves.
    """

    shape: str
    kernel: str
    rows: int
    columns: int
    parts: int

    @property
    def inputs(self) -> int:
        """Features of x."""
        return self.rows if self.kernel == "product_down" else self.columns

    @property
    def all_rows(self) -> int:
        """Rows that results name: of gate and up together for `products`."""
        return 2 * self.rows if self.kernel == "products" else self.rows

    @property
    def outputs(self) -> int:
        """Features of the results."""
        return self.all_rows if self.kernel in ("product", "products") else self.columns

    @property
    def weights(self) -> int:
        """Weights that a call multiplies by."""
        return self.all_rows * self.columns * (3 if self.kernel == "ffn" else 1)


def cases(shape: str) -> tuple[Case, ...]:
    """Those of a model's shape: matrices by themselves, as high as wide and higher, and a feed-forward bundle."""
    found = SHAPES[SHAPE_NAMES[shape]]
    alone = (Case(shape, "product", rows, found.hidden, 1) for rows in (found.hidden, found.ffn))
    return *alone, *(Case(shape, kernel, found.ffn, found.hidden, 3) for kernel in BUNDLE_KERNELS)


def work(case: Case, units: list[tuple[Planes, ...]]) -> list[tuple[Planes, ...]]:
    """The matrices that calls take in turn: a bundle, its gate and up, or any one part, since all parts look alike."""
    if case.kernel == "ffn":
        return units
    if case.kernel == "products":
        return [unit[:2] for unit in units]
    return [(weight,) for unit in units for weight in unit]


def bound_call(
    kernels: Kernels, case: Case, weights: list[tuple[Planes, ...]], x: Tensor, out: Tensor
) -> Callable[[int], None]:
    """One call of the kernel, activations made ready; `out` goes on growing."""

    def call(number: int) -> None:
        chosen = weights[number % len(weights)]
        if case.kernel == "product_down":
            kernels.matmul_transposed(x, chosen[0], out)
        elif case.kernel == "product":
            kernels.matmul(kernels.quantize_activations(x, GROUP), chosen[0], out)
        elif case.kernel == "products":
            kernels.matmuls(kernels.quantize_activations(x, GROUP), chosen, out.chunk(2, dim=1))
        else:
            kernels.ffn(kernels.quantize_activations(x, GROUP), chosen[:2], chosen[2], _ACTIVATION, out)

    return call


@dataclass(frozen=True)
class Expected:
    """What the reference gives at some outputs, for all tokens."""

    features: Tensor  # [sampled]
    values: Tensor  # [tokens, sampled]


def expected(case: Case, weights: tuple[Planes, ...], x: Tensor) -> Expected:
    """The reference's results over one entry of `work`, x on the processor."""
    if case.kernel in ("product", "products"):
        rows = torch.linspace(0, case.rows - 1, min(_SAMPLE_ROWS, case.rows)).long().unique()
        features = torch.cat([rows + part * case.rows for part in range(len(weights))])
        return Expected(features, torch.cat([_matmul(x, workset.some_rows(weight, rows)) for weight in weights], dim=1))
    if case.kernel == "ffn":
        gate, up, down = weights
        hidden = activate(_ACTIVATION, _all_rows(x, gate)) * _all_rows(x, up)
    else:
        hidden, (down,) = x.float(), weights
    groups = torch.linspace(0, case.columns // GROUP - 1, _SAMPLE_GROUPS).long().unique().tolist()
    kernels, values = ReferenceKernels(), []
    for group in groups:
        out = torch.zeros(len(x), GROUP)
        kernels.matmul_transposed(hidden, workset.one_group(down, group), out)
        values.append(out)
    features = torch.cat([torch.arange(group * GROUP, (group + 1) * GROUP) for group in groups])
    return Expected(features, torch.cat(values, dim=1))


def _all_rows(x: Tensor, weight: Planes) -> Tensor:
    """The whole product, a few rows at a time: decoded, the matrices of a large model take gigabytes."""
    pieces = torch.arange(weight.rows).split(_REFERENCE_ROWS)
    return torch.cat([_matmul(x, workset.some_rows(weight, rows)) for rows in pieces], dim=1)


def _matmul(x: Tensor, weight: Planes) -> Tensor:
    kernels, out = ReferenceKernels(), torch.zeros(len(x), weight.rows)
    kernels.matmul(kernels.quantize_activations(x, weight.group), weight, out)
    return out


def error(wanted: Expected, out: Tensor) -> float:
    """Largest difference, relative to the root mean square of a token's results; NaN if any result is."""
    values = wanted.values[: len(out)]
    scale = values.square().mean(dim=1).sqrt()  # [tokens]
    return float(((out[:, wanted.features] - values).abs().amax(dim=1) / scale).max())
