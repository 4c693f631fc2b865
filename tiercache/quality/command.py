"""`quality`: every mode over the same text, one model open at a time, and what each costs and loses.

Brings the parts together; the reference comes first, and what the others are compared with is its logits.
"""

import platform
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import tiercache
from tiercache import text as texts
from tiercache.config.cache_folder import made_folder
from tiercache.config.environment import home_folder
from tiercache.config.options import STORE_PRECISION, of_planes
from tiercache.config.sizes import SizeLike
from tiercache.engine.source import default_store
from tiercache.errors import UsageError
from tiercache.model import meta_model
from tiercache.progress import bar, note
from tiercache.quality import measure, report
from tiercache.quality.harness import Harness
from tiercache.quality.modes import Mode, parse, parse_all
from tiercache.store.calibration import Calibration
from tiercache.store.checkpoint import Checkpoint, resolve
from tiercache.store.format import CATALOG_FILE
from tiercache.store.planestore import PlaneStore

SCHEMA = "tiercache.quality/1"
_PROMPT_TOKENS = 16
_LEAST_DECODED = 3  # speed is counted from one single-token step's start to the next's


@dataclass(frozen=True, kw_only=True)
class QualityOptions:
    """What `quality` was asked for, beside the model, the text and the modes.

    Attributes:
        tokens: of the text to use, at most.
        window, batch: tokens of a window, windows of a pass.
        decode: tokens to decode for the speed; 0 measures none.
        offload: options of `tiercache.offload` that all modes share.
        store: plane store, made there if missing.
        tasks, limit, length: folder of lm-evaluation-harness tasks, items of each, and tokens of a request at most.
        scratch: folder for the reference's logits.
        show_progress: draw bars.
    """

    tokens: int
    window: int
    batch: int
    decode: int
    offload: dict[str, Any]
    store: Path | None
    tasks: Path | None
    limit: int | None
    length: int
    scratch: Path
    show_progress: bool | None


def quality(
    model: str | Path,
    text: Path,
    *,
    modes: Sequence[str] = ("int8", "int4", "int3"),
    reference: str = STORE_PRECISION,
    tokens: int = 8192,
    window: int = 512,
    batch: int = 1,
    decode: int = 16,
    hbm: SizeLike | None = "auto",
    dram: SizeLike = "auto",
    store: Path | None = None,
    device: str = "auto",
    tasks: Path | None = None,
    limit: int | None = None,
    length: int = 2048,
    plot: Path | None = None,
    scratch: Path | None = None,
    show_progress: bool | None = None,
) -> dict[str, Any]:
    """Measure the modes; the options are those of `QualityOptions`.

    Args:
        model: a checkpoint or plane store.
        text: a UTF-8 file.
        modes: as `modes.parse` reads them.
        reference: "int8" or "source": the exact mode that the others are held against.
        plot: a .png or .svg to draw bytes against loss in.
        scratch: where the reference's logits lie meanwhile; by default tiercache's own cache folder.

    Raises:
        UsageError, EnvironmentUnsupportedError: what cannot be meant; too little disk, or no optional package.
    """
    wanted = parse_all(modes)
    if reference not in (STORE_PRECISION, "source"):
        raise UsageError(f"the reference is int8 or source, not {reference!r}; leave it out for int8")
    exact = parse(reference)
    folder = resolve(model).resolve()
    store = None if store is None else store.expanduser()
    _check_stores(folder, [exact, *wanted], store)
    if plot is not None:
        report.check_plot(plot)
    options = QualityOptions(
        tokens=tokens,
        window=window,
        batch=batch,
        decode=decode,
        offload={"hbm": hbm, "dram": dram, "device": device},
        store=store,
        tasks=tasks,
        limit=limit,
        length=length,
        scratch=made_folder(home_folder()) if scratch is None else scratch.expanduser(),
        show_progress=show_progress,
    )
    result = _measure(folder, text, [exact, *(mode for mode in wanted if mode != exact)], options)
    if plot is not None:
        report.plot(result, plot)
    return result


def _check_stores(folder: Path, modes: list[Mode], store: Path | None) -> None:
    """Refuse modes that lack their weights or their calibration now, not after hours of work."""
    if _is_store(folder) and any(not of_planes(mode.precision) for mode in modes):
        raise UsageError(f"{folder} is a plane store, which holds no original weights; name the checkpoint for source")
    if any(mode.mixed for mode in modes):
        place = folder if _is_store(folder) else store or default_store(Checkpoint.open(folder))
        if not _is_store(place):
            raise UsageError(
                f"mixed modes need a calibrated plane store, and {place} is not there; make it: tiercache convert "
                f"{folder} {place}, then tiercache calibrate {place} --text FILE"
            )
        Calibration.load(PlaneStore.open(place))


