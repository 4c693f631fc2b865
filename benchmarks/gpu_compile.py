"""Compiles every CUDA kernel for the card at once, so that no part waits for a compiler; one line of JSON last."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch

from tiercache.kernels.cuda.mma_launches import LEAST_CAPABILITY
from tiercache.kernels.cuda.nvrtc import SourceUnit, cache_folder, compiler_for, compilers, every_unit, image

CPU_KERNELS = "import torch; from tiercache.kernels.select import select; select(torch.device('cpu'))"


def main() -> None:
    """Compile for the current card, a process a core; the CPU's kernels are compiled meanwhile and behind this part."""
    silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    subprocess.Popen([sys.executable, "-c", CPU_KERNELS], start_new_session=True, **silent)  # half a minute
    capability = torch.cuda.get_device_capability()
    measure(capability, every_unit(capability >= LEAST_CAPABILITY), len(os.sched_getaffinity(0)))


def measure(capability: tuple[int, int], units: Sequence[SourceUnit], workers: int) -> None:
    """Compile units for cards of a capability; what is in the cache folder is only read."""
    begin = time.perf_counter()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:  # they come to no card
        taken = dict(zip(units, pool.map(partial(compiled, capability), units), strict=True))
    for unit, seconds in sorted(taken.items(), key=lambda each: -each[1])[:8]:
        print(f"{seconds:5.1f} s  {unit}", file=sys.stderr)
    found = {"units": len(units), "seconds": time.perf_counter() - begin, "one_by_one_s": sum(taken.values())}
    print(json.dumps({"schema": "tiercache.gpu-compile/1", **found}))


def compiled(capability: tuple[int, int], unit: SourceUnit) -> float:
    """Compile a unit into the cache folder; the seconds that it took."""
    begin = time.perf_counter()
    compiler, target = compiler_for(capability, compilers())
    image(unit, compiler, target, cache_folder())
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
