"""`tiercache-profile probe --quick` beside a card: what each step took on standard error, one line of JSON last.

Takes the folder whose disk is measured.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from tiercache.bench.machine_probe import probe_machine


def main() -> None:
    """Measure and print."""
    measure(Path(sys.argv[1]), torch.device("cuda", 0))


def measure(folder: Path, at: torch.device) -> None:
    """Probe a device; the figures are kept nowhere."""
    found = probe_machine(folder, at, noisy=True, quick=True, show_progress=True)
    figures = {name: asdict(figure) for name, figure in found.figures.items()}
    print(json.dumps({"schema": "tiercache.gpu-probe/1", "figures": figures}))


if __name__ == "__main__":
    main()
