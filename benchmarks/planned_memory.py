"""Planned bytes against allocated bytes and the measured peak, each model in a process of its own.

`python -m benchmarks.planned_memory STORE CHECKPOINT FOLDER`; random models of 1.1B are made in FOLDER. The model
runs once before, so that what Python and PyTorch take once for all is not counted.
"""

import ctypes
import gc
import json
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

CASES = (  # model, precision, tokens of context, share of the weights in memory
    *(("store", precision, 1024, share) for precision in ("int8", "int4") for share in (1.0, 0.6)),
    *(("checkpoint", "source", 1024, share) for share in (1.0, 0.6)),
    *(("tinyllama-1.1b", precision, 512, share) for precision in ("int8", "int4") for share in (1.0, 0.6)),
)
_LOGITS = 64


def main() -> None:
    """Print a row a case, and JSON at the end."""
    places = {"store": sys.argv[1], "checkpoint": sys.argv[2]}
    rows = []
    for model, precision, context, share in CASES:
        place = places.get(model) or _random(model, Path(sys.argv[3]))
        with get_context("spawn").Pool(1) as pool:
            row = pool.apply(_measured, (place, precision, context, share))
        rows.append({"model": model, "precision": precision, "share": share, **row})
        print(
            f"{model} {precision}, {share:.0%} in memory: planned {row['planned_bytes'] / 1e6:.1f} MB, of it units "
            f"{row['slab_bytes'] / 1e6:.1f}; peak {row['peak_bytes'] / 1e6:.1f} MB ({row['peak_of_planned']:+.1%})",
            file=sys.stderr,
            flush=True,
        )
    print(json.dumps({"schema": "tiercache.planned-memory/1", "cases": rows}))


def _measured(place: str, precision: str, context: int, share: float) -> dict[str, Any]:
    """In a fresh process: bytes of the plan, of the slabs, and by how much the process grows."""
    import torch

    import tiercache
    from tiercache.stats.run import peak_rss_bytes

    torch.set_grad_enabled(False)
    options: Any = {"precision": precision, "context": context, "logits": _LOGITS, "show_progress": False}
    with tiercache.offload(place, dram="auto", **options) as model:
        opened: Any = model
        tier = opened.tiercache.plan.dram
        dram = sum(tier.reserved_bytes.values()) + int(share * tier.placement.pinned_bytes)
        _passes(opened, context)
    del model, opened
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the kernel's peak begins anew
    before = peak_rss_bytes()
    with tiercache.offload(place, dram=dram if share < 1 else "auto", **options) as model:
        opened = model
        _passes(opened, context)
        tier = opened.tiercache.plan.dram
        peak = peak_rss_bytes() - before
        planned, slab = tier.allocated_bytes, tier.slab_bytes
    return {"planned_bytes": planned, "slab_bytes": slab, "peak_bytes": peak, "peak_of_planned": peak / planned - 1}


def _passes(model: Any, context: int) -> None:
    """The longest pass that the plan allows, and a few short ones."""
    import torch

    from tiercache.compat import cache_kwargs, cache_out

    ids = (torch.arange(context - 4) * 7 % 1000)[None]
    kept = cache_out(model(input_ids=ids, use_cache=True, logits_to_keep=_LOGITS))
    for _ in range(3):
        model(input_ids=ids[:, :1], use_cache=True, **cache_kwargs(model, kept))


def _random(shape: str, folder: Path) -> str:
    from tiercache.bench import shapes

    return str(shapes.make_store(shapes.find(shape), folder / f"{shape}-planes-0", 0))


if __name__ == "__main__":
    main()
