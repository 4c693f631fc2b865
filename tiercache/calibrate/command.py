"""`calibrate`: a store and a text in, a calibration beside the store's catalogue out.

Refuses what cannot be meant before anything is opened. The steps are statistics of the exact model, then measured
settings. A step that the journal has is not taken again, so an unfinished run is gone on with by the same command.
"""

from pathlib import Path
from typing import Any, get_args

import torch

from tiercache import text as texts
from tiercache.calibrate import predictors, result
from tiercache.calibrate.collect import Collector
from tiercache.calibrate.halving import METHOD
from tiercache.calibrate.job import CalibrationOptions, Job, Objective, Rest
from tiercache.calibrate.journal import clear_errors, journal
from tiercache.calibrate.search import Search
from tiercache.calibrate.settings import Forecast
from tiercache.config.options import STORE_PRECISION
from tiercache.config.sizes import Budget, SizeLike
from tiercache.engine import mixed_plan
from tiercache.engine.machine import resolve_device
from tiercache.errors import StoreError, UsageError
from tiercache.progress import note
from tiercache.store.calibration import FILE, PARTIAL_FILE, SCHEMA, Calibration
from tiercache.store.format import CATALOG_FILE
from tiercache.store.planestore import PlaneStore

_LEAST_TOKENS = 32


def calibrate(
    store: str | Path,
    text: str | Path,
    *,
    tokens: int = 8192,
    window: int = 512,
    measure_tokens: int = 1024,
    precision: Rest = STORE_PRECISION,
    objective: Objective = "loss",
    predictor_rank: int | None = None,
    hbm: SizeLike | None = "auto",
    dram: SizeLike = "auto",
    context: int | None = None,
    device: str = "auto",
    restart: bool = False,
    once: bool = False,
    show_progress: bool | None = None,
) -> dict[str, Any]:
    """Learn from a text what the store's neurons are worth; kept in the store's folder.

    Args:
        store, text: a plane store, and a UTF-8 file.
        tokens: of the text to learn from, at most.
        window: tokens of a pass.
        measure_tokens: on which settings are measured at last, in pieces of 64 tokens spread over the text.
        precision: precision of what is no neuron, in the settings.
        objective: keep of each share the recipe of least KL from the exact model ("loss"), or of least predictive
            entropy ("entropy": M2Cache, arXiv 2410.14740, Algorithm 1).
        predictor_rank: train low-rank predictors too.
        hbm, dram, device: as of `tiercache.offload`.
        context: tokens that the budgets are laid out for; by default a window.
        restart: forget what an earlier, unfinished run has done.
        once: refuse to do again, without `restart`, what a finished run has done.
        show_progress: draw bars; None means where standard error is a terminal.

    Returns the report as plain data.

    Raises:
        UsageError: something that cannot be meant, or an unfinished run that was begun otherwise.
        DoesNotFitError, StoreError, EnvironmentUnsupportedError: of a budget, of the store, of its disk.
    """
    counts: dict[str, Any] = {"tokens": tokens, "window": window, "measure_tokens": measure_tokens}
    chosen: dict[str, Any] = {"precision": precision, "objective": objective, "predictor_rank": predictor_rank}
    budgets: dict[str, Any] = {"hbm": None if hbm is None else Budget.parse(hbm), "dram": Budget.parse(dram)}
    budgets |= {"context": window if context is None else context, "device": device}
    options = CalibrationOptions(**counts, **chosen, **budgets, show_progress=show_progress)
    _check(options)
    opened = _open(store)
    read = _read(opened, Path(text).expanduser(), options)
    asked = _asked(opened, read, options)
    if once and not restart and not (opened.folder / PARTIAL_FILE).exists():
        _refuse_done(opened, asked)
    with journal(opened.folder, asked, restart=restart) as kept, torch.no_grad():
        try:
            report = _run(Job(opened, read, options, kept))
        except KeyboardInterrupt:
            note("interrupted; the same command goes on from here", show=show_progress)
            raise
    (opened.folder / PARTIAL_FILE).unlink(missing_ok=True)
    return report


