"""What is timed: which kernel over which matrices, one call of it, and what the reference says of its results."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor

from tiercache.bench.shapes import GROUP, Shape, find
from tiercache.kernels.contract import Kernels
from tiercache.kernels.reference import ReferenceKernels
from tiercache.quant.planes import Planes

_SHORT_NAMES: Mapping[str, str] = MappingProxyType({"7b": "llama-2-7b", "70b": "llama-2-70b"})


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


def dimensions(shape: str) -> Shape:
    """Those of a model's shape: of `shapes.SHAPES`, or 7b or 70b.

    Raises:
        UsageError: there is none of this name.
    """
    return find(_SHORT_NAMES.get(shape, shape))


def cases(shape: str) -> list[list[Case]]:
    """Those of a model's shape: a matrix as high as wide, a higher one, a feed-forward bundle.

    Cases that use the same matrices stand together.
    """
    found = dimensions(shape)
    bundle = [Case(shape, kernel, found.ffn, found.hidden, 3) for kernel in ("products", "product_down", "ffn")]
    return [*([Case(shape, "product", rows, found.hidden, 1)] for rows in (found.hidden, found.ffn)), bundle]


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
    """One call of the kernel, which quantizes its activations; `out` goes on growing."""

    def call(number: int) -> None:
        chosen = weights[number % len(weights)]
        if case.kernel == "product_down":
            kernels.matmul_transposed(x, chosen[0], out)
        elif case.kernel == "product":
            kernels.matmul(kernels.quantize_activations(x, GROUP), chosen[0], out)
        elif case.kernel == "products":
            kernels.matmuls(kernels.quantize_activations(x, GROUP), chosen, out.chunk(2, dim=1))
        else:
            kernels.ffn(kernels.quantize_activations(x, GROUP), chosen[:2], chosen[2], "silu", out)

    return call


def expected(case: Case, weights: tuple[Planes, ...], x: Tensor) -> Tensor:
    """The reference's results [tokens, outputs] over one entry of `work`, x in main memory."""
    here = tuple(
        replace(weight, planes=tuple(plane.cpu() for plane in weight.planes), scales=weight.scales.cpu())
        for weight in weights
    )
    out = torch.zeros(len(x), case.outputs)
    bound_call(ReferenceKernels(), case, [here], x, out)(0)
    return out


def error(wanted: Tensor, out: Tensor) -> float:
    """Largest difference, relative to the root mean square of a token's results; NaN if any result is."""
    wanted = wanted[: len(out)]
    scale = wanted.square().mean(dim=1).sqrt()  # [tokens]
    return float(((out - wanted).abs().amax(dim=1) / scale).max())
