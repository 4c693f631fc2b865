"""What `tiercache-profile probe` measures of a card and its link, and what a launch takes; one line of JSON."""

import json
import statistics
from dataclasses import asdict

import torch

from tiercache.bench.card_probe import CardProbe
from tiercache.bench.undisturbed import Watch, seconds_of
from tiercache.tiers.device import device_of

_LAUNCHES, _REPEATS = 1000, 7


def main() -> None:
    """Measure and print."""
    found = CardProbe(device_of(torch.device("cuda", 0)), Watch()).measure()
    small = torch.zeros(1, device="cuda")

    def launches() -> None:
        for _ in range(_LAUNCHES):
            small.add_(1)
        torch.cuda.synchronize()

    launches()
    taken = [seconds_of(launches) / _LAUNCHES for _ in range(_REPEATS)]
    line = {"schema": "tiercache.gpu-roofs/2", **asdict(found), "launch_us": 1e6 * statistics.median(taken)}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
