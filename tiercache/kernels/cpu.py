"""The dialect of this machine's processor: C with vector instructions, chosen when it is loaded.

Work is shared among the threads of the OpenMP runtime that torch has loaded, so that no second set of threads competes
with torch's. The arithmetic, which is the same to the bit for every instruction set, number of threads and number of
tokens, is told in `cpu_source/planes.h`.
"""

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from tiercache.errors import EnvironmentUnsupportedError, UsageError
from tiercache.kernels import build
from tiercache.kernels.contract import ACTIVATIONS, Prepared, check_activations, check_output, checked_rows
from tiercache.planes import Planes

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_ALIGN = 64

# Up to so many tokens a matrix is walked once per token (its bytes stay in the cache between them); more are multiplied
# with unpacked tiles. Measured on Zen 4 with `tiercache bench --kernels`, see README.
FEW_TOKENS = 4


class _Matrix(Structure):
    _fields_ = (
        ("plane", c_void_p * 3),
        ("scale", c_void_p),
        ("plane_stride", c_int64 * 3),
        ("scale_stride", c_int64),
        ("index", c_void_p),
        ("rows", c_int64),
        ("columns", c_int32),
        ("group", c_int32),
        ("planes", c_int32),
        ("reserved", c_int32),
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
        path = build.library(self.isa)
        if self.isa not in has:
            raise EnvironmentUnsupportedError(f"this processor lacks {self.isa}; it has {', '.join(has)}")
        self.name, self.device = f"cpu ({self.isa})", torch.device("cpu")
        self._library = _load(path)
        self._threads = threads
        self._parallel = _openmp()

    def prepare(self, x: Tensor, group: int) -> Prepared:
        """See `contract.Kernels`."""
        check_activations(x, x.shape[-1])
        tokens, columns = x.shape
        few = int(tokens <= FEW_TOKENS)
        nbytes = self._library.tc_prepared_bytes(tokens, columns, group)
        memory = torch.empty(nbytes + _ALIGN, dtype=torch.uint8)
        memory = memory[-memory.data_ptr() % _ALIGN :]
        source, keep = _input(x)
        self._library.tc_prepare(byref(source), columns, group, few, memory.data_ptr(), byref(self._team()))
        del keep
        return Prepared(tokens, columns, group, (memory,))

    def product(self, x: Prepared, weight: Planes, out: Tensor, rows: Tensor | None = None) -> None:
        """See `contract.Kernels`."""
        check_output(out, x.tokens, checked_rows(rows, weight), self.device)
        _check_match(x, weight)
        matrix, keep = _matrix(weight, rows)
        few, data = int(x.tokens <= FEW_TOKENS), x.data[0].data_ptr()
        team = self._team()
        self._library.tc_product(
            byref(matrix), x.tokens, few, data, out.data_ptr(), _stride(out), byref(team)
        )
        del keep

    def product_down(self, x: Tensor, weight: Planes, out: Tensor, rows: Tensor | None = None) -> None:
        """See `contract.Kernels`."""
        check_activations(x, checked_rows(rows, weight))
        check_output(out, x.shape[0], weight.columns, self.device)
        matrix, keep = _matrix(weight, rows)
        source, kept = _input(x)
        few = int(x.shape[0] <= FEW_TOKENS)
        team = self._team()
        self._library.tc_product_down(byref(matrix), byref(source), few, out.data_ptr(), _stride(out), byref(team))
        del keep, kept

    def ffn(
        self,
        x: Prepared,
        inward: Sequence[Planes],
        down: Planes,
        activation: str,
        out: Tensor,
        rows: Tensor | None = None,
    ) -> None:
        """See `contract.Kernels`."""
        if activation not in ACTIVATIONS:
            raise UsageError(f"unknown activation {activation!r}; there are {', '.join(ACTIVATIONS)}")
        if not 1 <= len(inward) <= 2:
            raise UsageError(f"{len(inward)} inward matrices; a feed-forward block has one or two")
        count = checked_rows(rows, down)
        check_output(out, x.tokens, down.columns, self.device)
        for weight in inward:
            _check_match(x, weight)
            if weight.rows != down.rows:
                raise UsageError(f"inward matrices of {weight.rows} neurons beside a down matrix of {down.rows}")
        (gate, keep_gate), *more = (_matrix(weight, rows) for weight in inward)
        last, keep_down = _matrix(down, rows)
        scratch = torch.empty(2 * x.tokens * count, dtype=torch.float32)
        up = byref(more[0][0]) if more else None
        kind, few, data = ACTIVATIONS.index(activation), int(x.tokens <= FEW_TOKENS), x.data[0].data_ptr()
        team = self._team()
        where = (data, scratch.data_ptr(), out.data_ptr(), _stride(out), byref(team))
        self._library.tc_ffn(byref(gate), up, byref(last), kind, x.tokens, few, *where)
        del keep_gate, keep_down, more

    def gather(self, pieces: Sequence[Tensor], rows: Tensor, out: Tensor) -> None:
        """See `contract.Kernels`."""
        index, team, at = rows.to(torch.int64).contiguous(), self._team(), out.data_ptr()
        needed = sum(piece.shape[1] for piece in pieces) * rows.numel()
        if out.dtype != torch.uint8 or not out.is_contiguous() or out.numel() < needed:
            raise UsageError(f"out is {out.dtype} of {out.numel()}, expected at least {needed} bytes in one piece")
        for piece in pieces:
            if piece.dtype != torch.uint8 or piece.ndim != 2 or piece.stride(1) != 1:
                raise UsageError(f"cannot gather rows of {piece.dtype} {list(piece.shape)}; give byte matrices")
            if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < piece.shape[0]:
                raise UsageError(f"rows {int(index.min())} to {int(index.max())} of a matrix of {piece.shape[0]}")
            source, stride, width = piece.data_ptr(), piece.stride(0), piece.shape[1]
            self._library.tc_gather(source, stride, width, index.data_ptr(), index.numel(), at, byref(team))
            at += width * index.numel()

    def _team(self) -> _Team:
        threads = self._threads or torch.get_num_threads()
        return _Team(self._parallel, threads if self._parallel else 1, 0)


def _load(path: Path) -> ctypes.CDLL:
    """The library with its signatures."""
    library = ctypes.CDLL(str(path))
    library.tc_prepared_bytes.argtypes = [c_int32, c_int32, c_int32]
    library.tc_prepared_bytes.restype = c_int64
    matrix, source, team = POINTER(_Matrix), POINTER(_Input), POINTER(_Team)
    signatures = {
        "tc_prepare": [source, c_int32, c_int32, c_int32, c_void_p, team],
        "tc_product": [matrix, c_int32, c_int32, c_void_p, c_void_p, c_int64, team],
        "tc_product_down": [matrix, source, c_int32, c_void_p, c_int64, team],
        "tc_ffn": [
            *(matrix, matrix, matrix, c_int32, c_int32, c_int32),
            *(c_void_p, c_void_p, c_void_p, c_int64, team),
        ],
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
    names = ("libgomp", "libomp", "libiomp")
    for path in [*sorted(p for p in loaded if Path(p).name.startswith(names)), "libgomp.so.1"]:
        try:
            function = ctypes.CDLL(path).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, c_void_p).value
    return None


def _matrix(weight: Planes, rows: Tensor | None) -> tuple[_Matrix, object]:
    """The C view of a matrix, and what must outlive it."""
    matrix = _Matrix(rows=weight.rows, columns=weight.columns, group=weight.group, planes=len(weight.planes))
    for p, plane in enumerate(weight.planes):
        if plane.stride(1) != 1:
            raise UsageError(f"plane {p} has its bytes {plane.stride(1)} apart; the bytes of a row must lie together")
        matrix.plane[p], matrix.plane_stride[p] = plane.data_ptr(), plane.stride(0)
    if weight.scales.stride()[1:] != (2, 1) and weight.scales.shape[1] > 1:
        raise UsageError(f"scales have strides {weight.scales.stride()}; those of a row must lie together")
    matrix.scale, matrix.scale_stride = weight.scales.data_ptr(), 2 * weight.scales.stride(0)
    if rows is None:
        return matrix, None
    index = rows.to(torch.int64).contiguous()
    matrix.index, matrix.rows = index.data_ptr(), index.numel()
    return matrix, index


def _input(x: Tensor) -> tuple[_Input, Tensor]:
    if x.numel() and x.stride(1) != 1:
        x = x.contiguous()
    return _Input(x.data_ptr(), x.stride(0), _KINDS[x.dtype], x.shape[0]), x


def _stride(out: Tensor) -> int:
    return out.stride(0) if out.shape[0] > 1 else out.shape[1]


def _check_match(x: Prepared, weight: Planes) -> None:
    if (x.columns, x.group) != (weight.columns, weight.group):
        raise UsageError(
            f"activations of {x.columns} in groups of {x.group} for a matrix of {weight.columns} in groups of "
            f"{weight.group}; prepare them for it"
        )
