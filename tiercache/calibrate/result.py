"""The finished calibration of a job, and the report of it as plain data.

The report compares eviction policies, each on the trace of the setting that half of int8's bytes are run with.
"""

from dataclasses import asdict
from typing import Any

import numpy as np

from policies.precision import TOP
from profiler import replay
from tiercache.calibrate import sums as summing
from tiercache.calibrate.job import Job
from tiercache.calibrate.settings import described, plain
from tiercache.engine import mixed_plan
from tiercache.engine.mixed_plan import MixedPlan
from tiercache.store.calibration import SCHEMA, Calibration, Setting
from tiercache.store.planestore import PlaneStore

REPORT_SCHEMA = "tiercache.calibration/1"
SHARE = 0.5
SLOTS = 0.4
"""Slots of a plane, of all neurons."""


def calibration(job: Job, sums: summing.Sums, settings: list[Setting]) -> Calibration:
    """What the store keeps."""
    text = {"name": job.text.file.name, "sha256": job.text.sha256, "tokens": len(job.text.ids)}
    meta = {
        "schema": SCHEMA,
        "identity": job.store.contents.meta["identity"],
        "store": job.store.digest,
        "model": job.store.contents.meta["model_type"],
        "precision": job.options.precision,
        "objective": job.options.objective,
        "text": text,
        "seconds": job.journal.seconds,
        "uniform": job.journal.plain("uniform"),
    }
    return Calibration(
        meta,
        sums["norms"].astype(np.float32),
        (sums["frequency"] / sums["tokens"][:, None]).astype(np.float32),
        sums["losses"] / sums["tokens"][:, None],
        tuple(settings),
        _arrays(job, sums, len(settings)),
    )


def report(job: Job, made: Calibration, sums: summing.Sums) -> dict[str, Any]:
    """Plain data; see `tiercache.calibrate.report`."""
    rows = [{**asdict(one), "recipes": plain(one.recipes), "recipe": described(one.recipes)} for one in made.settings]
    return {
        "schema": REPORT_SCHEMA,
        "store": str(job.store.folder),
        **{name: made.meta[name] for name in ("model", "precision", "objective", "text", "seconds", "uniform")},
        "blocks": job.layers,
        "neurons": job.neurons,
        "neuron_weights": (job.inward + 1) * job.store.blocks()[0].columns,
        "measured_tokens": sum(len(window) - 1 for window in job.pieces),
        "exact_perplexity": job.journal.plain("exact")["perplexity"],
        **summing.means(sums, job.inward),
        **_predictor_rows(job),
        "settings": rows,
        "policies": _policies(made, job.store),
    }


def _arrays(job: Job, sums: summing.Sums, settings: int) -> dict[str, np.ndarray]:
    """What else is kept, by name."""
    arrays: dict[str, np.ndarray] = {
        "thresholds": sums["thresholds"] / sums["chunks"][:, None, None, None],
        "paired": sums["pair_of"].astype(np.int32),
        "coactivation": summing.lift(sums),
        "overlap": sums["overlap"] / np.maximum(sums["neighbours"], 1)[:, None],
        "unions": sums["unions"] / np.maximum(sums["union_runs"], 1)[:, None, :],
        "zeros": sums["zeros"] / sums["tokens"],
    }
    for place in range(settings):
        for block, rows in (job.journal.arrays(f"trace/{place}") or {}).items():
            arrays[f"trace/{place}/{block}"] = rows
    if job.options.predictor_rank is not None:
        for place in range(job.layers):
            for name, values in (job.journal.arrays(f"predictor/{place}") or {}).items():
                arrays[f"predictor/{place}/{name}"] = values
    return arrays


def _predictor_rows(job: Job) -> dict[str, Any]:
    rank, found = job.options.predictor_rank, job.predicted()
    if rank is None or found is None:
        return {}
    rows = {
        name: {
            f"{half:.0%}": [one[key][h] if key in one else None for one in found]
            for h, half in enumerate(summing.HALVES)
        }
        for name, key in (("predictor", "own"), ("ahead", "ahead"))
    }
    return {"predictor_rank": rank, **rows}


def _policies(calibration: Calibration, store: PlaneStore) -> dict[str, Any] | None:
    """Every policy and Belady's bound, as plain data; None where no setting wants planes above its ranking's."""
    neurons = calibration.norms.shape[1]
    within = [setting for setting in calibration.settings if setting.share <= SHARE + 1e-9]
    # the one that would be run first comes first: int3 ranks where there are slots
    for setting in sorted(within, key=lambda setting: (setting.rank, setting.kl, setting.read_bytes)):
        wanted = [recipe.wanted(neurons)[setting.rank :] for recipe in setting.recipes]
        trace = MixedPlan(calibration, setting, (TOP,) * len(wanted)).trace(setting.rank)
        if trace is None or not any(map(any, wanted)):
            continue
        slots = [[round(SLOTS * neurons) if count else 0 for count in block] for block in wanted]
        sizes = mixed_plan.sizes_of(store.blocks()[0], store)
        widths = [sizes.parts * width for width in sizes.planes[setting.rank :]]
        rows = replay.compare(trace, slots, None, widths, hot=calibration.frequency)
        each = [{**asdict(row), "missed_bytes_per_token": row.missed_bytes / trace.tokens} for row in rows]
        about = {"share": setting.share, "rank": setting.rank, "slots": SLOTS, "tokens": trace.tokens}
        return {**about, "rows": each}
    return None
