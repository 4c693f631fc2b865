"""The steps of a calibration: statistics of the exact model, then measured settings, each step kept in the journal.

A step that the journal has is not taken again.
"""

from typing import Any

from tiercache.calibrate import predictors, replays, result
from tiercache.calibrate.collect import Collector
from tiercache.calibrate.job import Job
from tiercache.calibrate.journal import clear_errors
from tiercache.calibrate.search import Search
from tiercache.calibrate.settings import Forecast
from tiercache.engine import mixed_plan
from tiercache.store.calibration import FILE


def run(job: Job) -> dict[str, Any]:
    """Take all steps that are left, save the calibration, and report it as plain data."""
    _collect(job)
    sums = job.sums()
    forecast = Forecast(sums, mixed_plan.sizes_of(job.store.blocks()[0], job.store))
    settings = Search(job, forecast).settings()
    made = result.calibration(job, sums, settings)
    with clear_errors(job.store.folder / FILE):
        made.save(job.store.folder / FILE)
    return {**result.report(job, made, sums), "policies": replays.policies(made, job.store)}


def _collect(job: Job) -> None:
    """Every window that is not in the sums yet, and the predictors."""
    done = job.journal.plain("chunks") or 0
    rank = job.options.predictor_rank
    if done == len(job.windows) and (rank is None or job.predicted() is not None):
        return
    with job.opened("int8", None) as model:
        attached: Any = model.tiercache
        blocks = attached.mixed.blocks
        sums = job.sums()
        collector = Collector(model, blocks, mixed_plan.activation_of(model), sums)
        with job.bar("exact passes over the text", attached, len(job.windows), done) as after:
            for place in range(done, len(job.windows)):
                collector.run(job.windows[place])
                job.journal.put(plain={"chunks": place + 1}, arrays={"sums": sums})
                after()
        if rank is not None:
            norms, windows = sums["norms"], job.windows
            with job.bar(f"samples for predictors of rank {rank}", attached, len(windows), 0) as after:
                predictors.train(model, blocks, norms, windows, rank=rank, journal=job.journal, after=after)
