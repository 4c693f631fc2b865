"""The CUDA kernels on the CPU: the same source, built with g++ over a shim, and a launcher for the same calls."""

import concurrent.futures
import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tiercache.errors import UsageError
from tiercache.kernels.cuda.launches import Call
from tiercache.kernels.cuda.runs import Run

HERE = Path(__file__).parent
UNITS = ("rows", "mma", "dots", "down", "downs", "downmma", "decode", "attention")
SOURCE = HERE.parents[1] / "tiercache" / "kernels" / "cuda" / "source"
# No fused multiply-add but fmaf: on the GPU the compiler may contract, and results may not depend on it.
FLAGS = (
    "-O1",
    "-fPIC",
    "-std=c++17",
    "-Wall",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-ffp-contract=off",
    "-U_FORTIFY_SOURCE",
    "-fsanitize=alignment",  # its handler is the shim's own
)
FAULTS = ("", "a barrier not all reach", "a write past shared memory", "an access that its width does not allow there")


def build(folder: Path) -> Path:
    """The library of all kernels, compiled into `folder` if it is not there yet."""
    if (folder / "kernels.so").exists():
        return folder / "kernels.so"
    if shutil.which("g++") is None:
        pytest.skip("the emulation of the CUDA kernels is C++: it needs g++ beside gcc")
    folder.mkdir(exist_ok=True)
    jobs = [(f"{name}-{p}.o", SOURCE / f"{name}.cu", p) for name in UNITS for p in (1, 2, 3)]
    jobs += [
        ("layer.o", SOURCE / "layer.cu", 3),
        ("common.o", SOURCE / "common.cu", 3),
        ("shim.o", HERE / "shim.cpp", 3),
        ("driver.o", HERE / "driver.cpp", 3),
    ]

    def compiled(job: tuple[str, Path, int]) -> str:
        out, source, planes = job
        command = [
            "g++",
            *FLAGS,
            f"-I{HERE}",
            f"-DPLANES={planes}",
            "-x",
            "c++",
            "-c",
            str(source),
            "-o",
            str(folder / out),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return str(folder / out)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, jobs))
    subprocess.run(["g++", "-shared", *objects, "-ldl", "-o", str(folder / "kernels.so")], check=True)
    return folder / "kernels.so"


class Emulation:
    """A launcher for tensors of the CPU.

    Args:
        library: what `build` made.
        far: treat all tensors as though they lay across a link.
        multiprocessors: a small number, so that small shapes reach all grids.
        capability: of the card that is emulated: from 8.0 on products are the matrix units'.
    """

    def __init__(
        self, library: Path, far: bool = False, multiprocessors: int = 1, capability: tuple[int, int] = (9, 0)
    ) -> None:
        self.library = ctypes.CDLL(str(library))
        self.capability = capability
        self.far, self.multiprocessors = far, multiprocessors
        self.launched: list[Call] = []
        self.refused: torch.Tensor | None = None

    def address(self, tensor: torch.Tensor) -> int:
        if tensor is self.refused:
            raise UsageError("pageable memory")
        return tensor.data_ptr()

    def is_near(self, tensor: torch.Tensor) -> bool:
        return not self.far

    def launch(self, call: Call) -> None:
        self.launched.append(call)
        self.library.shim_launch.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_uint] * 2, ctypes.c_void_p]
        kernel = ctypes.cast(getattr(self.library, call.kernel), ctypes.c_void_p)
        grid = (ctypes.c_uint * 3)(*call.grid)
        arguments = ctypes.addressof(call.arguments)
        code = self.library.shim_launch(kernel, grid, call.threads, call.shared_bytes, arguments)
        assert code == 0, f"{call.kernel}: {FAULTS[code]}"

    def stream(self) -> int:
        return 0

    def run(self, run: Run) -> None:
        for each in run.calls:
            self.launch(each.call)

    def argument_bytes(self, kernel: str) -> int:
        """Size of the kernel's argument as the C++ compiler lays it out."""
        return int(getattr(self.library, f"{kernel}_bytes")())


def stub_driver(library: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """torch sees one card, of capability 8.6 and two multiprocessors; its driver is `driver.cpp`."""
    stub, loaded = ctypes.CDLL(str(library)), ctypes.CDLL
    for name, value in {
        "is_available": True,
        "current_device": 0,
        "device_count": 1,
        "get_device_capability": (8, 6),
        "get_device_properties": SimpleNamespace(multi_processor_count=2),
        "current_stream": SimpleNamespace(cuda_stream=0x123456789A),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.delattr(torch._C, "_cuda_getCurrentRawStream", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: stub if name == "libcuda.so.1" else loaded(name))
    return stub
