"""The finished calibration of a job, and the report of it as plain data."""

from dataclasses import asdict
from typing import Any

import numpy as np

from tiercache.calibrate import sums as summing
from tiercache.calibrate.job import Job
from tiercache.calibrate.settings import described, plain
from tiercache.store.calibration import SCHEMA, Calibration, Setting

REPORT_SCHEMA = "tiercache.calibration/1"


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
    }


def _arrays(job: Job, sums: summing.Sums, settings: int) -> dict[str, np.ndarray]:
    """What else is kept, by name."""
    tokens = sums["tokens"]
    arrays: dict[str, np.ndarray] = {
        "thresholds": sums["thresholds"] / sums["chunks"][:, None, None, None],
        "paired": sums["pair_of"].astype(np.int32),
        "coactivation": summing.lift(sums),
        "overlap": sums["overlap"] / np.maximum(sums["neighbours"], 1)[:, None],
        "unions": sums["unions"] / np.maximum(sums["union_runs"], 1)[:, None, :],
        "zeros": sums["zeros"] / tokens,
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