def _measure(folder: Path, file: Path, modes: list[Mode], options: QualityOptions) -> dict[str, Any]:
    """The first mode is the reference."""
    config = meta_model.read_config(folder).get_text_config()
    _check(config, options)
    tokenizer = texts.load_tokenizer(folder)
    read = texts.read(file, tokenizer, tokens=options.tokens, vocabulary=config.vocab_size)
    texts.note_short(read, show=options.show_progress)
    windows = read.windows(options.window)
    predicted = sum(len(window) - 1 for window in windows)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        harness = None
        if options.tasks is not None:
            length = min(options.length, texts.positions(config) or options.length)
            harness = stack.enter_context(Harness.open(options.tasks, tokenizer, limit=options.limit, length=length))
        kept = None
        if len(modes) > 1:
            size_bytes = predicted * config.vocab_size * _item_bytes(config)
            kept = stack.enter_context(measure.kept_logits(options.scratch, size_bytes))
        for mode in modes:
            row = _one(folder, mode, windows, kept, harness, options, first=not rows)
            note(report.line(row), show=options.show_progress)
            rows.append(row)
    found = {"schema": SCHEMA, "model": str(folder), "text": read.describe(), "reference": modes[0].name}
    how = {"window": options.window, "batch": options.batch, "predicted": predicted, "hardware": _hardware(rows)}
    return {**found, **how, **({} if harness is None else {"harness": harness.describe()}), "rows": rows}


def _one(
    folder: Path,
    mode: Mode,
    windows: list[Tensor],
    kept: measure.KeptLogits | None,
    harness: Harness | None,
    options: QualityOptions,
    *,
    first: bool,
) -> dict[str, Any]:
    """Open the model in one mode and measure it."""
    inputs = measure.batches(windows, options.batch)
    prompt = windows[0][:_PROMPT_TOKENS]
    tokens = options.batch * len(windows[0])
    sizes = {"context": max(tokens, len(prompt) + options.decode), "logits": tokens}
    if harness is not None:
        sizes = {name: max(size, harness.tokens) for name, size in sizes.items()}
    store = {} if not of_planes(mode.precision) or _is_store(folder) else {"store": options.store}
    asked: dict[str, Any] = {**options.offload, **sizes, **store, **mode.options()}
    with tiercache.offload(folder, **asked, show_progress=options.show_progress) as model:
        attached: Any = model.tiercache
        pass_bytes = attached.pass_bytes()
        title, needed = f"{mode.name} over the text", pass_bytes["needed"]
        with bar(title, needed * len(inputs), show=options.show_progress) as advance:
            compared: dict[str, Any] = {"keep": kept} if first else {"reference": kept}
            after = partial(advance, needed)
            score = measure.score(model, inputs, **compared, every_token=mode.mixed, after=after)
        with attached.recording() if mode.mixed else nullcontext():  # of the tokens that pass through the slots
            speed = measure.decoding_speed(model, prompt, options.decode)
        bytes_per_token: float = needed
        rates: dict[str, Any] = dict.fromkeys(("hit_rate", "chance", "belady"))
        extras: dict[str, Any] = {}
        if mode.mixed:  # of neurons, the mean of what the tokens did read; of the rest, all
            counted = attached.stats().neurons
            rest_bytes = attached.pass_bytes()["needed"] - attached.mixed.read_bytes
            bytes_per_token = rest_bytes + counted.read_bytes / counted.tokens
            extras["neurons"] = {**counted.to_dict(), "rest_bytes": rest_bytes}
            rates = {name: getattr(counted, name) for name in rates}
        if harness is not None:
            extras["tasks"] = harness.run(model, mixed=mode.mixed, show=options.show_progress)
        stats = attached.stats()
    row = {"mode": mode.name, "precision": mode.precision, "reference": first}
    row |= {"lossy": stats.lossy, "kernels": stats.kernels, "device": stats.device}
    row |= {"bytes_per_token": bytes_per_token, "ssd_bytes": pass_bytes["ssd"], **score.to_dict()}
    return row | {"tokens_per_s": speed, **rates, **extras}


def _check(config: transformers.PretrainedConfig, options: QualityOptions) -> None:
    """Refuse numbers that cannot be meant, before anything is opened."""
    least = {"tokens": 2, "window": 2, "batch": 1, "decode": 0, "length": 2}
    for name, low in least.items():
        if getattr(options, name) < low:
            raise UsageError(f"--{name} {getattr(options, name)} is too few; give {low} or more")
    if 0 < options.decode < _LEAST_DECODED:
        raise UsageError(f"--decode {options.decode} tokens give no speed; give {_LEAST_DECODED} or more, or 0")
    if options.limit is not None and options.limit < 1:
        raise UsageError(f"--limit {options.limit} leaves no item; give 1 or more, or leave it out")
    if options.limit is not None and options.tasks is None:
        raise UsageError("--limit does nothing without --tasks; leave it out")
    texts.check_window(config, options.window)
    positions = texts.positions(config)
    if positions is not None and _PROMPT_TOKENS + options.decode > positions:
        raise UsageError(f"--decode {options.decode} goes beyond the model's {positions} positions; give less")


def _item_bytes(config: transformers.PretrainedConfig) -> int:
    """Bytes of a logit; of the widest there is where the configuration does not say."""
    dtype = getattr(config, "dtype", None)
    return dtype.itemsize if isinstance(dtype, torch.dtype) else torch.float32.itemsize


def _is_store(folder: Path) -> bool:
    return (folder / CATALOG_FILE).is_file()


def _hardware(rows: list[dict[str, Any]]) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    return {"processor": processor, "cores": torch.get_num_threads(), "device": rows[0]["device"]}
