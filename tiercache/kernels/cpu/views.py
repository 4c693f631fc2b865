"""Planes, activations and row lists as the C code reads them: addresses and strides.

A view holds no tensor: whoever made it keeps the tensors until the C code is done.
"""

from collections.abc import Sequence
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.kernels.contract import Selection, SlotRows
from tiercache.kernels.cpu.library import CInput, CMatrix
from tiercache.quant.planes import Planes
from tiercache.tiers.device import on_host

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers of dtypes in the C code."""


class Views:
    """The C views of matrices, each made once: a pass has hundreds of matmuls, and making a view costs microseconds."""

    def __init__(self) -> None:
        self._matrices: WeakKeyDictionary[Planes, CMatrix] = WeakKeyDictionary()
        self._pairs: WeakKeyDictionary[Planes, tuple[ReferenceType[Planes], CMatrix | None]] = WeakKeyDictionary()

    def matrix(self, weight: Planes) -> CMatrix:
        """Of one matrix."""
        found = self._matrices.get(weight)
        if found is None:
            found = self._matrices[weight] = _matrix(weight)
        return found

    def pair(self, weights: Sequence[Planes]) -> CMatrix | None:
        """Of two matrices whose rows alternate, so that both are read together; None where their layouts differ."""
        if len(weights) != 2:
            return None
        first, second = weights
        known = self._pairs.get(first)
        if known is None or known[0]() is not second:
            known = self._pairs[first] = ref(second), _pair(self.matrix(first), self.matrix(second))
        return known[1]


def row_lists(rows: Selection) -> tuple[Tensor, ...]:
    """A selection as the C code reads it: the planes' lists and, last, that of the scales; one for all, or none."""
    if rows is None:
        return ()
    given = (*rows.planes, rows.scales) if isinstance(rows, SlotRows) else (rows,)
    for some in given:
        check_on_host("rows", some)
    return tuple(some.to(torch.int64).contiguous() for some in given)


def some_rows(matrix: CMatrix, lists: tuple[Tensor, ...]) -> CMatrix:
    """Some rows of a matrix; the lists must outlive it."""
    if not lists:
        return matrix
    some, last = CMatrix.from_buffer_copy(matrix), lists[-1]
    for p in range(matrix.planes):
        some.index[p] = (lists[p] if len(lists) > 1 else last).data_ptr()
    some.index[3], some.rows = last.data_ptr(), last.numel() * matrix.parts
    return some


def input_view(x: Tensor) -> tuple[CInput, Tensor]:
    """Activations, and the tensor that has to outlive their view."""
    if x.numel() and x.stride(1) != 1:
        x = x.contiguous()
    return CInput(x.data_ptr(), x.stride(0), KINDS[x.dtype], x.shape[0]), x


def row_stride(out: Tensor) -> int:
    """Elements from one row of an output to the next."""
    return out.stride(0) if out.shape[0] > 1 else out.shape[1]


def check_on_host(what: str, tensor: Tensor) -> None:
    """Refuse a tensor that does not lie in main memory."""
    if not on_host(tensor.device):
        raise UsageError(f"{what} is on {tensor.device}; these kernels are the CPU's")


def _matrix(weight: Planes) -> CMatrix:
    matrix = CMatrix(rows=weight.rows, columns=weight.columns, group=weight.group, planes=len(weight.planes), parts=1)
    for p, plane in enumerate(weight.planes):
        check_on_host(f"plane {p}", plane)
        if plane.stride(1) != 1:
            raise UsageError(f"plane {p} has its bytes {plane.stride(1)} apart; the bytes of a row must lie together")
        matrix.plane[p], matrix.plane_stride[p] = plane.data_ptr(), plane.stride(0)
    check_on_host("the scales", weight.scales)
    apart, within = weight.scales.stride()[1:]
    if within != 1 or (apart != 2 and weight.scales.shape[1] > 1):
        raise UsageError(f"scales have strides {weight.scales.stride()}; those of a row must lie together")
    matrix.scale, matrix.scale_stride = weight.scales.data_ptr(), 2 * weight.scales.stride(0)
    return matrix


def _pair(first: CMatrix, second: CMatrix) -> CMatrix | None:
    alike = ("rows", "columns", "group", "planes", "scale_stride")
    if any(getattr(first, name) != getattr(second, name) for name in alike):
        return None
    if list(first.plane_stride) != list(second.plane_stride):
        return None
    both = CMatrix.from_buffer_copy(first)
    both.parts, both.rows = 2, 2 * first.rows
    for p in range(first.planes):
        both.plane_part[p] = (second.plane[p] or 0) - (first.plane[p] or 0)  # None: the address of nothing
    both.scale_part = (second.scale or 0) - (first.scale or 0)
    return both
