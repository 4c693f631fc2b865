"""The backend of this machine's processor: C with vector instructions, chosen when it is loaded.

Work is shared among the threads of the OpenMP runtime that torch has loaded, so that no second set of threads competes
with torch's. The arithmetic, which is the same to the bit for every instruction set, number of threads and number of
tokens, is told in `source/planes.h`.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor

from tiercache.errors import EnvironmentUnsupportedError, UsageError
from tiercache.kernels.contract import (
    ACTIVATIONS,
    QuantizedActivations,
    Selection,
    SlotRows,
    check_activations,
    check_output,
    check_transform,
    checked_index,
    checked_rows,
)
from tiercache.kernels.cpu import build
from tiercache.quant.planes import Planes, num_groups
from tiercache.tiers.device import on_host

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ALIGN = 64
_FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the process's defaults are


class _Matrix(Structure):
    _fields_ = (
        ("plane", c_void_p * 3),
        ("scale", c_void_p),
        ("plane_stride", c_int64 * 3),
        ("scale_stride", c_int64),
        ("index", c_void_p * 4),
        ("rows", c_int64),
        ("columns", c_int32),
        ("group", c_int32),
        ("planes", c_int32),
        ("parts", c_int32),
        ("plane_part", c_int64 * 3),
        ("scale_part", c_int64),
    )


class _Input(Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64), ("kind", c_int32), ("tokens", c_int32))


class _Team(Structure):
    _fields_ = (("parallel", c_void_p), ("threads", c_int32), ("reserved", c_int32))


class CpuKernels:
    """See `contract.Kernels`.

    Args:
        isa: an instruction set of `build.ISAS`; the best that this processor has by default.
        threads: as many as torch uses by default.

    Raises:
        EnvironmentUnsupportedError: no compiler, or the processor lacks the instructions.
    """

    def __init__(self, isa: str | None = None, threads: int | None = None) -> None:
        has = build.instruction_sets()
        self.isa = isa or has[0]
        if self.isa in build.ISAS and self.isa not in has:
            raise EnvironmentUnsupportedError(f"this processor lacks {self.isa}; it has {', '.join(has)}")
        path = build.library(self.isa)
        self.name, self.device = f"cpu ({self.isa})", torch.device("cpu")
        self._library = _load(path)
        self._few = self._library.tc_few()
        self._threads = threads
        self._parallel = _openmp()
        self._teams: dict[int, _Team] = {}
        self._sizes: dict[tuple[int, int, int], int] = {}
        self._placed: WeakKeyDictionary[Planes, _Matrix] = WeakKeyDictionary()
        self._pairs: WeakKeyDictionary[Planes, tuple[ReferenceType[Planes], _Matrix | None]] = WeakKeyDictionary()

    def quantize_activations(self, x: Tensor, group: int) -> QuantizedActivations:
        """See `contract.Kernels`."""
        check_activations(x)
        _check_host("x", x)
        tokens, columns = x.shape
        num_groups(columns, group)  # refuses a size that there is not
        few = int(tokens <= self._few)
        nbytes = self._sizes.get((tokens, columns, group))
        if nbytes is None:
            nbytes = self._sizes[tokens, columns, group] = self._library.tc_prepared_bytes(tokens, columns, group)
        memory = torch.empty(nbytes + _ALIGN, dtype=torch.uint8, device="cpu")
        memory = memory[-memory.data_ptr() % _ALIGN :]
        source, keep = _input(x)
        self._library.tc_prepare(byref(source), columns, group, few, memory.data_ptr(), byref(self._team()))
        del keep
        return QuantizedActivations(tokens, columns, group, (memory,), self.name)

    def hadamard(self, x: Tensor, before: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        """See `contract.Kernels`."""
        check_transform(x, before, after)
        _check_host("x", x)  # and so are the factors, which are where x is
        out = torch.empty(x.shape, **_FLOATS)
        source, keep = _input(x)
        first = None if before is None else before.data_ptr()
        last = None if after is None else after.data_ptr()
        self._library.tc_hadamard(byref(source), x.shape[1], first, last, out.data_ptr(), byref(self._team()))
        del keep
        return out

    def matmul(self, x: QuantizedActivations, weight: Planes, out: Tensor, rows: Selection = None) -> None:
        """See `contract.Kernels`."""
        check_output(out, x.tokens, checked_rows(rows, weight), self.device)
        self._check_match(x, weight)
        lists = _lists(rows)
        self._matmul(x, _taken(self._matrix(weight), lists), out)
        del lists

    def matmuls(
        self, x: QuantizedActivations, weights: Sequence[Planes], outs: Sequence[Tensor], rows: Selection = None
    ) -> None:
        """See `contract.Kernels`."""
        if len(weights) != len(outs) or not weights:
            raise UsageError(f"{len(weights)} matrices and {len(outs)} outputs; give one for each")
        count = checked_rows(rows, *weights)
        for weight, out in zip(weights, outs, strict=True):
            check_output(out, x.tokens, weight.rows if rows is None else count, self.device)
            self._check_match(x, weight)
        pair, lists = self._pair(weights), _lists(rows)
        if pair is None:
            for weight, out in zip(weights, outs, strict=True):
                self._matmul(x, _taken(self._matrix(weight), lists), out)
            return
        both = torch.zeros(x.tokens, count, 2, **_FLOATS)
        self._matmul(x, _taken(pair, lists), both.flatten(1))
        for part, out in enumerate(outs):
            out += both[..., part]
        del lists

    def matmul_transposed(self, x: Tensor, weight: Planes, out: Tensor, rows: Selection = None) -> None:
        """See `contract.Kernels`."""
        check_activations(x, checked_rows(rows, weight))
        _check_host("x", x)
        check_output(out, x.shape[0], weight.columns, self.device)
        lists = _lists(rows)
        matrix = _taken(self._matrix(weight), lists)
        source, keep = _input(x)
        scratch = torch.empty(self._library.tc_down_scratch(x.shape[1], weight.columns, x.shape[0]), **_FLOATS)
        where = (scratch.data_ptr(), out.data_ptr(), _stride(out), byref(self._team()))
        self._library.tc_product_down(byref(matrix), byref(source), *where)
        del lists, keep

    def ffn(
        self,
        x: QuantizedActivations,
        inward: Sequence[Planes],
        down: Planes,
        activation: str,
        out: Tensor,
        rows: Selection = None,
    ) -> None:
        """See `contract.Kernels`."""
        if activation not in ACTIVATIONS:
            raise UsageError(f"unknown activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
        count = checked_rows(rows, down, *inward)
        check_output(out, x.tokens, down.columns, self.device)
        for weight in inward:
            self._check_match(x, weight)
            if weight.rows != down.rows:
                raise UsageError(f"inward matrices of {weight.rows} neurons beside a down matrix of {down.rows}")
        entry = self._matrix(inward[0]) if len(inward) == 1 else self._pair(inward)
        if entry is None:
            raise UsageError(f"{len(inward)} inward matrices of unlike layout; a block has one, or gate and up alike")
        lists = _lists(rows)
        first, last = _taken(entry, lists), _taken(self._matrix(down), lists)
        scratch = torch.empty(self._library.tc_ffn_scratch(count, down.columns, x.tokens), **_FLOATS)
        kind, few, data = ACTIVATIONS.index(activation), int(x.tokens <= self._few), x.data[0].data_ptr()
        where = (data, scratch.data_ptr(), out.data_ptr(), _stride(out), byref(self._team()))
        self._library.tc_ffn(byref(first), byref(last), kind, x.tokens, few, *where)
        del lists

    def gather(self, pieces: Sequence[Tensor], rows: Tensor, out: Tensor) -> None:
        """See `contract.Kernels`."""
        for what, tensor in (("rows", rows), ("out", out)):
            _check_host(what, tensor)
        needed = sum(piece.shape[1] for piece in pieces) * rows.numel()
        if out.dtype != torch.uint8 or not out.is_contiguous() or out.numel() < needed:
            raise UsageError(f"out is {out.dtype} of {out.numel()}, expected at least {needed} bytes in one piece")
        for piece in pieces:
            _check_host("a piece", piece)
            if piece.dtype != torch.uint8 or piece.ndim != 2 or piece.stride(1) != 1:
                raise UsageError(f"cannot gather rows of {piece.dtype} {list(piece.shape)}; give byte matrices")
            checked_index(rows, piece.shape[0])
        index, team, at = rows.to(torch.int64).contiguous(), self._team(), out.data_ptr()
        for piece in pieces:
            source, stride, width = piece.data_ptr(), piece.stride(0), piece.shape[1]
            self._library.tc_gather(source, stride, width, index.data_ptr(), index.numel(), at, byref(team))
            at += width * index.numel()

    def _matrix(self, weight: Planes) -> _Matrix:
        """The C view of a matrix, made once: a pass has hundreds of products, and each costs microseconds."""
        found = self._placed.get(weight)
        if found is None:
            found = self._placed[weight] = _matrix(weight)
        return found

    def _pair(self, weights: Sequence[Planes]) -> _Matrix | None:
        """Two matrices whose rows take turns, so that both are read in one walk; None where their layouts differ."""
        if len(weights) != 2:
            return None
        first, second = weights
        known = self._pairs.get(first)
        if known is None or known[0]() is not second:
            known = self._pairs[first] = ref(second), _pair(self._matrix(first), self._matrix(second))
        return known[1]

    def _matmul(self, x: QuantizedActivations, matrix: _Matrix, out: Tensor) -> None:
        few, data = int(x.tokens <= self._few), x.data[0].data_ptr()
        where = (out.data_ptr(), _stride(out), byref(self._team()))
        self._library.tc_product(byref(matrix), x.tokens, few, data, *where)

    def _check_match(self, x: QuantizedActivations, weight: Planes) -> None:
        if (x.columns, x.group) != (weight.columns, weight.group):
            raise UsageError(
                f"activations of {x.columns} in groups of {x.group} for a matrix of {weight.columns} in groups of "
                f"{weight.group}; prepare them for it"
            )
        if x.backend != self.name:
            raise UsageError(f"activations prepared by {x.backend or 'others'} for {self.name}; prepare them again")

    def _team(self) -> _Team:
        """The threads that torch uses now."""
        threads = self._threads or torch.get_num_threads()
        if threads not in self._teams:
            self._teams[threads] = _Team(self._parallel, threads if self._parallel else 1, 0)
        return self._teams[threads]


def _load(path: Path) -> ctypes.CDLL:
    """The library with its signatures."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise EnvironmentUnsupportedError(
            f"the compiled kernels cannot be loaded ({error}); delete {path}, or set TIERCACHE_HOME to a folder from "
            "which programs may be run"
        ) from error
    library.tc_prepared_bytes.argtypes = [c_int32, c_int32, c_int32]
    library.tc_prepared_bytes.restype = c_int64
    matrix, source, team = POINTER(_Matrix), POINTER(_Input), POINTER(_Team)
    library.tc_few.restype = c_int32
    library.tc_down_scratch.argtypes = library.tc_ffn_scratch.argtypes = [c_int64, c_int32, c_int32]
    library.tc_down_scratch.restype = library.tc_ffn_scratch.restype = c_int64
    out = [c_void_p, c_int64, team]
    signatures = {
        "tc_prepare": [source, c_int32, c_int32, c_int32, c_void_p, team],
        "tc_product": [matrix, c_int32, c_int32, c_void_p, *out],
        "tc_product_down": [matrix, source, c_void_p, *out],
        "tc_ffn": [matrix, matrix, c_int32, c_int32, c_int32, c_void_p, c_void_p, *out],
        "tc_hadamard": [source, c_int32, c_void_p, c_void_p, c_void_p, team],
        "tc_gather": [c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, team],
    }
    for name, arguments in signatures.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    return library


