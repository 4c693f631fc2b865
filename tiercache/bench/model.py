"""Times an offloaded model of a given shape, and holds it against the roofs measured in the same run.

Knows `offload` and its statistics from outside, as a user would.
"""

import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from profiler import probe
from tiercache import stats as stats_module
from tiercache.bench import shapes
from tiercache.bench.random_calibration import untaught
from tiercache.compat import cache_kwargs, cache_out
from tiercache.config import Budget, OffloadConfig, Precision, human
from tiercache.engine.offload import open_offloaded
from tiercache.store.planestore import PlaneStore

SCHEMA = "tiercache.bench/1"
_PROMPT_TOKENS = 16
_BATCH_TOKENS = 32
_DISK_BYTES = 2 << 30
_READ_SETTINGS = ((4, 2 << 20), (8, 1 << 20), (2, 4 << 20))
_ROOF_BYTES = 128 << 20  # the memory roof is measured within a tight RAM cap too


def bench(
    shape: str,
    *,
    precision: Precision = "source",
    hbm: str | None = None,
    dram: str = "auto",
    tokens: int = 8,
    folder: Path,
    context: int = 128,
    seed: int = 0,
    keep: bool = True,
    bytes_per_token: float | None = None,
    link_gbps: float | None = None,
    show_progress: bool | None = None,
) -> dict[str, Any]:
    """Make the model, run it, measure the roofs.

    Args:
        shape: a name from `shapes.SHAPES`.
        precision, hbm, dram, context: as `offload` takes them.
        tokens: single-token passes to time.
        folder: where models are made, and found again by the next run.
        seed: of the weights.
        keep: leave the model in `folder`.
        bytes_per_token: run in mixed mode, reading this share of int8's bytes of the neurons, by a recipe that nobody
            measured: random weights have nothing to lose.
        link_gbps: throttle copies to the HBM tier.
        show_progress: draw bars.
    """
    dimensions = shapes.find(shape)
    place = folder / f"{shape}-{'bf16' if precision == 'source' else 'planes'}-{seed}"
    make = shapes.make_checkpoint if precision == "source" else shapes.make_store
    path = make(dimensions, place, seed, show_progress=show_progress)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, dimensions.vocabulary, (1, _PROMPT_TOKENS), generator=generator)
    options: dict[str, Any] = {"precision": precision, "context": context, "logits": 1, "link_gbps": link_gbps}
    calibration = None
    if bytes_per_token is not None:
        options |= {"mode": "mixed", "bytes_per_token": Budget(fraction=1.0)}
        calibration = untaught(PlaneStore.open(path), bytes_per_token)
    config = OffloadConfig(hbm=None if hbm is None else Budget.parse(hbm), dram=Budget.parse(dram), **options)
    with open_offloaded(path, config, show_progress=show_progress, calibration=calibration) as model:
        prefill_s, decode_s, batch_s = _time(model, ids.to(model.device), tokens)
        attached: Any = model.tiercache
        stats, sizes = attached.stats().to_dict(), attached.pass_bytes()
    disk = _disk_roof(path)
    dram_gbps = probe.dram_read(size_bytes=_ROOF_BYTES)
    peak_rss_bytes = stats_module.peak_rss_bytes()  # the roofs' buffers included
    if not keep:
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    return _result(locals())


def _result(run: dict[str, Any]) -> dict[str, Any]:
    """What is reported, from what was measured."""
    sizes, decode_s = run["sizes"], run["decode_s"]
    pass_s = statistics.median(decode_s)
    disk_s = sizes["ssd"] / run["disk"].gbps / 1e9
    dram_s = sizes["needed"] / run["dram_gbps"] / 1e9
    roof_s = max(disk_s, dram_s)
    return {
        "schema": SCHEMA,
        "hardware": {"processor": platform.processor() or platform.machine(), "cores": torch.get_num_threads()},
        "shape": run["shape"],
        "precision": run["precision"],
        "bytes_per_token": run["bytes_per_token"],
        "link": run["stats"]["link"],
        "hbm": run["hbm"],
        "dram": run["dram"],
        "seed": run["seed"],
        "prefill_tokens": _PROMPT_TOKENS,
        "prefill_s": run["prefill_s"],
        "batch_tokens": _BATCH_TOKENS,
        "batch_s": run["batch_s"],
        "kernels": run["stats"]["kernels"],
        "pass_s": pass_s,
        "pass_s_all": decode_s,
        "tokens_per_s": 1 / pass_s,
        "pass_bytes": sizes,
        "roofs": {"disk_gbps": run["disk"].gbps, "disk_direct": run["disk"].direct, "dram_gbps": run["dram_gbps"]},
        "roof_s": roof_s,
        "bound": "ssd" if disk_s > dram_s else "dram",
        "over_roof": pass_s / roof_s,
        "peak_rss_bytes": run["peak_rss_bytes"],
        "stats": run["stats"],
    }


