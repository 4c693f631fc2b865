"""What a pass costs beside its bytes: launches, host synchronisations and Python, with every weight in HBM.

Takes the folder of a store. Prints a table for each token count, and one line of JSON last.
"""

import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

import tiercache
from tiercache.tiers.device import Device, device_of

HBM = "4GiB"
TOKEN_COUNTS = (1, 8, 64)
PASSES = 3
WARMING = 3  # a graph is made of what has been launched twice
TIMED = 5
TOP = 8
# CUDA runtime and driver calls by what they are; names of torch.profiler's events.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cuGraphLaunch")
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")


def main() -> None:
    """Measure a store on the card, without CUDA graphs if the second argument says "launches"."""
    if sys.argv[2:] == ["launches"]:
        os.environ["TIERCACHE_CUDA_GRAPHS"] = "0"
    measure(Path(sys.argv[1]), torch.device("cuda", 0))


def measure(place: Path, at: torch.device) -> None:
    """Open the store, run passes of each token count."""
    found, device = [], device_of(at)
    torch.zeros(1, device=at)
    before = _beside_torch(device)
    with tiercache.offload(place, precision="int4", hbm=HBM, device=str(at), context=128, logits=64) as model:
        layers = model.config.num_hidden_layers
        inputs = {tokens: (torch.arange(tokens, device=at) * 7 % 1000)[None] for tokens in TOKEN_COUNTS}
        passes = {tokens: partial(model, input_ids=ids, use_cache=False) for tokens, ids in inputs.items()}
        timed = {tokens: _milliseconds(once, device) for tokens, once in passes.items()}
        beside = _beside_torch(device) - before  # the profiler takes some of the card, too
        for tokens, once in passes.items():
            row = {"tokens": tokens, "layers": layers, "pass_ms": timed[tokens], **_profiled(once, device)}
            found.append(row)
            print(json.dumps(row, indent=1), file=sys.stderr, flush=True)
    print(json.dumps({"schema": "tiercache.gpu-launches/2", "passes": found, "beside_torch_bytes": beside}))


def _beside_torch(device: Device) -> int:
    """Bytes of the card that torch's allocator does not hold: the context, modules of kernels, graphs, others'."""
    free = device.free_bytes()
    return 0 if free is None else free[1] - free[0] - torch.cuda.memory_reserved(device.at)


def _milliseconds(once: Callable[[], object], device: Device) -> float:
    """Of a pass, without the profiler: the median, behind the first ones."""
    with torch.inference_mode():
        for _ in range(WARMING):
            once()
        return 1e3 * statistics.median(_seconds(once, device) for _ in range(TIMED))


def _profiled(once: Callable[[], object], device: Device) -> dict[str, Any]:
    """Calls of a pass and milliseconds on the card, by the profiler."""
    activities = [ProfilerActivity.CPU, *([] if device.on_host else [ProfilerActivity.CUDA])]
    with torch.inference_mode(), profile(activities=activities) as profiler:
        for _ in range(PASSES):
            once()
        device.synchronize()
    calls: Counter[str] = Counter()
    on_card: Counter[str] = Counter()
    for event in profiler.events():
        calls[event.name] += 1
        if event.device_type == torch.autograd.DeviceType.CUDA:
            on_card[event.name] += event.time_range.elapsed_us()
    return {
        "card_ms": sum(on_card.values()) / PASSES / 1e3,
        "launches": sum(calls[name] for name in LAUNCHES) / PASSES,
        "synchronisations": sum(calls[name] for name in SYNCHRONISATIONS) / PASSES,
        "copies": sum(count for name, count in calls.items() if name.startswith("Memcpy")) / PASSES,
        "host_calls": {name: count / PASSES for name, count in calls.most_common(30) if name.startswith("cu")},
        "card_ms_by_kernel": {name[:80]: us / PASSES / 1e3 for name, us in on_card.most_common(TOP)},
    }


def _seconds(once: Callable[[], object], device: Device) -> float:
    device.synchronize()
    begin = time.perf_counter()
    once()
    device.synchronize()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
