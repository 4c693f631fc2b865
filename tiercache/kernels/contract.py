"""What every backend of the plane kernels can do; the `reference` says what the results are.

Knows planes and activations. A backend never knows where a plane lay before it was given, nor which tier or module it
belongs to: planes are merged as integers from as many pointers as there are planes, so that no placement changes a bit.

Shapes: x is [tokens, features], contiguous or not; `Planes` may have any row stride, but the bytes of a row lie side by
side. `rows` selects rows of the stored matrix (in a feed-forward bundle: neurons by slot); None takes all, an empty
list none; a row may occur more than once. `SlotRows` do so plane by plane, for planes that lie in slabs of their own.
Sums are fp32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.kernels.activation import FUNCTIONS
from tiercache.kernels.blocks import Attention, AttentionWeights, FeedForward, FeedForwardWeights
from tiercache.quant.planes import PLANE_BITS, Planes
from tiercache.tiers.device import on_host

MAX_TOKENS = 512
"""Tokens of one call; more are cut into calls of this many."""

_KINDS = (torch.float32, torch.float16, torch.bfloat16)

ACTIVATIONS = tuple(FUNCTIONS)
"""Names of the gates' activations, in the order in which kernels number them."""


@dataclass(frozen=True)
class QuantizedActivations:
    """Activations, quantized once for all matmuls with them, and the sums of their groups.

    Attributes:
        tokens, columns, group: of the activations.
        data: the backend's own.
        backend: whose it is; another's would read nonsense.
    """

    tokens: int
    columns: int
    group: int
    data: tuple[Tensor, ...]
    backend: str = ""


@dataclass(frozen=True, eq=False)
class SlotRows:
    """A selection whose planes lie in different slots: row i takes plane p from `planes[p][i]`.

    Attributes:
        planes: a list for each plane held; a matrix of fewer planes takes the first ones.
        scales: where the scales lie.

    All are int32 or int64 and of one length; int64 in one piece on a CPU, int32 on a GPU, are used as they lie.

    Raises:
        UsageError: they are not.
    """

    planes: tuple[Tensor, ...]
    scales: Tensor

    def __post_init__(self) -> None:
        if not 1 <= len(self.planes) <= len(PLANE_BITS):
            raise UsageError(f"lists of rows for {len(self.planes)} planes: a matrix holds 1 to {len(PLANE_BITS)}")
        for rows in (*self.planes, self.scales):
            _check_list(rows)
            if len(rows) != len(self.scales):
                raise UsageError(f"{len(rows)} rows of a plane beside {len(self.scales)} of scales; give one for each")

    @property
    def count(self) -> int:
        """How many rows are selected."""
        return len(self.scales)


Selection = Tensor | SlotRows | None
"""Which rows are taken: a list for all planes, a list for each, or all rows."""


Parts = Sequence[Planes]
"""Several matrices: gate and up, or all parts of a feed-forward block."""


