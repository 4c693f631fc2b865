"""Times mixed mode against exact streaming: over an emulated link to an HBM tier, and from the SSD under a RAM cap.

Run as `python -m benchmarks.mixed`. The weights are random and so have nothing to lose: what is measured is bytes
and seconds, not quality (`tiercache quality` does that). The emulated link is to this machine's products what PCIe 4
is to a 3090's memory: 25 to 936.
"""

import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.cgroup import drop_caches, run_capped
from tiercache.bench import shapes
from tiercache.bench.random_calibration import calibration_of_random_weights
from tiercache.compat import cache_kwargs, cache_out
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import Budget, human
from tiercache.engine.offload import open_offloaded
from tiercache.errors import TiercacheError
from tiercache.store.planestore import PlaneStore

SCHEMA = "tiercache.mixed/1"
LINK_RATIO = 25 / 936
_INTERPRETER_BYTES = 420 << 20
_CONTEXT = 128
_WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """One way to run.

    Attributes:
        store: the model.
        share: of int8's bytes of the neurons; None for exact int8.
        hbm, dram: budgets, as `offload` takes them.
        link_gbps: rate of the emulated link.
        tokens: to time.
        policy: who stays in the slots.
    """

    store: str
    share: float | None
    hbm: str | None = None
    dram: str = "auto"
    link_gbps: float | None = None
    tokens: int = 8
    policy: str = "lru"


@contextmanager
def _opened(case: Case) -> Iterator[Any]:
    store = PlaneStore.open(case.store)
    config = OffloadConfig(
        hbm=None if case.hbm is None else Budget.parse(case.hbm),
        dram=Budget.parse(case.dram),
        precision="int8",
        context=_CONTEXT,
        logits=1,
        cpu_tokens=0,
        mode="exact" if case.share is None else "mixed",
        bytes_per_token=None if case.share is None else Budget(fraction=1.0),
        policy="auto" if case.share is None else case.policy,
        link_gbps=case.link_gbps,
    )
    made = None if case.share is None else calibration_of_random_weights(store, case.share)
    with open_offloaded(case.store, config, show_progress=False, calibration=made) as model:
        yield model


def measure(case: Case) -> dict[str, Any]:
    """Seconds and moved bytes of a token."""
    generator = torch.Generator().manual_seed(0)
    with _opened(case) as model, torch.inference_mode():
        attached: Any = model.tiercache
        vocabulary = model.config.vocab_size
        output = model(torch.randint(vocabulary, (1, 16), generator=generator), use_cache=True, logits_to_keep=1)

        def token() -> float:
            ids = torch.randint(vocabulary, (1, 1), generator=generator)
            begin = time.perf_counter()
            model(ids, **cache_kwargs(model, cache_out(output)), use_cache=True).logits.sum().item()
            return time.perf_counter() - begin

        for _ in range(_WARM_UP):
            token()
        before = _moved(attached)
        seconds = [token() for _ in range(case.tokens)]
        moved = {name: (value - before[name]) / case.tokens for name, value in _moved(attached).items()}
        neurons = attached.stats().neurons
        sizes = attached.pass_bytes()
    rates = {} if neurons is None else {name: getattr(neurons, name) for name in ("hit_rate", "chance", "read_bytes")}
    pass_s = statistics.median(seconds)
    return {**asdict(case), "pass_s": pass_s, "moved": moved, "sizes": sizes, **rates}


def _moved(attached: Any) -> dict[str, int]:
    """Bytes that came up over the link, and from the SSD, so far."""
    stats = attached.stats()
    up = stats.tiers["hbm"].loaded_bytes if "hbm" in stats.tiers else 0
    return {"link": up + (stats.neurons.moved_bytes if stats.neurons else 0), "ssd": stats.ssd_bytes}


