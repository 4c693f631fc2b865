"""Times an offloaded model of a given shape, and holds it against the roofs measured in the same run.

Knows `offload` and its statistics from outside, as a user would.
"""

import platform
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from profiler import probe
from tiercache.bench import shapes
from tiercache.bench.memory_roof import dram_roof
from tiercache.bench.random_calibration import calibration_of_random_weights
from tiercache.compat import cache_kwargs, cache_out
from tiercache.config.options import OffloadConfig, Precision, of_planes
from tiercache.config.sizes import Budget, human
from tiercache.engine.offload import open_offloaded
from tiercache.errors import UsageError
from tiercache.stats import run as stats_module
from tiercache.store.planestore import PlaneStore

SCHEMA = "tiercache.bench/1"
_PROMPT_TOKENS = 16
_BATCH_TOKENS = 32
_DISK_BYTES = 2 << 30
_ROOF_BYTES = 128 << 20  # the memory roof is measured within a tight RAM cap too


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        shape: a name from `shapes.SHAPES`.
        precision, hbm, dram, context, link_gbps: as `offload` takes them.
        tokens: single-token passes to time.
        folder: where models are made, and found again by the next run.
        seed: of the weights and the prompt.
        keep: leave the model in `folder`.
        bytes_per_token: run in mixed mode, reading this share of int8's bytes of the neurons, by a recipe that nobody
            measured: random weights have nothing to lose.
        show_progress: draw bars; None means where standard error is a terminal.
    """

    shape: str = "tinyllama-1.1b"
    precision: Precision = "source"
    hbm: str | None = None
    dram: str = "auto"
    tokens: int = 8
    folder: Path
    context: int = 128
    seed: int = 0
    keep: bool = True
    bytes_per_token: float | None = None
    link_gbps: float | None = None
    show_progress: bool | None = None


def bench(options: Options) -> dict[str, Any]:
    """Make the model, run it, measure the roofs.

    Raises:
        UsageError: no such shape, a context too short for what is timed, or too few bytes a token for any recipe.
    """
    dimensions = shapes.find(options.shape)
    needed = _PROMPT_TOKENS + options.tokens + 2 * _BATCH_TOKENS
    if options.context < needed:
        raise UsageError(
            f"context={options.context}, but a prompt of {_PROMPT_TOKENS}, {options.tokens} tokens and twice "
            f"{_BATCH_TOKENS} at once are timed; give context={needed}, or time fewer tokens"
        )
    make, kind = (shapes.make_store, "planes") if of_planes(options.precision) else (shapes.make_checkpoint, "bf16")
    folder = options.folder.expanduser() / f"{options.shape}-{kind}-{options.seed}"
    path = make(dimensions, folder, options.seed, show_progress=options.show_progress)
    generator = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(0, dimensions.vocabulary, (1, _PROMPT_TOKENS), generator=generator)
    with _opened(path, options) as model:
        prefill_s, decode_s, batch_s = _time(model, ids.to(model.device), options.tokens)
        attached: Any = model.tiercache
        stats, sizes = attached.stats().to_dict(), attached.pass_bytes()
    seconds = {"prefill_s": prefill_s, "batch_s": batch_s, "pass_s": statistics.median(decode_s)}
    disk_gbps, disk_direct = _disk_roof(path)
    dram_gbps = dram_roof(size_bytes=_ROOF_BYTES)
    disk_s, dram_s = sizes["ssd"] / disk_gbps / 1e9, sizes["needed"] / dram_gbps / 1e9
    roof_s = max(disk_s, dram_s)
    peak_rss_bytes = stats_module.peak_rss_bytes()  # the roofs' buffers included
    if not options.keep:
        shutil.rmtree(path)
    return {
        "schema": SCHEMA,
        "hardware": {"processor": platform.processor() or platform.machine(), "cores": torch.get_num_threads()},
        **{name: getattr(options, name) for name in ("shape", "precision", "bytes_per_token", "hbm", "dram", "seed")},
        "link": stats["link"],
        "prefill_tokens": _PROMPT_TOKENS,
        "batch_tokens": _BATCH_TOKENS,
        "kernels": stats["kernels"],
        **seconds,
        "pass_s_all": decode_s,
        "tokens_per_s": 1 / seconds["pass_s"],
        "pass_bytes": sizes,
        "roofs": {"disk_gbps": disk_gbps, "disk_direct": disk_direct, "dram_gbps": dram_gbps},
        "roof_s": roof_s,
        "bound": "ssd" if disk_s > dram_s else "dram",
        "over_roof": seconds["pass_s"] / roof_s,
        "peak_rss_bytes": peak_rss_bytes,
        "stats": stats,
    }


@contextmanager
def _opened(path: Path, options: Options) -> Iterator[Any]:
    """The model as a user would open it."""
    mixed: dict[str, Any] = {}
    calibration = None
    if options.bytes_per_token is not None:
        mixed = {"mode": "mixed", "bytes_per_token": Budget(fraction=1.0)}
        calibration = calibration_of_random_weights(PlaneStore.open(path), options.bytes_per_token)
    config = OffloadConfig(
        hbm=None if options.hbm is None else Budget.parse(options.hbm),
        dram=Budget.parse(options.dram),
        precision=options.precision,
        context=options.context,
        logits=1,
        link_gbps=options.link_gbps,
        **mixed,
    )
    with open_offloaded(path, config, show_progress=options.show_progress, calibration=calibration) as model:
        yield model


def report(result: dict[str, Any]) -> str:
    """A few lines for a person."""
    sizes, roofs, stats = result["pass_bytes"], result["roofs"], result["stats"]
    budgets = f"hbm={result['hbm']} dram={result['dram']}"
    share = result["bytes_per_token"]
    mode = "" if share is None else f"mixed, lossy, {share:g} of the neurons' bytes, "
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


def _disk_roof(folder: Path) -> tuple[float, bool]:
    """GB/s of reads of the model's own files, and whether they were direct.

    The largest files are read, up to 2 GiB: one small file alone may sit in a cache of the disk.
    """
    sizes = {path: path.stat().st_size for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")}
    files = sorted(sizes, key=lambda path: sizes[path], reverse=True)
    least = min(sizes[files[0]], _DISK_BYTES) // 4
    read, seconds, direct = 0, 0.0, True
    for file in files:
        nbytes = min(sizes[file], _DISK_BYTES - read)
        if nbytes < least:
            break
        roof = probe.disk_read(file, limit_bytes=nbytes)
        read, seconds, direct = read + nbytes, seconds + nbytes / roof.gbps / 1e9, direct and roof.direct
    return read / seconds / 1e9, direct
