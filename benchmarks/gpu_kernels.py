"""The plane kernels on a CUDA card: weights in its own memory, then weights that it reads from pinned main memory.

Prints a table of each, and one line of JSON last.
"""

import json
import sys
import time

import torch
from torch import Tensor

from benchmarks import kernels as with_peers
from tiercache.bench import kernels, kernels_report
from tiercache.bench.timing_device import Effort, TimingCuda, TimingDevice
from tiercache.tiers.slab import Slab

BRIEF = Effort(least_s=0.02)  # a call takes microseconds: 20 ms are hundreds of them
NEAR = kernels.Options(token_counts=(1, 8, 32, 64, 512), effort=BRIEF, show_progress=False)
FAR = kernels.Options(token_counts=(1,), precisions=("int4",), effort=BRIEF, show_progress=False)


class PinnedDevice(TimingCuda):
    """A GPU whose kernels read weights from pinned main memory themselves, over the link."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.label = f"{device}, weights in pinned memory"
        self._slab: Slab | None = None

    def memory(self, nbytes: int) -> Tensor:
        """Pinned; what was handed out before is not pinned any more."""
        self.close()
        self._slab = Slab(nbytes, torch.device("cpu"), pinned_for=self.torch_device)
        return self._slab.bytes

    def roof_gbps(self, effort: Effort, memory: Tensor) -> float:
        """One large copy of `memory`, which is pinned, to the device."""
        source = memory[: effort.roof_bytes]
        target = torch.empty_like(source, device=self.torch_device)
        return self.best_gbps(lambda: target.copy_(source, non_blocking=True), source.nbytes)

    def close(self) -> None:
        """Unlock the memory handed out; harmless when done twice."""
        if self._slab is not None:
            self.wait()
            self._slab.close()
            self._slab = None


def main() -> None:
    """Time the matrices of a 7B on the card."""
    card = torch.device("cuda", torch.cuda.current_device())
    pinned = PinnedDevice(card)
    try:
        measure(TimingCuda(card), pinned, NEAR, FAR)
    finally:
        pinned.close()


def measure(card: TimingDevice, pinned: TimingDevice, near: kernels.Options, far: kernels.Options) -> None:
    """Time a card's kernels on its own memory, and on pinned main memory."""
    found = []
    for options, device, bench in ((near, card, with_peers.bench), (far, pinned, kernels.bench)):
        begin = time.perf_counter()
        found.append(bench(options, [device]))
        print(kernels_report.report(found[-1]), file=sys.stderr, flush=True)
        print(f"{device.label}: {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)
    both = {name: found[0][name] + found[1][name] for name in ("stands", "results")}
    print(json.dumps(found[0] | both))


if __name__ == "__main__":
    main()
