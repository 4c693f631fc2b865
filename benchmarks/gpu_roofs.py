"""The roofs of a card and its link: its memory, copies from pinned and pageable memory, both ways at once, launches.

Medians of seven; one line of JSON.
"""

import json
import statistics
from collections.abc import Callable

import torch

_BYTES = 1 << 30


def main() -> None:
    """Measure and print."""
    device = torch.ones(_BYTES // 4, device="cuda")
    target = torch.empty_like(device)
    pinned = torch.empty(_BYTES, dtype=torch.uint8).pin_memory()
    pageable = torch.ones(_BYTES, dtype=torch.uint8)
    there = target.view(torch.uint8)
    other = torch.empty(_BYTES, dtype=torch.uint8).pin_memory()
    side = torch.cuda.Stream()

    def both() -> None:
        there.copy_(pinned, non_blocking=True)
        with torch.cuda.stream(side):
            other.copy_(device.view(torch.uint8), non_blocking=True)

    small = torch.zeros(1, device="cuda")

    def launches() -> None:
        for _ in range(1000):
            small.add_(1)

    found = {
        "schema": "tiercache.gpu-roofs/1",
        "copy_gbps": 2 * _gbps(lambda: target.copy_(device)),
        "sum_gbps": _gbps(device.sum),
        "pinned_up_gbps": _gbps(lambda: there.copy_(pinned, non_blocking=True)),
        "pinned_down_gbps": _gbps(lambda: other.copy_(device.view(torch.uint8), non_blocking=True)),
        "both_at_once_gbps_each_way": _gbps(both),
        "pageable_up_gbps": _gbps(lambda: there.copy_(pageable)),
        "launch_us": 1e3 * _seconds(launches),
    }
    print(json.dumps(found))


def _gbps(work: Callable[[], object]) -> float:
    return _BYTES / _seconds(work) / 1e9


def _seconds(work: Callable[[], object]) -> float:
    import time

    seconds = []
    for _ in range(8):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
