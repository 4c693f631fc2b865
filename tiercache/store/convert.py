"""Makes a plane store from a checkpoint, layer by layer; goes on after an interruption.

Codes are calibrated where the checkpoint has a tokenizer. A text is then taken through the model, layer by layer, as
the layers are converted (`store.activations`), and GPTQ chooses the codes (`quant.gptq`). Their rounding can be learned
besides (`quant.tune`). Otherwise each weight is rounded by itself.

The store grows in the folder `<store>.partial`. A layer's bytes are on disk before the journal lists them, in one
transaction per layer. So a conversion that is killed at any moment goes on after the last whole layer. It ends with the
same bytes as one that was not interrupted. The finished folder is renamed into place.
"""

import shutil
import time
from contextlib import ExitStack
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from profiler import probe
from tiercache.config.options import CALIBRATION_TOKENS
from tiercache.config.sizes import human
from tiercache.errors import EnvironmentUnsupportedError, StoreError, UsageError
from tiercache.progress import Advance, bar, note
from tiercache.quant.corpus import Corpus
from tiercache.quant.planes import GROUPS
from tiercache.quant.tune import check_windows
from tiercache.store import catalog, encode
from tiercache.store.activations import HIDDEN_FILES, TextPass
from tiercache.store.catalog import UnitRecord
from tiercache.store.checkpoint import Checkpoint
from tiercache.store.conversion_plan import Compress, ConversionPlan, ConversionReport
from tiercache.store.encode import ReadTensor, quantized
from tiercache.store.folders import clear_io_errors, in_use, locked
from tiercache.store.format import CATALOG_FILE, FRAME_BYTES
from tiercache.store.journal import JOURNAL_FILE, ConversionJournal, opened
from tiercache.store.layout import UnitPlan
from tiercache.store.reader import Reader, load
from tiercache.store.writer import Compression, Writer, compression_of, sync


def convert(
    checkpoint: str | Path,
    store: str | Path,
    *,
    group: int = 64,
    compress: Compress = "auto",
    calibrate: str | Path | None = None,
    tokens: int = CALIBRATION_TOKENS,
    plain: bool = False,
    tune: int = 0,
    dry_run: bool = False,
    restart: bool = False,
    show_progress: bool | None = None,
) -> ConversionReport:
    """Make the plane store of a checkpoint; goes on where an interrupted conversion stopped.

    docs/store-format.md describes the store, and how codes are chosen (GPTQ, arXiv 2210.17323; QuantEase, 2309.01885; a
    Hadamard transform as in QuaRot, 2404.00456).

    Args:
        checkpoint: folder or Hub id of a safetensors checkpoint (fp32, fp16 or bf16; single or sharded), or one that is
            quantised already (`tiercache.formats`): a GGUF file, or a folder of GPTQ, AWQ or compressed-tensors.
        store: folder to make.
        group: weights that share a scale: 32, 64 or 128.
        compress: zstd "on", "off", or "auto" where it saves more time than it costs on the store's disk.
        calibrate: a text file whose tokens are taken through the model, so that weights make up for one another's
            rounding errors; None for the package's own text, if the checkpoint brings a tokenizer.
        tokens: how many of it, at most.
        plain: round each weight by itself instead.
        tune: steps of learned rounding for each layer besides; 0 for none. They take hours.
        dry_run: only say what it would take.
        restart: throw away what an interrupted conversion left.
        show_progress: draw a bar on standard error; None means where that is a terminal.

    Returns:
        Bytes, seconds and bits a weight of what was done, or with `dry_run` of what would be.

    Raises:
        UsageError: no such checkpoint, or a folder at `store` that is not a store.
        UnsupportedModelError: an architecture or a dtype that has no planes.
        StoreError: a damaged checkpoint, or a store of another checkpoint or other parameters in that place.
        QuantizationError: weights that are not finite, or beyond fp16's range.
        EnvironmentUnsupportedError: not enough disk, or no permission.
    """
    _check_options(group, compress, calibrate, plain, tune)
    found = Checkpoint.open(checkpoint)
    corpus = None if plain else _corpus(found, calibrate, tokens, tune, show_progress)
    plan = ConversionPlan(found, Path(store).expanduser(), group, compress, corpus, tune)
    if dry_run:
        return replace(plan.report(), resumed_bytes=0 if restart else plan.resumed_bytes())
    if plan.already_done():
        return plan.report()
    return _run(plan, restart=restart, show_progress=show_progress)


