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
TIMED = 5
TOP = 8
# CUDA runtime and driver calls by what they are; names of torch.profiler's events.
LAUNCHES = ("cudaLaunchKernel", "cuLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernelEx", "cuGraphLaunch")
SYNCHRONISATIONS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")


def main() -> None:
    """Measure a store on the card, with CUDA graphs if that is the second argument."""
    if sys.argv[2:] == ["graphs"]:
        os.environ["TIERCACHE_CUDA_GRAPHS"] = "1"
    measure(Path(sys.argv[1]), torch.device("cuda", 0))


def measure(place: Path, at: torch.device) -> None:
    """Open the store, run passes of each token count."""
    found = []
    with tiercache.offload(place, precision="int4", hbm=HBM, device=str(at), context=128, logits=64) as model:
        layers = model.config.num_hidden_layers
        for tokens in TOKEN_COUNTS:
            ids = (torch.arange(tokens, device=at) * 7 % 1000)[None]
            once = partial(model, input_ids=ids, use_cache=False)
            row = {"tokens": tokens, "layers": layers, **_profiled(once, device_of(at))}
            found.append(row)
            print(json.dumps(row, indent=1), file=sys.stderr, flush=True)
    print(json.dumps({"schema": "tiercache.gpu-launches/1", "passes": found}))


def _profiled(once: Callable[[], object], device: Device) -> dict[str, Any]:
    """Milliseconds of a pass without the profiler; calls and milliseconds on the card, by the profiler."""
    with torch.inference_mode():
        once()
        seconds = [_seconds(once, device) for _ in range(TIMED)]
        activities = [ProfilerActivity.CPU, *([] if device.on_host else [ProfilerActivity.CUDA])]
        with profile(activities=activities) as profiler:
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
        "pass_ms": 1e3 * statistics.median(seconds),
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