def report(result: dict[str, Any]) -> str:
    """A few lines for a person."""
    sizes, roofs, stats = result["pass_bytes"], result["roofs"], result["stats"]
    budgets = f"hbm={result['hbm']} dram={result['dram']}"
    mode = (
        ""
        if result["bytes_per_token"] is None
        else f"mixed, lossy, {result['bytes_per_token']:g} of the neurons' bytes, "
    )
    mode += "" if result["link"] == "measured" else f"link {result['link']}, "
    lines = [
        f"{result['shape']} {mode}{result['precision']} {budgets}, {result['hardware']['cores']} cores, seed "
        f"{result['seed']}",
        f"  a pass      {result['pass_s']:.3f} s ({result['tokens_per_s']:.2f} tokens/s); "
        f"prefill of {result['prefill_tokens']} tokens {result['prefill_s']:.3f} s, "
        f"{result['batch_tokens']} more {result['batch_s']:.3f} s; {result['kernels']}",
        f"  needs       {human(sizes['needed'])}, of which {human(sizes['ssd'])} from the SSD",
        f"  roofs       SSD {roofs['disk_gbps']:.2f} GB/s{'' if roofs['disk_direct'] else ' (not direct)'}, "
        f"DRAM {roofs['dram_gbps']:.1f} GB/s",
        f"  the roof    {result['roof_s']:.3f} s, bound by {result['bound']}; the pass takes "
        f"{result['over_roof']:.2f} x that",
    ]
    for name, tier in stats["tiers"].items():
        stalls = ", ".join(f"{cause} {seconds:.2f} s" for cause, seconds in tier["stall_s"].items()) or "none"
        lines.append(
            f"  {name:<11} peak {human(tier['peak_bytes'])} of {human(tier['capacity_bytes'])}, hits {tier['hits']}, "
            f"misses {tier['misses']}, stalls {stalls}"
        )
    return "\n".join([*lines, f"  peak RSS    {human(result['peak_rss_bytes'])}"])


def _time(model: Any, ids: torch.Tensor, tokens: int) -> tuple[float, list[float], float]:
    """Seconds of the prefill, of each single-token pass after it, and of a batch the second time."""
    seconds = []
    with torch.inference_mode():
        begin = time.perf_counter()
        output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
        seconds.append(time.perf_counter() - begin)
        for _ in range(tokens):
            begin = time.perf_counter()
            token = output.logits[:, -1:].argmax(-1)  # waits for the device
            output = model(input_ids=token, **cache_kwargs(model, cache_out(output)), use_cache=True)
            output.logits.sum().item()
            seconds.append(time.perf_counter() - begin)
        for _ in range(2):
            begin = time.perf_counter()
            batch = ids.repeat(1, _BATCH_TOKENS // _PROMPT_TOKENS)
            output = model(batch, **cache_kwargs(model, cache_out(output)), use_cache=True, logits_to_keep=1)
            output.logits.sum().item()
            batch_s = time.perf_counter() - begin
    return seconds[0], seconds[1:], batch_s


def _disk_roof(folder: Path) -> probe.ReadRoof:
    """Direct reads of the model's own files, up to 2 GiB: one small file alone may sit in a cache of the disk."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    best: probe.ReadRoof | None = None
    for setting in _READ_SETTINGS:
        left, read, seconds = _DISK_BYTES, 0, 0.0
        for file in files:
            size = min(file.stat().st_size, left)
            if size >= _ROOF_BYTES // 2:
                roof = probe.disk_read(file, settings=(setting,), limit_bytes=size)
                left, read, seconds = left - size, read + size, seconds + size / roof.gbps / 1e9
        if not read:  # a toy: whatever its largest file gives
            return probe.disk_read(max(files, key=lambda path: path.stat().st_size))
        if best is None or read / seconds / 1e9 > best.gbps:
            best = probe.ReadRoof(read / seconds / 1e9, *setting, roof.direct)
    assert best is not None
    return best