class Kernels(Protocol):
    """A backend."""

    name: str
    device: torch.device

    def quantize_activations(self, x: Tensor, group: int) -> QuantizedActivations:
        """Quantize x [tokens, columns] (fp32, fp16 or bf16) for `matmul` with matrices of that group size."""

    def hadamard(self, x: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        """Transform x [tokens, columns] times `before`, times `after`: a new fp32 tensor (see `quant.hadamard`).

        Factors are fp32 [columns], in one piece; None for ones. The same bits in every backend.
        """

    def matmul(self, x: QuantizedActivations, weight: Planes, out: Tensor, rows: Selection = None) -> None:
        """out[t, i] += sum over c of W[rows[i], c] x[t, c]; out is fp32 [tokens, rows].

        A token that holds NaN or infinity gets NaN or infinity in every result.
        """

    def matmuls(self, x: QuantizedActivations, weights: Parts, outs: Sequence[Tensor], rows: Selection = None) -> None:
        """`matmul` of several matrices with as many rows each; a backend may read them together (gate, up)."""
        for weight, out in zip(weights, outs, strict=True):
            self.matmul(x, weight, out, rows)

    def matmul_transposed(self, x: Tensor, weight: Planes, out: Tensor, rows: Selection = None) -> None:
        """out[t, c] += sum over i of x[t, i] W[rows[i], c]; x is [tokens, rows], out fp32 [tokens, columns].

        The neuron-major layout of down matrices: a neuron's column lies as a row, grouped along its own length. A token
        that holds NaN or infinity in x gets NaN or infinity in every result.
        """

    def ffn(
        self, x: QuantizedActivations, inward: Parts, down: Planes, activation: str, out: Tensor, rows: Selection = None
    ) -> None:
        """out += down(act(gate x) * up x), or down(act(fc x)) with one inward matrix; out is fp32 [tokens, hidden]."""

    def linear(self, x: Tensor, weight: Planes, factors: Tensor | None) -> Tensor:
        """x times a matrix whose rows lie along the inputs, with all that goes before: [tokens, rows], dtype of x.

        Args:
            x: [tokens, columns], fp32, fp16 or bf16.
            weight: the matrix.
            factors: what inputs are multiplied by before the Hadamard transform, fp32 [columns]; None for ones.
        """
        out = torch.zeros(x.shape[0], weight.rows, dtype=torch.float32, device=x.device)
        self.matmul(self.quantize_activations(self.hadamard(x, factors), weight.group), weight, out)
        return out.to(x.dtype)

    def takes_heads(self, heads: int, key_heads: int, head_dim: int) -> bool:
        """Whether `attention` takes so many heads of queries, and of keys and values, of so many numbers."""
        return True

    def attention(self, weights: AttentionWeights) -> Attention:
        """The attention half of a layer over some weights, which must stay where they lie while it is used."""
        raise NotImplementedError

    def feed_forward(self, weights: FeedForwardWeights) -> FeedForward:
        """The feed-forward half of a layer; see `attention`."""
        raise NotImplementedError

    def gather(self, pieces: Sequence[Tensor], rows: Tensor, out: Tensor) -> None:
        """Copy rows of byte matrices [n, width] into `out` (uint8), all of the first piece's, then the next's.

        For one copy over a link instead of thousands; `out` may be pinned memory.
        """


def checked_rows(rows: Selection, *weights: Planes) -> int:
    """How many rows a selection names (None: of the first matrix), each list being looked through once.

    Raises:
        UsageError: not int32 or int64, out of range of one of the matrices, or slabs without a list for each plane.
    """
    if isinstance(rows, SlotRows):
        held = max(len(weight.planes) for weight in weights)
        if held > len(rows.planes):
            raise UsageError(f"lists of rows for {len(rows.planes)} planes of a matrix that holds {held}")
        for p, some in enumerate(rows.planes[:held]):
            checked_index(some, min(len(w.planes[p]) for w in weights if p < len(w.planes)), f"plane {p}, a slab")
        return checked_index(rows.scales, min(weight.rows for weight in weights), "scales, a slab")
    if any(weight.slabs for weight in weights):
        raise UsageError("slabs have no rows of their own: give SlotRows, which say where each row's planes lie")
    return weights[0].rows if rows is None else checked_index(rows, min(weight.rows for weight in weights))


def checked_index(rows: Tensor, available: int, what: str = "a matrix") -> int:
    """How many rows a list names, of a matrix that has `available`; see `checked_rows`."""
    _check_list(rows)
    if on_host(rows.device) and rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < available:
        raise UsageError(f"rows {int(rows.min())} to {int(rows.max())} of {what} of {available}")
    return rows.numel()


def _check_list(rows: Tensor) -> None:
    if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise UsageError(f"rows is {rows.dtype} {list(rows.shape)}, expected a list of int32 or int64")


def check_output(out: Tensor, tokens: int, features: int, device: torch.device) -> None:
    """Refuse an output that results cannot be added to."""
    wanted = (tokens, features)
    if out.dtype != torch.float32 or out.shape != wanted or (out.numel() and out.stride(1) != 1):
        raise UsageError(f"out is {out.dtype} {list(out.shape)}, expected fp32 {list(wanted)} with rows in one piece")
    if out.device != device:
        raise UsageError(f"out is on {out.device}, these kernels are of {device}")


def check_transform(x: Tensor, *factors: Tensor | None) -> None:
    """Refuse what `Kernels.hadamard` cannot transform."""
    if x.ndim != 2 or x.dtype not in _KINDS:
        raise UsageError(f"x is {x.dtype} {list(x.shape)}, expected fp32, fp16 or bf16 [tokens, columns]")
    for factor in factors:
        if factor is None:
            continue
        if factor.dtype != torch.float32 or factor.shape != x.shape[1:] or not factor.is_contiguous():
            raise UsageError(
                f"factors are {factor.dtype} {list(factor.shape)}, expected fp32 [{x.shape[1]}] in one piece"
            )
        if factor.device != x.device:
            raise UsageError(f"factors are on {factor.device}, x is on {x.device}")


def check_activations(x: Tensor, features: int | None = None) -> None:
    """Refuse activations of another shape or kind; any number of features if None."""
    if x.ndim != 2 or x.dtype not in _KINDS or (features is not None and x.shape[1] != features):
        wanted = "features" if features is None else features
        raise UsageError(f"x is {x.dtype} {list(x.shape)}, expected fp32, fp16 or bf16 [tokens, {wanted}]")
    if x.shape[0] > MAX_TOKENS:
        raise UsageError(f"{x.shape[0]} tokens in one call; cut them into calls of {MAX_TOKENS}")
