"""What the plane kernels are tried on: matrices and activations from a seed, operations, how far results may be off."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import kernel_bounds
import torch
from hypothesis import strategies as st
from torch import Tensor

from tiercache.kernels.contract import ACTIVATIONS, Kernels
from tiercache.kernels.reference import ReferenceKernels
from tiercache.quant.planes import GROUPS, PRECISIONS, Planes, encode

REFERENCE = ReferenceKernels(dtype=torch.float64)
OPERATIONS = ("product", "products", "product_down", "fc", "gated")
SELECTING = ("product", "product_down", "fc", "gated")  # those that take rows
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Matrices of [rows, columns] side by side, and activations for them; the seed decides every value."""

    rows: int
    columns: int
    tokens: int
    group: int = 64
    precision: str = "int4"
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    activation: str = "silu"
    rows_seed: int | None = None  # of a list of rows, with repetitions and in no order
    seed: int = 0

    def matrices(self) -> tuple[Planes, ...]:
        """gate, up, down."""
        weights = _matrices(self.rows, self.columns, self.group, self.seed)
        return tuple(weight.at(self.precision) for weight in weights)

    def chosen(self) -> Tensor | None:
        """The rows taken."""
        if self.rows_seed is None:
            return None
        draw = torch.Generator().manual_seed(self.rows_seed)
        count = int(torch.randint(0, self.rows + 3, (1,), generator=draw))
        rows = torch.randint(0, self.rows, (count,), generator=draw)
        return rows.int() if self.rows_seed % 2 else rows

    def x(self, operation: str) -> Tensor:
        """[tokens, inputs]: groups of unlike size, one token of zeros if there are several."""
        rows = self.chosen()
        inputs = self.columns if operation != "product_down" else self.rows if rows is None else len(rows)
        draw = torch.Generator().manual_seed(self.seed + 1)
        x = torch.randn(self.tokens, inputs, generator=draw)
        x *= torch.exp(torch.randn(1 + inputs // 32, generator=draw)).repeat_interleave(32)[:inputs]
        x[1:2] = 0
        return (x * self.scale).to(self.dtype)

    def start(self, operation: str) -> Tensor:
        """What lies in `out` before: [tokens, outputs], rows further apart than they are long."""
        rows = self.chosen()
        taken = self.rows if rows is None else len(rows)
        outputs = {"product": taken, "products": 2 * self.rows}.get(operation, self.columns)
        draw = torch.Generator().manual_seed(self.seed + 2)
        return torch.randn(self.tokens, outputs + 7, generator=draw)[:, 3 : 3 + outputs] * self.scale


@lru_cache(maxsize=32)
def _matrices(rows: int, columns: int, group: int, seed: int) -> tuple[Planes, ...]:
    """Rows of unlike size, some of equal weights (step 0), some zero."""
    draw = torch.Generator().manual_seed(seed)
    weights = torch.randn(3, rows, columns, generator=draw)
    weights *= 0.03 * torch.exp(2 * torch.randn(3, rows, 1, generator=draw))
    kind = torch.randint(0, 16, (3, rows), generator=draw)
    weights[kind == 0] = weights[kind == 0][:, :1].expand(-1, columns)
    weights[kind == 1] = 0
    gate, up, down = weights
    return encode(gate, group), encode(up, group), encode(down, group)


def run(
    kernels: Kernels, operation: str, case: Case, x: Tensor, weights: Sequence[Planes], out: Tensor, rows: Tensor | None
) -> Tensor:
    """One operation, added to `out`."""
    gate, up, down = weights
    if operation == "product_down":
        kernels.matmul_transposed(x, down, out, rows)
        return out
    ready = kernels.quantize_activations(x, gate.group)
    if operation == "product":
        kernels.matmul(ready, gate, out, rows)
    elif operation == "products":
        kernels.matmuls(ready, [gate, up], out.chunk(2, dim=1))
    else:
        inward = [gate] if operation == "fc" else [gate, up]
        kernels.ffn(ready, inward, down, case.activation, out, rows)
    return out


def result(kernels: Kernels, operation: str, case: Case) -> Tensor:
    """Of a case as it is, its matrices in a bundle."""
    weights = kernel_bounds.bundle(case.matrices())
    return run(kernels, operation, case, case.x(operation), weights, case.start(operation), case.chosen())


def allowed(operation: str, case: Case, wanted: Tensor) -> Tensor:
    """How far from the reference's results a case may be."""
    rows, x = case.chosen(), case.x(operation).double()
    gate, up, down = (kernel_bounds.chosen(weight, rows) for weight in case.matrices())
    bounds: dict[str, Callable[[], Tensor]] = {
        "product": lambda: kernel_bounds.matmul(x, gate),
        "products": lambda: torch.cat([kernel_bounds.matmul(x, gate), kernel_bounds.matmul(x, up)], dim=1),
        "product_down": lambda: kernel_bounds.matmul_transposed(x, down),
        "fc": lambda: kernel_bounds.ffn(x, [gate], down, case.activation),
        "gated": lambda: kernel_bounds.ffn(x, [gate, up], down, case.activation),
    }
    slices = -(-gate.rows // kernel_bounds.SLICE)
    added = (slices + 4) * kernel_bounds.ULP * (case.start(operation).abs() + wanted.abs())
    return bounds[operation]() + added


SIZES = st.one_of(st.integers(1, 140), st.sampled_from([255, 256, 257, 511, 513, 600]))
# fp16 holds neither of the last two, and a feed-forward block multiplies magnitudes.
SCALES = {torch.float32: (1.0, 100.0, 1e30, 1e-30), torch.bfloat16: (1.0, 1e30, 1e-30), torch.float16: (1.0, 100.0)}


@st.composite
def cases(draw: st.DrawFn, extreme: bool = True) -> Case:
    dtype = draw(st.sampled_from(DTYPES))
    return Case(
        draw(SIZES),
        draw(SIZES),
        draw(st.integers(1, 40) | st.integers(1, 5)),
        draw(st.sampled_from(GROUPS)),
        draw(st.sampled_from(sorted(PRECISIONS))),
        dtype,
        draw(st.sampled_from(SCALES[dtype])) if extreme else 1.0,
        draw(st.sampled_from(ACTIVATIONS)),
        draw(st.none() | st.integers(0, 99)),
        draw(st.integers(0, 99)),
    )