def _openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime of this process, which is torch's; GNU's and LLVM's have it."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux
        maps = ""
    loaded = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/" in line}
    names, own = ("libgomp", "libomp", "libiomp"), str(Path(torch.__file__).parent)
    found = sorted((not path.startswith(own), path) for path in loaded if Path(path).name.startswith(names))
    for path in [*(path for _, path in found), "libgomp.so.1"]:  # torch's first: other packages bring some too
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, c_void_p).value
    return None


def _matrix(weight: Planes) -> _Matrix:
    matrix = _Matrix(rows=weight.rows, columns=weight.columns, group=weight.group, planes=len(weight.planes), parts=1)
    for p, plane in enumerate(weight.planes):
        _check_host(f"plane {p}", plane)
        if plane.stride(1) != 1:
            raise UsageError(f"plane {p} has its bytes {plane.stride(1)} apart; the bytes of a row must lie together")
        matrix.plane[p], matrix.plane_stride[p] = plane.data_ptr(), plane.stride(0)
    _check_host("the scales", weight.scales)
    apart, within = weight.scales.stride()[1:]
    if within != 1 or (apart != 2 and weight.scales.shape[1] > 1):
        raise UsageError(f"scales have strides {weight.scales.stride()}; those of a row must lie together")
    matrix.scale, matrix.scale_stride = weight.scales.data_ptr(), 2 * weight.scales.stride(0)
    return matrix


