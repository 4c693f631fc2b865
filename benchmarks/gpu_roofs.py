"""What `tiercache-profile probe` measures of a card and its link, and what a launch takes; one line of JSON."""

import json
import statistics
from dataclasses import asdict

import torch

from tiercache.bench.card_probe import CardProbe
from tiercache.bench.undisturbed import Watch, seconds_of
from tiercache.tiers.device import Device, device_of

_LAUNCHES, _REPEATS = 1000, 7


def main() -> None:
    """Measure and print."""
    measure(device_of(torch.device("cuda", 0)))


def measure(device: Device) -> None:
    """Measure a device, with little patience: a shared host is never quiet."""
    found = CardProbe(device, Watch(0.2, in_all_s=3.0, look_on_s=3.0)).measure()
    small = torch.zeros(1, device=device.at)

    def launches() -> None:
        for _ in range(_LAUNCHES):
            small.add_(1)
        device.synchronize()

    launches()
    taken = [seconds_of(launches) / _LAUNCHES for _ in range(_REPEATS)]
    line = {"schema": "tiercache.gpu-roofs/3", **asdict(found), "launch_us": 1e6 * statistics.median(taken)}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
