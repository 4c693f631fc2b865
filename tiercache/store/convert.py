"""Makes a plane store from a checkpoint: streaming, resumable, published at once when complete.

Codes are calibrated where the checkpoint brings a tokenizer: a text goes through the model layer by layer, as the
layers are converted (`store.activations`, `quant.gptq`), and where it is asked for their rounding is learned besides
(`quant.tune`). Otherwise, or where it is asked for, each weight is rounded by itself.

The store grows in `<store>.partial`, layer by layer: a layer's bytes are on disk before the journal (LMDB, one
transaction per layer) says so, so that a conversion killed at any moment goes on behind the last whole layer and
ends with the same bytes as one that ran through. The finished folder is renamed into place.
"""

import hashlib
import mmap
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from profiler import probe
from tiercache.config import CALIBRATION_TOKENS, human
from tiercache.errors import EnvironmentUnsupportedError, StoreError, UsageError
from tiercache.progress import Advance, bar, note
from tiercache.quant import planes as codes
from tiercache.quant.corpus import Corpus
from tiercache.quant.tune import check
from tiercache.store import activations, catalog, encode, estimate, layers, layout
from tiercache.store.activations import Walk
from tiercache.store.catalog import Extent, Record
from tiercache.store.folders import clear_io_errors, existing, locked
from tiercache.store.format import CATALOG_FILE, FRAME_BYTES, VERSION, align
from tiercache.store.layout import UnitPlan
from tiercache.store.reader import Reader
from tiercache.store.source import Source
from tiercache.store.writer import Weighed, Writer, record_of, sync, weigh

Compress = Literal["auto", "on", "off"]
ROUNDING = {"method": "rounding"}
_JOURNAL = "journal.mdb"
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Report:
    """What a conversion did, or would do.

    Attributes:
        store: the folder.
        source_bytes: bytes of the checkpoint's tensors.
        store_bytes: bytes of the finished store, catalogue and copied files included; exact when nothing is
            compressed, else what it came to.
        free_bytes: free on the store's disk before the start.
        resumed_bytes: bytes of the checkpoint that an earlier run had done.
        seconds: how long it took; 0 for a dry run.
        calibrating_s: how long calibrating will take, as samples on this machine say; 0 where codes are rounded.
        calibrating_bytes: the memory that it will take, beside what the process holds already.
        bits: a weight, at each precision, with scales and factors.
        calibration: how codes were chosen: "gptq" with the text's hash and tokens, or "rounding".
        compression: by file: ratio, what zstd saves and costs in seconds per GB, and whether it is used.
    """

    store: str
    source_bytes: int
    store_bytes: int
    free_bytes: int
    resumed_bytes: int = 0
    seconds: float = 0.0
    calibrating_s: float = 0.0
    calibrating_bytes: int = 0
    bits: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    compression: Weighed | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the schema's version."""
        return {"schema": "tiercache.convert/1", **asdict(self)}


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
) -> Report:
    """Make the plane store of a checkpoint; goes on where an interrupted conversion stopped.

    Args:
        checkpoint: folder or Hub id of a safetensors checkpoint (fp32, fp16 or bf16; single or sharded).
        store: folder to make.
        group: weights that share a scale: 32, 64 or 128.
        compress: zstd "on", "off", or "auto" where it saves more time than it costs on the store's disk.
        calibrate: a text file whose tokens are taken through the model, so that weights make up for one another's
            rounding errors; None for the package's own text, if the checkpoint brings a tokenizer.
        tokens: how many of it, at most.
        plain: round each weight by itself instead.
        tune: steps of learned rounding that each layer takes besides; 0 for none. For who has a night.
        dry_run: only say what it would take.
        restart: throw away what an interrupted conversion left.
        show_progress: draw a bar on standard error; None means where that is a terminal.

    Raises:
        UsageError: no such checkpoint, or a folder at `store` that is not a store.
        StoreError: a damaged checkpoint, or a store of another checkpoint or other parameters in that place.
        EnvironmentUnsupportedError: not enough disk, or no permission.
    """
    if compress not in ("auto", "on", "off"):
        raise UsageError(f"compress={compress!r} is not known; choose 'auto', 'on' or 'off'")
    if group not in codes.GROUPS:
        raise UsageError(f"group={group!r} is no group size; choose one of {', '.join(map(str, codes.GROUPS))}")
    if plain and calibrate is not None:
        raise UsageError("a calibration text and plain rounding exclude each other; leave one of the two out")
    if tune < 0:
        raise UsageError(f"tune={tune} steps are fewer than none; give 0 or more")
    if tune and plain:
        raise UsageError("plain rounding looks at no text, so nothing can be tuned by one; leave tune= or plain= out")
    source = Source.open(checkpoint)
    corpus = None if plain else _corpus(source, calibrate, tokens, tune, show_progress)
    job = _Conversion(source, Path(store).expanduser(), group, compress, corpus, tune)
    if dry_run:
        return job.estimate()
    if job.already_done():
        return job.estimate()
    return job.run(restart=restart, show_progress=show_progress)


