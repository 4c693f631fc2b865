"""Which backend serves a device, and what to do where it cannot.

Knows the backends by name; nothing of models.
"""

import hashlib
from functools import cache
from pathlib import Path

import torch

from tiercache.errors import EnvironmentUnsupportedError
from tiercache.kernels.contract import Kernels
from tiercache.kernels.cpu import build
from tiercache.tiers.device import on_gpu, on_host


@cache
def select(device: torch.device) -> Kernels:
    """The fast backend of `device`, made once in a process.

    Raises:
        EnvironmentUnsupportedError: it cannot be had here (no compiler, an unknown processor); says what would help.
    """
    if on_gpu(device):
        from tiercache.kernels.cuda.backend import CudaKernels  # looks for the driver

        return CudaKernels(device)
    if not on_host(device):
        raise EnvironmentUnsupportedError(f"there are no plane kernels for {device.type}; use a CPU or an NVIDIA GPU")
    from tiercache.kernels.cpu.backend import CpuKernels

    return CpuKernels()


@cache
def source_digest(device: torch.device) -> str:
    """Of the source of the kernels that run where `device` computes, the CPU's among them: others' figures are void."""
    found = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*/source/*" if on_gpu(device) else "cpu/source/*")):
        found.update(file.name.encode() + b"\0" + file.read_bytes())
    return found.hexdigest()[:16]


def will_compile() -> bool:
    """Whether `select` has the CPU's kernels to compile first, and can."""
    return not build.is_built(build.instruction_sets()[0]) and build.compiler() is not None


def describe(device: torch.device) -> tuple[bool, str]:
    """Whether the fast backend serves `device`, and a line about it for a person; compiles nothing."""
    if on_gpu(device):
        try:
            return True, select(device).name
        except EnvironmentUnsupportedError as error:
            return False, f"matrices are decoded before each product, which is slow: {error}"
    best = build.instruction_sets()[0]
    if build.is_built(best) or build.compiler() is not None:
        state = "compiled" if build.is_built(best) else "compiled at first use"
        note = "" if best == "avx512vnni" else f"; this processor has no AVX-512 with VNNI, so {best} is the best here"
        return best != "portable", f"cpu ({best}), {state}{note}"
    return False, ("no C compiler, so matrices are decoded before each product, which is slow; install gcc (or set CC)")
