"""The compiled library of the CPU's kernels: its structures, its signatures, and the threads that it runs on."""

import ctypes
from ctypes import POINTER, Structure, c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from tiercache.errors import EnvironmentUnsupportedError


class CMatrix(Structure):
    """`Matrix` of source/planes.h: addresses and strides of planes and scales; `index` takes some of the rows."""

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


class CInput(Structure):
    """`Input` of source/planes.h: activations."""

    _fields_ = (("data", c_void_p), ("stride", c_int64), ("kind", c_int32), ("tokens", c_int32))


class CTeam(Structure):
    """`Team` of source/planes.h: how work is shared among threads."""

    _fields_ = (("parallel", c_void_p), ("threads", c_int32), ("reserved", c_int32))


def load(path: Path) -> ctypes.CDLL:
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
    matrix, source, team = POINTER(CMatrix), POINTER(CInput), POINTER(CTeam)
    library.tc_few.restype = library.tc_read.restype = c_int32
    library.tc_read.argtypes = [c_void_p, c_int64]
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


def openmp() -> int | None:
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