def _check_options(group: int, compress: str, calibrate: str | Path | None, plain: bool, tune: int) -> None:
    """Refuse options that mean nothing, or nothing together."""
    if compress not in ("auto", "on", "off"):
        raise UsageError(f"compress={compress!r} is not known; choose 'auto', 'on' or 'off'")
    if group not in GROUPS:
        raise UsageError(f"group={group!r} is no group size; choose one of {', '.join(map(str, GROUPS))}")
    if plain and calibrate is not None:
        raise UsageError("a calibration text and plain rounding exclude each other; leave one of the two out")
    if tune < 0:
        raise UsageError(f"tune={tune} steps are fewer than none; give 0 or more")
    if tune and plain:
        raise UsageError("plain rounding looks at no text, so nothing can be tuned by one; leave tune= or plain= out")


def _corpus(
    checkpoint: Checkpoint, text: str | Path | None, tokens: int, tune: int, show: bool | None
) -> Corpus | None:
    """The calibration text; None, with a note, where no text was named and there is no tokenizer for the own one."""
    try:
        found = Corpus.read(
            None if text is None else Path(text).expanduser(), checkpoint.folder, checkpoint.config, tokens
        )
    except StoreError as error:
        if tune:
            raise UsageError(f"rounding cannot be tuned without a text: {error}") from error
        if text is not None:
            raise
        note(f"codes are rounded and not calibrated: {error}", show=show)
        return None
    if tune:
        check_windows(len(found.windows))
    return found


def _run(plan: ConversionPlan, *, restart: bool, show_progress: bool | None) -> ConversionReport:
    """Convert what is left, and publish."""
    begin = time.perf_counter()
    expected = plan.report()
    with clear_io_errors(plan.partial), in_use(plan.checkpoint.folder), ExitStack() as stack:
        plan.partial.mkdir(parents=True, exist_ok=True)
        taken = f"another conversion is writing {plan.partial}; wait for it, or name another folder"
        stack.enter_context(locked(plan.partial, taken))
        if plan.already_done():  # by another, meanwhile
            plan.partial.rmdir()
            return plan.report()
        for path in plan.partial.iterdir() if restart else plan.partial.glob(probe.LEFTOVERS):
            path.unlink()
        journal = stack.enter_context(opened(plan.partial))
        if journal.known.meta:
            plan.refuse_other(journal.known.meta, plan.partial)
        records = list(journal.known.records)
        _check_space(plan, expected)
        _announce(plan, expected, show=show_progress)
        compression = journal.known.meta.get("compression") or _choose_compression(plan)
        journal.put_meta({**plan.meta, "compression": compression})
        done = plan.source_bytes(len(records))
        if done:
            share = done / expected.source_bytes
            note(f"going on where an interrupted conversion stopped, {share:.0%} are done", show=show_progress)
        reader = stack.enter_context(Reader())
        advance = stack.enter_context(
            bar(f"converting {plan.store.name}", expected.source_bytes, done_bytes=done, show=show_progress)
        )
        writer = stack.enter_context(Writer(plan.partial, records, compression))
        _write_layers(plan, writer, records, reader, journal, advance)
        _finish(plan, records, compression)
    return replace(
        expected,
        store_bytes=sum(path.stat().st_size for path in plan.store.iterdir()),
        resumed_bytes=done,
        seconds=time.perf_counter() - begin,
        compression=compression,
    )


