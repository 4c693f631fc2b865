"""`tiercache bench kernels` with torch's own products of 4, 8 and 16 bits a weight timed beside each case.

python -m benchmarks.kernels [options of that command]
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import command_line, torch_peers
from benchmarks.torch_peers import CPU_PEERS, CUDA_PEERS, Peer
from tiercache.bench import kernels, kernels_report, workset
from tiercache.bench.kernel_cases import Case
from tiercache.bench.timing_device import Effort, TimingDevice, median_s, working_set_bytes
from tiercache.commands.base import tell
from tiercache.commands.bench import arguments


class TorchPeers:
    """Times torch's own products; see `kernels.Peers`.

    Args:
        options: of the benchmark.
        peers: what to time; by default what torch has for each device.

    Attributes:
        left_out: peers that fail on a device, by its label, and why.
    """

    def __init__(self, options: kernels.Options, peers: Sequence[Peer] | None = None) -> None:
        self._options, self._peers = options, peers
        self._codes = workset.random_codes(options.seed)
        self.left_out: dict[str, dict[str, str]] = defaultdict(dict)

    def __call__(self, device: TimingDevice, case: Case, x: Tensor) -> dict[int, dict[str, Any]]:
        """GB/s and seconds of each peer that works, for each number of tokens."""
        peers = self._peers
        if peers is None:
            peers = CPU_PEERS if device.torch_device.type == "cpu" else CUDA_PEERS
        left_out = self.left_out[device.label]
        found: dict[int, dict[str, Any]] = {
            tokens: {"peers": {}, "peer_seconds": {}} for tokens in self._options.token_counts
        }
        for peer in peers:
            if peer.name in left_out:
                continue
            try:
                rates = self._time(peer, device, case, x.to(device.torch_device))
            except (RuntimeError, AttributeError, NotImplementedError) as error:
                left_out[peer.name] = str(error).partition("\n")[0]
                continue
            for tokens, (seconds, gbps) in rates.items():
                found[tokens]["peers"][peer.name] = gbps
                found[tokens]["peer_seconds"][peer.name] = seconds
        return found

    def _time(self, peer: Peer, device: TimingDevice, case: Case, x: Tensor) -> dict[int, tuple[float, float]]:
        """Seconds and GB/s by number of tokens."""
        effort: Effort = self._options.effort
        pool = self._codes.to(device.torch_device)
        kernel = "product" if case.kernel == "products" else case.kernel  # one of as many rows: torch's best case
        packed = [peer.pack(*shape, pool) for shape in torch_peers.shapes(kernel, case.all_rows, case.columns)]
        read = torch_peers.nbytes(packed)
        ready = torch_peers.copies(packed, -(-working_set_bytes(device, effort) // read), device.memory)
        found = {}
        for tokens in self._options.token_counts:
            call = torch_peers.bound_call(peer, kernel, x[:tokens], ready)
            with torch.inference_mode():
                seconds = median_s(device, call, effort, len(ready))
            found[tokens] = (seconds, read / seconds / 1e9)
        return found


def bench(
    options: kernels.Options, devices: Sequence[TimingDevice] | None = None, peers: Sequence[Peer] | None = None
) -> dict[str, Any]:
    """As `tiercache.bench.kernels.bench`, with torch's products beside.

    Raises:
        TiercacheError: a kernel's results are wrong.
    """
    beside = TorchPeers(options, peers)
    result = kernels.bench(options, devices, beside)
    for stand in result["stands"]:
        stand["peers_left_out"] = beside.left_out[stand["device"]]
    return result


def run(args: list[str]) -> None:
    """Measure what the arguments say; a table for people, and a line of JSON."""
    given = command_line.parameters("kernels", args)
    result = bench(kernels.Options(**arguments(given)))
    tell(kernels_report.report(result), result, as_json=True, quiet=given["quiet"])


if __name__ == "__main__":
    command_line.main(run)