def _lists(rows: Selection) -> tuple[Tensor, ...]:
    """A selection as the C code reads it: the planes' lists and, last, that of the scales; one for all, or none."""
    if rows is None:
        return ()
    given = (*rows.planes, rows.scales) if isinstance(rows, SlotRows) else (rows,)
    for some in given:
        _check_host("rows", some)
    return tuple(some.to(torch.int64).contiguous() for some in given)


def _taken(matrix: _Matrix, lists: tuple[Tensor, ...]) -> _Matrix:
    """Some rows of a matrix; the lists must outlive it."""
    if not lists:
        return matrix
    some, last = _Matrix.from_buffer_copy(matrix), lists[-1]
    for p in range(matrix.planes):
        some.index[p] = (lists[p] if len(lists) > 1 else last).data_ptr()
    some.index[3], some.rows = last.data_ptr(), last.numel() * matrix.parts
    return some


def _pair(first: _Matrix, second: _Matrix) -> _Matrix | None:
    alike = ("rows", "columns", "group", "planes", "scale_stride")
    if any(getattr(first, name) != getattr(second, name) for name in alike):
        return None
    if list(first.plane_stride) != list(second.plane_stride):
        return None
    both = _Matrix.from_buffer_copy(first)
    both.parts, both.rows = 2, 2 * first.rows
    for p in range(first.planes):
        both.plane_part[p] = (second.plane[p] or 0) - (first.plane[p] or 0)  # None: the address of nothing
    both.scale_part = (second.scale or 0) - (first.scale or 0)
    return both


def _input(x: Tensor) -> tuple[_Input, Tensor]:
    if x.numel() and x.stride(1) != 1:
        x = x.contiguous()
    return _Input(x.data_ptr(), x.stride(0), _KINDS[x.dtype], x.shape[0]), x


def _stride(out: Tensor) -> int:
    return out.stride(0) if out.shape[0] > 1 else out.shape[1]


def _check_host(what: str, tensor: Tensor) -> None:
    if not on_host(tensor.device):
        raise UsageError(f"{what} is on {tensor.device}; these kernels are the CPU's")