def _run(job: Job) -> dict[str, Any]:
    """Take all steps that are left, save the calibration, and report it as plain data."""
    _collect(job)
    sums = job.sums()
    forecast = Forecast(sums, mixed_plan.sizes_of(job.store.blocks()[0], job.store))
    made = result.calibration(job, sums, Search(job, forecast).settings())
    with clear_errors(job.store.folder / FILE):
        made.save(job.store.folder / FILE)
    return result.report(job, made, sums)


def _collect(job: Job) -> None:
    """Every window that is not in the sums yet, and the predictors."""
    done, rank = job.journal.plain("chunks") or 0, job.options.predictor_rank
    if done == len(job.windows) and (rank is None or job.predicted() is not None):
        return
    with job.opened("int8", None) as model:
        sums = job.sums()
        collector = Collector(model, sums)
        with job.bar("exact passes over the text", model, len(job.windows), done) as after:
            for place in range(done, len(job.windows)):
                collector.run(job.windows[place])
                job.journal.put(plain={"chunks": place + 1}, arrays={"sums": sums})
                after()
        if rank is not None:
            with job.bar(f"samples for predictors of rank {rank}", model, len(job.windows)) as after:
                predictors.train(model, sums["norms"], job.windows, rank=rank, journal=job.journal, after=after)


def _open(store: str | Path) -> PlaneStore:
    """The store; a checkpoint is told apart from a damaged store."""
    folder = Path(store).expanduser()
    if not (folder / CATALOG_FILE).exists() and any(folder.glob("*.safetensors")):
        raise UsageError(f"{folder} is a checkpoint and no plane store; first: tiercache convert {folder} STORE")
    return PlaneStore.open(folder)


def _refuse_done(store: PlaneStore, asked: dict[str, Any]) -> None:
    """Hours of work are not repeated by a slip."""
    try:
        meta = Calibration.load(store).meta
    except (UsageError, StoreError):
        return  # none, or none of this store's
    known = {**meta, "text": meta["text"]["sha256"], "tokens": meta["text"]["tokens"]}
    if all(asked[name] == known.get(name) for name in ("text", "tokens", "precision", "objective")):
        raise UsageError(f"{store.folder} is calibrated with this very text already; add --restart to do it again")


def _check(options: CalibrationOptions) -> None:
    """Refuse numbers that cannot be meant, before anything is opened."""
    for name, least in (("tokens", _LEAST_TOKENS), ("window", 8), ("measure_tokens", 8), ("context", options.window)):
        value = getattr(options, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value!r} is too few; give {least} or more")
    if options.predictor_rank is not None and options.predictor_rank < 1:
        raise UsageError(f"--predictor-rank {options.predictor_rank} predicts nothing; give 1 or more")
    if options.precision not in get_args(Rest):
        raise UsageError(f"--precision {options.precision!r} is not what settings are measured with; int8 or int4")
    if options.objective not in get_args(Objective):
        raise UsageError(f"unknown objective {options.objective!r}; choose one of {', '.join(get_args(Objective))}")


def _read(store: PlaneStore, file: Path, options: CalibrationOptions) -> texts.Text:
    """The text's tokens."""
    config = store.config.get_text_config()
    texts.check_window(config, options.window)
    tokenizer = texts.load_tokenizer(store.folder)
    read = texts.read(file, tokenizer, tokens=options.tokens, vocabulary=config.vocab_size)
    if len(read.ids) < _LEAST_TOKENS:
        raise UsageError(f"{file} holds {len(read.ids)} tokens, and {_LEAST_TOKENS} are the least; name a longer text")
    texts.note_short(read, show=options.show_progress)
    return read


def _asked(store: PlaneStore, text: texts.Text, options: CalibrationOptions) -> dict[str, Any]:
    """What decides the contents of the result: an unfinished run is gone on with by the same alone."""
    names = ("window", "measure_tokens", "precision", "objective", "predictor_rank")
    own = {"method": METHOD, "schema": SCHEMA, "identity": store.contents.meta["identity"], "store": store.digest}
    own |= {"text": text.sha256, "tokens": len(text.ids), "device": resolve_device(options.device).type}
    return own | {name: getattr(options, name) for name in names}
