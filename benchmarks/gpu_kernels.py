"""The plane kernels on a CUDA card: weights in its own memory, then weights that it reads from pinned main memory.

Prints a table of each, and one line of JSON last.
"""

import json
import sys

from tiercache.bench import kernels, kernels_cuda, kernels_report
from tiercache.bench.timing_device import Effort

BRIEF = Effort(least_s=0.02)  # a call takes microseconds: 20 ms are hundreds of them
NEAR = kernels.Options(token_counts=(1, 8, 16, 32, 64), effort=BRIEF, show_progress=False)
FAR = kernels.Options(token_counts=(1,), precisions=("int4",), effort=BRIEF, show_progress=False)


def main() -> None:
    """Time the matrices of a 7B."""
    results = []
    for device, options in zip(kernels_cuda.devices(), (NEAR, FAR), strict=True):
        results.append(kernels.bench(options, [device]))
        print(kernels_report.report(results[-1]), file=sys.stderr, flush=True)
    near, far = results
    print(json.dumps({**near, "stands": near["stands"] + far["stands"], "results": near["results"] + far["results"]}))


if __name__ == "__main__":
    main()
