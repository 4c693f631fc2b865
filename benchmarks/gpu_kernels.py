"""The plane kernels on a CUDA card: weights in its own memory, then weights that it reads from pinned main memory.

Prints a table, and one line of JSON last.
"""

import json
import sys

from tiercache.bench import kernels, kernels_cuda, kernels_report
from tiercache.bench.stand import Effort

BRIEF = Effort(least_s=0.02, roof_bytes=1 << 30)  # a call takes microseconds: 20 ms are hundreds of them


def main() -> None:
    """Time a 7B's matrices at every precision."""
    near, far = kernels_cuda.stands()
    options = kernels.Options(token_counts=(1, 8, 16, 32, 64), effort=BRIEF, show_progress=False)
    alone = kernels.Options(token_counts=(1,), precisions=("int4",), effort=BRIEF, show_progress=False)
    on_card, over_link = kernels.bench(options, [near]), kernels.bench(alone, [far])
    for result in (on_card, over_link):
        print(kernels_report.report(result), file=sys.stderr)
    found = {**on_card, "stands": on_card["stands"] + over_link["stands"]}
    print(json.dumps({**found, "results": on_card["results"] + over_link["results"]}))


if __name__ == "__main__":
    main()