class _Conversion:
    def __init__(
        self, source: Source, store: Path, group: int, compress: Compress, corpus: Corpus | None, tune: int
    ) -> None:
        self.source, self.store, self.group, self.compress = source, store, group, compress
        self.corpus, self.tune = corpus, tune
        self.partial = store.with_name(store.name + ".partial")
        self.units = layout.plan(source, group, scaled=corpus is not None)
        self.meta: dict[str, Any] = {
            "version": VERSION,
            "identity": source.identity(),
            "model_type": source.config.model_type,
            "dtype": str(source.dtype).removeprefix("torch."),
            "group": group,
            "plane_bits": list(codes.PLANE_BITS),
            "compress": compress,
            "calibration": ROUNDING if corpus is None else corpus.describe() | ({"tune": tune} if tune else {}),
            "units": len(self.units),
            "files": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self._copied()},
        }

    def already_done(self) -> bool:
        """Whether the finished store of the same checkpoint and parameters is there; another's is refused."""
        if not self.store.exists():
            return False
        if not (self.store / CATALOG_FILE).is_file():
            if self.store.is_dir() and not any(self.store.iterdir()):
                return False
            raise UsageError(f"{self.store} exists and is no plane store; name a folder that does not exist yet")
        self._refuse_other(catalog.read(self.store / CATALOG_FILE).meta, self.store)
        if (self.store / _JOURNAL).exists():
            with clear_io_errors(self.store):
                (self.store / _JOURNAL).unlink()
        return True

    def estimate(self) -> Report:
        """What the store will take; measures nothing."""
        data = sum(layout.total_sizes(self.units).values())
        copied = sum(path.stat().st_size for path in self._copied())
        return Report(
            str(self.store),
            sum(encode.weight_bytes(unit, self.source) for unit in self.units),
            data + copied + self._catalog_bytes(),
            shutil.disk_usage(existing(self.store)).free,
            resumed_bytes=self._done_bytes(),
            **self._calibrating(),
            bits=layout.bits((unit.weights, unit.sizes) for unit in self.units),
            calibration=self.meta["calibration"],
        )

    def _done_bytes(self) -> int:
        """Bytes of the checkpoint that an interrupted conversion has done, if there is one."""
        journal = self.partial / _JOURNAL
        if not journal.exists() or _unborn(journal):
            return 0
        with (
            catalog.environment(journal, readonly=False) as env,
            env.begin() as transaction,
        ):  # a journal has no checksum
            known = catalog.contents(transaction, journal)
        same = all(known.meta.get(key) == value for key, value in self.meta.items())
        return self._bytes_of(len(known.records)) if same else 0

    def _bytes_of(self, units: int) -> int:
        return sum(encode.weight_bytes(unit, self.source) for unit in self.units[:units])

    def _calibrating(self) -> dict[str, Any]:
        """Seconds and memory of calibrating, for the report."""
        if self.corpus is None:
            return {}
        tokens, window = self.corpus.windows.numel(), self.corpus.windows.shape[1]
        return {
            "calibrating_s": estimate.seconds(self.units, tokens, window, self.tune, estimate.Rates.measure()),
            "calibrating_bytes": estimate.memory_bytes(self.units, tokens, window, tuned=self.tune > 0),
        }

    def run(self, *, restart: bool, show_progress: bool | None) -> Report:
        """Convert what is left, and publish."""
        begin = time.perf_counter()
        expected = self.estimate()
        with clear_io_errors(self.partial), ExitStack() as stack:
            self.partial.mkdir(parents=True, exist_ok=True)
            taken = f"another conversion is writing {self.partial}; wait for it, or name another folder"
            stack.enter_context(locked(self.partial, taken))
            if self.already_done():  # by another, meanwhile
                self.partial.rmdir()
                return self.estimate()
            for path in self.partial.iterdir() if restart else self.partial.glob(probe.LEFTOVERS):
                path.unlink()
            _discard_unborn(self.partial / _JOURNAL)
            journal = stack.enter_context(catalog.environment(self.partial / _JOURNAL, readonly=False))
            with journal.begin() as transaction:
                known = catalog.contents(transaction, self.partial / _JOURNAL)
            if known.meta:
                self._refuse_other(known.meta, self.partial)
            records = list(known.records)
            self._check_space(expected)
            self._announce(expected, show=show_progress)
            compression = known.meta.get("compression") or self._choose_compression()
            with journal.begin(write=True) as transaction:
                catalog.put_meta(transaction, {**self.meta, "compression": compression})
            done = self._bytes_of(len(records))
            if done:
                share = done / expected.source_bytes
                note(f"going on where an interrupted conversion stopped, {share:.0%} are done", show=show_progress)
            reader = stack.enter_context(Reader())
            advance = stack.enter_context(
                bar(f"converting {self.store.name}", expected.source_bytes, done_bytes=done, show=show_progress)
            )
            writer = stack.enter_context(Writer(self.partial, records, compression))
            self._write_layers(writer, records, reader, journal, advance)
            self._finish(records, compression)
        return Report(
            str(self.store),
            expected.source_bytes,
            sum(path.stat().st_size for path in self.store.iterdir()),
            expected.free_bytes,
            calibrating_s=expected.calibrating_s,
            calibrating_bytes=expected.calibrating_bytes,
            bits=expected.bits,
            resumed_bytes=done,
            seconds=time.perf_counter() - begin,
            calibration=self.meta["calibration"],
            compression=compression,
        )

    def _write_layers(
        self, writer: Writer, records: list[Record], reader: Reader, journal: Any, advance: Advance
    ) -> None:
        todo = self.units[len(records) :]
        quantiser = layers.Quantiser(self.source, self.group, reader, self._walk(todo, reader), self.tune)
        for _, units in groupby(todo, key=lambda unit: (unit.layer, unit.dense)):
            first, some = len(records), list(units)
            for unit, blocks, inputs in quantiser.blocks(some):
                record = writer.write(unit, self.source.tensors, blocks)
                records.append(replace(record, inputs=inputs))
                advance(encode.weight_bytes(unit, self.source))
            writer.sync()
            quantiser.keep()
            with journal.begin(write=True) as transaction:
                for index in range(first, len(records)):
                    catalog.put_record(transaction, index, records[index])
            quantiser.forget()

    def _walk(self, todo: list[UnitPlan], reader: Reader) -> Walk | None:
        """The calibration text on its way, before the first layer that is left; None where none is needed any more."""
        if self.corpus is None or todo[:1] == [] or todo[0].dense:
            return None
        walk = Walk(self.source, self.corpus.windows, reader, self.partial, looks_back=self.tune > 0)
        walk.resume(walk.layers if todo[0].layer is None else todo[0].layer)
        return walk

    def _finish(self, records: list[Record], compression: dict[str, Any]) -> None:
        """Everything but the rename is repeated harmlessly when interrupted."""
        for path in self.partial.glob(activations.FILES):
            path.unlink()
        for path in self._copied():
            shutil.copyfile(path, self.partial / path.name)
        ratios = {name: {key: row[key] for key in ("ratio", "used")} for name, row in compression.items()}
        catalog.write(self.partial / CATALOG_FILE, {**self.meta, "compression": ratios}, records)
        for path in self.partial.iterdir():
            sync(path)
        sync(self.partial)
        if self.store.is_dir():
            self.store.rmdir()  # was empty
        self.partial.rename(self.store)
        sync(self.store.parent)
        (self.store / _JOURNAL).unlink()  # if this is interrupted, the next run does it

    def _refuse_other(self, meta: dict[str, Any], folder: Path) -> None:
        way_out = "name another folder, or remove that one"
        if folder == self.partial:
            way_out = "begin anew with restart=True (--restart), or name another folder"
        for key, value in self.meta.items():
            if meta.get(key) == value:
                continue
            was, now = f"{meta.get(key)!r}", f"{key}={value!r}"
            if key == "calibration":
                was, now = _in_words(meta.get(key) or {}), _in_words(value)
            raise StoreError(f"{folder} was made with {key}={was}, this conversion has {now}; {way_out}")

    def _announce(self, expected: Report, *, show: bool | None) -> None:
        """Say what calibrating will take, before it begins."""
        if self.corpus is not None:
            minutes = max(1, round(expected.calibrating_s / 60))
            steps = f", and tuning in {self.tune} steps a layer," if self.tune else ""
            note(
                f"calibrating{steps} on {self.corpus.windows.numel()} tokens: some {minutes} min in all, and up to "
                f"{human(expected.calibrating_bytes)} of memory beside the process's own "
                "(tiercache convert --plain rounds instead)",
                show=show,
            )

    def _check_space(self, expected: Report) -> None:
        have = sum(path.stat().st_blocks * 512 for path in self.partial.iterdir())
        missing = expected.store_bytes - have - shutil.disk_usage(self.partial).free
        if missing > 0:
            raise EnvironmentUnsupportedError(
                f"{self.store} will take {human(expected.store_bytes)}, its disk lacks {human(missing)} ({missing} "
                "bytes); free some space or name a folder on another disk"
            )

    def _choose_compression(self) -> Weighed:
        """By file, whether zstd saves more reading time than decompressing costs; measured on the first layer."""
        if self.compress == "off":
            return {}
        sample_bytes = min(256 << 20, max(4 << 20, shutil.disk_usage(self.partial).free // 4))
        disk_gbps = 0.0
        if self.compress == "auto":
            disk_gbps = probe.folder_read(self.partial, sample_bytes=sample_bytes).gbps
        with Reader() as reader:
            sample = next(encode.blocks(self.units[0], self.source, reader, self.group))
        return {name: weigh(data[:FRAME_BYTES], disk_gbps) for name, data in sample.items()}

    def _catalog_bytes(self) -> int:
        """Size of the catalogue, found by writing one with blank checksums: they are all of one length."""
        end: dict[str, int] = {}
        records = []
        for unit in self.units:
            extents = {}
            for name, nbytes in unit.sizes.items():
                offset = align(end.get(name, 0))
                extents[name] = Extent(offset, nbytes, "0" * 64)
                end[name] = offset + nbytes
            records.append(record_of(unit, self.source.tensors, extents))
        return catalog.size_bytes({**self.meta, "compression": {}}, records)

    def _copied(self) -> list[Path]:
        found = {path for pattern in _COPIED for path in self.source.folder.glob(pattern)}
        return sorted(path for path in found if not path.name.endswith(".safetensors.index.json"))


def _corpus(source: Source, text: str | Path | None, tokens: int, tune: int, show: bool | None) -> Corpus | None:
    """The calibration text; None, with a note, where no text was named and there is no tokenizer for the own one."""
    try:
        found = Corpus.read(None if text is None else Path(text).expanduser(), source.folder, source.config, tokens)
    except StoreError as error:
        if tune:
            raise UsageError(f"rounding cannot be tuned without a text: {error}") from error
        if text is not None:
            raise
        note(f"codes are rounded and not calibrated: {error}", show=show)
        return None
    if tune:
        check(len(found.windows))
    return found


def _discard_unborn(journal: Path) -> None:
    """Remove a journal whose making was cut short by a full disk, before anything could be entered."""
    if journal.exists() and _unborn(journal):
        journal.unlink()


def _unborn(journal: Path) -> bool:
    return journal.stat().st_size < 2 * mmap.PAGESIZE


def _in_words(calibration: dict[str, Any]) -> str:
    """How codes were chosen, for a person."""
    if calibration.get("method") != "gptq":
        return "plain rounding"
    steps = f", tuned in {calibration['tune']} steps" if calibration.get("tune") else ""
    return f"{calibration['tokens']} tokens of the text {calibration['text'][:8]}{steps}"