def over_link(folder: Path, tokens: int) -> dict[str, Any]:
    """Six mixed settings and exact streaming, over the emulated link."""
    whole = measure(Case(str(folder), None, tokens=tokens))
    compute_gbps = whole["sizes"]["needed"] / whole["pass_s"] / 1e9
    link_gbps = LINK_RATIO * compute_gbps
    dense, neurons = _parts(folder)
    rows = []
    for room in (0.05, 0.2):
        hbm = f"{dense + int(room * neurons)}B"
        exact = measure(Case(str(folder), None, hbm, link_gbps=link_gbps, tokens=max(3, tokens // 4)))
        for share in (0.75, 0.5, 0.4):
            mixed = measure(Case(str(folder), share, hbm, link_gbps=link_gbps, tokens=tokens))
            free = measure(Case(str(folder), share, hbm, tokens=tokens))
            rows.append(_row(exact, mixed, free, whole["pass_s"]))
    return {"compute_gbps": compute_gbps, "link_gbps": link_gbps, "resident_int8_s": whole["pass_s"], "rows": rows}


def _parts(folder: Path) -> tuple[int, int]:
    """What an HBM tier must hold beside slots, reserves included, and the bytes that slots could use."""
    with _opened(Case(str(folder), 0.75, hbm="64GiB" if _free() > 80 << 30 else "6GiB")) as model:
        plan = model.tiercache.plan.hbm
        return sum(plan.reserved_bytes.values()) + plan.placement.pinned_bytes, plan.neuron_bytes


def _free() -> int:
    from profiler.host_memory import host_memory

    return host_memory().free_bytes


def _row(exact: dict[str, Any], mixed: dict[str, Any], free: dict[str, Any], compute_s: float) -> dict[str, Any]:
    """Measured speed-up beside what the moved bytes predict: exact streaming overlaps, a token's choices cannot."""
    link_gbps = mixed["link_gbps"]
    exact_s = max(exact["moved"]["link"] / link_gbps / 1e9, compute_s)
    mixed_s = free["pass_s"] + mixed["moved"]["link"] / link_gbps / 1e9
    return {
        "hbm": mixed["hbm"],
        "share": mixed["share"],
        "exact_s": exact["pass_s"],
        "mixed_s": mixed["pass_s"],
        "exact_moved": exact["moved"]["link"],
        "mixed_moved": mixed["moved"]["link"],
        "hit_rate": mixed["hit_rate"],
        "chance": mixed["chance"],
        "speedup": exact["pass_s"] / mixed["pass_s"],
        "predicted": exact_s / mixed_s,
        "moved_ratio": exact["moved"]["link"] / max(1.0, mixed["moved"]["link"]),
        "compute_s": free["pass_s"],
    }


def over_ssd(folder: Path, tokens: int, cap: float) -> dict[str, Any]:
    """Exact and mixed with `cap` of the weights in RAM, each in a process of its own under a hard cap."""
    store = PlaneStore.open(folder)
    weights = sum(unit.nbytes for unit in store.manifest("int8").units)
    cap_bytes = _INTERPRETER_BYTES + int(cap * weights)
    rows: list[dict[str, Any]] = []
    for share in (None, 0.75, 0.5, 0.4):
        drop_caches(folder)
        case = Case(str(folder), share, tokens=tokens)
        command = [sys.executable, "-m", "benchmarks.mixed", "--one", json.dumps(asdict(case))]
        run = run_capped(command, cap_bytes, timeout_s=900)
        if run.returncode:
            raise TiercacheError(f"a capped run ended with exit code {run.returncode}: {run.stderr.strip()[-400:]}")
        rows.append({**json.loads(run.stdout.splitlines()[-1]), "group_peak_bytes": run.cgroup_peak_bytes})
    exact = rows[0]
    disk = exact["moved"]["ssd"] / exact["pass_s"]  # what exact streaming reached, its products overlapped
    for row in rows:
        free = measure(Case(str(folder), row["share"], tokens=tokens))
        row["compute_s"] = free["pass_s"]
        row["predicted"] = exact["pass_s"] / max(row["moved"]["ssd"] / disk, free["pass_s"])
        row["speedup"] = exact["pass_s"] / row["pass_s"]
        row["moved_ratio"] = exact["moved"]["ssd"] / max(1, row["moved"]["ssd"])
    return {"cap_bytes": cap_bytes, "weights_bytes": weights, "rows": rows}


def report(result: dict[str, Any]) -> str:
    """Two tables for a person."""
    link, ssd = result["link"], result["ssd"]
    lines = [
        f"{result['shape']}, {torch.get_num_threads()} cores; emulated link {link['link_gbps']:.2f} GB/s, 25/936 of "
        f"the {link['compute_gbps']:.1f} GB/s that exact int8 passes reach here; seconds and bytes of a token",
        "  hbm        share  exact   mixed   moved exact / mixed        hits (chance)  speed-up  predicted  bytes only",
    ]
    for row in link["rows"]:
        moved = f"{human(row['exact_moved'])} / {human(row['mixed_moved'])}"
        lines.append(
            f"  {human(int(row['hbm'][:-1])):<10} {row['share']:<6} {row['exact_s']:.3f}   {row['mixed_s']:.3f}   "
            f"{moved:<26} {row['hit_rate']:.2f} ({row['chance']:.2f})    {row['speedup']:.2f} x    "
            f"{row['predicted']:.2f} x     {row['moved_ratio']:.2f} x"
        )
    if ssd is not None:
        cap, weights = human(ssd["cap_bytes"]), human(ssd["weights_bytes"])
        lines.append(f"under a cap of {cap} of RAM, all included ({weights} of int8 weights)")
        for row in ssd["rows"]:
            name = "exact int8" if row["share"] is None else f"mixed {row['share']}"
            lines.append(
                f"  {name:<11} {row['pass_s']:.3f} s, {human(row['moved']['ssd'])} from the SSD; {row['speedup']:.2f} x"
                f" (predicted {row['predicted']:.2f} x, bytes only {row['moved_ratio']:.2f} x); group peak "
                f"{human(row['group_peak_bytes'])}"
            )
    return "\n".join(lines)


def main(
    shape: Annotated[str, typer.Option(help="A model's shape.")] = "tinyllama-1.1b",
    folder: Annotated[Path, typer.Option(help="Where models are made, and found again.")] = Path(".bench"),
    tokens: Annotated[int, typer.Option(min=4, help="Single-token passes to time.")] = 12,
    cap: Annotated[float, typer.Option(help="Share of the int8 weights that the RAM cap leaves room for.")] = 0.5,
    ssd: Annotated[bool, typer.Option(help="Measure under the RAM cap as well (needs root).")] = True,
    one: Annotated[str | None, typer.Option(help="One case as JSON; prints its measurement.", hidden=True)] = None,
) -> None:
    """Mixed mode against exact streaming; a table, and last a line of JSON."""
    try:
        if one is not None:
            print(json.dumps(measure(Case(**json.loads(one)))))
            return
        place = folder.absolute() / f"{shape}-planes-0"
        shapes.make_store(shapes.find(shape), place, 0)
        link = over_link(place, tokens)
        result = {"schema": SCHEMA, "shape": shape, "link": link, "ssd": over_ssd(place, tokens, cap) if ssd else None}
    except TiercacheError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    print(report(result), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