def _write_layers(
    plan: ConversionPlan,
    writer: Writer,
    records: list[UnitRecord],
    reader: Reader,
    journal: ConversionJournal,
    advance: Advance,
) -> None:
    todo = plan.units[len(records) :]
    text_pass = _text_pass(plan, todo, reader)
    read = _tensor_reader(plan, reader)
    for _, units in groupby(todo, key=lambda unit: (unit.layer, unit.dense)):
        first, some = len(records), list(units)
        for unit, blocks, inputs in quantized(some, read, plan.group, text_pass, plan.tune):
            record = writer.write(unit, plan.checkpoint.tensors, blocks)
            records.append(replace(record, inputs=inputs))
            advance(encode.weight_bytes(unit, plan.checkpoint))
        writer.sync()
        if text_pass is not None and some[0].layer is not None:
            text_pass.keep()
        journal.put_records(records, first)
        if text_pass is not None:
            text_pass.forget()


def _tensor_reader(plan: ConversionPlan, reader: Reader) -> ReadTensor:
    return lambda name: load(reader, plan.checkpoint.tensors[name])


def _text_pass(plan: ConversionPlan, todo: list[UnitPlan], reader: Reader) -> TextPass | None:
    """The text before the first layer that is left; None where no text is needed."""
    if plan.corpus is None or not todo or todo[0].dense:
        return None
    text_pass = TextPass(plan.checkpoint, plan.corpus.windows, reader, plan.partial, looks_back=plan.tune > 0)
    text_pass.resume(todo[0].layer)
    return text_pass


def _finish(plan: ConversionPlan, records: list[UnitRecord], compression: dict[str, Any]) -> None:
    """Publish the store. Each step but the rename may be repeated after an interruption."""
    for path in plan.partial.glob(HIDDEN_FILES):
        path.unlink()
    for path in plan.copied():
        shutil.copyfile(path, plan.partial / path.name)
    ratios = {name: {key: row[key] for key in ("ratio", "used")} for name, row in compression.items()}
    catalog.write(plan.partial / CATALOG_FILE, {**plan.meta, "compression": ratios}, records)
    for path in plan.partial.iterdir():
        sync(path)
    sync(plan.partial)
    if plan.store.is_dir():
        plan.store.rmdir()  # was empty
    plan.partial.rename(plan.store)
    sync(plan.store.parent)
    (plan.store / JOURNAL_FILE).unlink()  # if this is interrupted, the next run does it


def _announce(plan: ConversionPlan, expected: ConversionReport, *, show: bool | None) -> None:
    """Say what calibrating will take, before it begins."""
    if plan.corpus is not None:
        minutes = max(1, round(expected.calibrating_s / 60))
        steps = f", and tuning in {plan.tune} steps a layer," if plan.tune else ""
        takes = f"some {minutes} min in all, and up to {human(expected.calibrating_bytes)} of memory"
        text = f"calibrating{steps} on {plan.corpus.windows.numel()} tokens: {takes} beside the process's own "
        note(text + "('tiercache convert MODEL STORE --plain' takes minutes, and loses more)", show=show)


def _check_space(plan: ConversionPlan, expected: ConversionReport) -> None:
    have = sum(path.stat().st_blocks * 512 for path in plan.partial.iterdir())
    missing = expected.store_bytes - have - shutil.disk_usage(plan.partial).free
    if missing > 0:
        raise EnvironmentUnsupportedError(
            f"{plan.store} will take {human(expected.store_bytes)}, its disk lacks {human(missing)} ({missing} "
            "bytes); free some space or name a folder on another disk"
        )


def _choose_compression(plan: ConversionPlan) -> Compression:
    """By file, whether zstd saves more reading time than decompressing costs; measured on the first layer."""
    if plan.compress == "off":
        return {}
    disk_gbps = 0.0
    if plan.compress == "auto":
        sample_bytes = min(256 << 20, max(4 << 20, shutil.disk_usage(plan.partial).free // 4))
        disk_gbps = probe.folder_read(plan.partial, sample_bytes=sample_bytes).gbps
    with Reader() as reader:
        sample = next(encode.rounded_chunks(plan.units[0], _tensor_reader(plan, reader), plan.group))
    return {name: compression_of(data[:FRAME_BYTES], disk_gbps) for name, data in sample.items()}
