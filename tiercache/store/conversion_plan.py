"""What a conversion will make: its units, what the catalogue will say of it, and what it will take."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tiercache.errors import StoreError, UsageError
from tiercache.quant.corpus import Corpus
from tiercache.quant.planes import PLANE_BITS
from tiercache.store import catalog, encode, estimate, journal, layout
from tiercache.store.catalog import Extent, UnitRecord
from tiercache.store.checkpoint import Checkpoint
from tiercache.store.folders import clear_io_errors, existing, locked
from tiercache.store.format import CATALOG_FILE, VERSION, align
from tiercache.store.header import small_files
from tiercache.store.writer import Compression, record_of

Compress = Literal["auto", "on", "off"]


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did, or would do.

    Attributes:
        source_bytes: of the checkpoint's tensors.
        store_bytes: of the finished store, catalogue and copied files included; exact when nothing is compressed, else
            what it came to.
        free_bytes: on the store's disk before the start.
        resumed_bytes: of the checkpoint, done by an earlier run.
        seconds: how long it took; 0 for a dry run.
        calibrating_s: how long calibrating will take, as samples on this machine say; 0 where codes are rounded.
        calibrating_bytes: the memory that it will take, beside what the process holds already.
        bits: a weight, at each precision, with scales and factors.
        calibration: how codes were chosen, as in the catalogue.
        compression: by file: ratio, what zstd saves and costs in seconds per GB, and whether it is used.
        loss: what quantising had cost the weights before, in words; empty where nobody had quantised them.
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
    compression: Compression | None = None
    loss: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the schema's version."""
        return {"schema": "tiercache.convert/1", **asdict(self)}


class ConversionPlan:
    """A conversion that was asked for; the parameters are those of `convert`.

    Attributes:
        corpus: the calibration text; None where codes are rounded.
        partial: the folder in which the store grows.
        units: what will be written, in order.
        meta: what the catalogue will say of the whole store.
    """

    def __init__(
        self, checkpoint: Checkpoint, store: Path, group: int, compress: Compress, corpus: Corpus | None, tune: int
    ) -> None:
        self.checkpoint, self.store, self.group, self.compress = checkpoint, store, group, compress
        self.corpus, self.tune = corpus, tune
        self.partial = store.with_name(store.name + ".partial")
        self.units = layout.plan(checkpoint, group, scaled=corpus is not None)
        chosen = {"method": "rounding"} if corpus is None else corpus.describe() | ({"tune": tune} if tune else {})
        self.meta: dict[str, Any] = {
            "version": VERSION,
            "identity": checkpoint.identity(),
            "model_type": checkpoint.config.model_type,
            "dtype": str(checkpoint.dtype).removeprefix("torch."),
            "group": group,
            "plane_bits": list(PLANE_BITS),
            "compress": compress,
            "calibration": chosen,
            "units": len(self.units),
            "files": {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in small_files(checkpoint.folder)
            },
        }

    def already_done(self) -> bool:
        """Whether the finished store of the same checkpoint and parameters is there; another's is refused."""
        if not self.store.exists():
            return False
        if not (self.store / CATALOG_FILE).is_file():
            if self.store.is_dir() and not any(self.store.iterdir()):
                return False
            raise UsageError(f"{self.store} exists and is no plane store; name a folder that does not exist yet")
        self.refuse_other(catalog.read(self.store / CATALOG_FILE).meta, self.store)
        if (self.store / journal.JOURNAL_FILE).exists():
            with clear_io_errors(self.store):
                (self.store / journal.JOURNAL_FILE).unlink()
        return True

    def report(self) -> ConversionReport:
        """What the store will take; measures nothing."""
        ends, records = self._records()
        catalog_bytes = catalog.size_bytes({**self.meta, "compression": {}}, records)
        copied_bytes = sum(path.stat().st_size for path in small_files(self.checkpoint.folder))
        return ConversionReport(
            str(self.store),
            self.source_bytes(),
            sum(map(align, ends.values())) + copied_bytes + catalog_bytes,
            shutil.disk_usage(existing(self.store)).free,
            **self._calibrating(),
            bits=layout.bits((unit.weights, unit.sizes) for unit in self.units),
            calibration=self.meta["calibration"],
            loss=self.checkpoint.loss,
        )

    def resumed_bytes(self) -> int:
        """Bytes of the checkpoint that an interrupted conversion has done; 0 where there is none, or one under way."""
        if not self.partial.is_dir():
            return 0
        try:
            with clear_io_errors(self.partial), locked(self.partial, "a conversion is under way"):  # must not be read
                known = journal.read(self.partial)
        except UsageError:
            return 0
        same = all(known.meta.get(key) == value for key, value in self.meta.items())
        return self.source_bytes(len(known.records)) if same else 0

    def source_bytes(self, units: int | None = None) -> int:
        """Bytes of the checkpoint that the first `units` units are made from; of all by default."""
        return sum(encode.weight_bytes(unit, self.checkpoint) for unit in self.units[:units])

    def _calibrating(self) -> dict[str, Any]:
        """Seconds and memory of calibrating, for the report."""
        if self.corpus is None:
            return {}
        tokens, window = self.corpus.windows.numel(), self.corpus.windows.shape[1]
        return {
            "calibrating_s": estimate.seconds(
                self.units, tokens, window, self.tune, estimate.ConversionRates.measure()
            ),
            "calibrating_bytes": estimate.memory_bytes(self.units, tokens, window, tuned=self.tune > 0),
        }

    def refuse_other(self, meta: dict[str, Any], folder: Path) -> None:
        """Refuse a folder that was made from another checkpoint or with other parameters, with a StoreError."""
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

    def copied(self) -> Iterator[Path]:
        """Each small file of the checkpoint that the store has too.

        Raises:
            StoreError: one is another than when the conversion began, or gone.
        """
        for name, digest in self.meta["files"].items():
            path = self.checkpoint.folder / name
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise StoreError(
                    f"{path} was {'changed' if path.is_file() else 'removed'} while it was converted; put it back and "
                    "run the same command again, which goes on, or begin anew with restart=True (--restart)"
                )
            yield path

    def _records(self) -> tuple[dict[str, int], list[UnitRecord]]:
        """Where each file will end, and the units' records, without compression and with made-up hashes."""
        ends: dict[str, int] = {}
        records = []
        for unit in self.units:
            extents = {}
            for name, nbytes in unit.sizes.items():
                offset = align(ends.get(name, 0))
                extents[name] = Extent(offset, nbytes, "0" * 64)
                ends[name] = offset + nbytes
            records.append(record_of(unit, self.checkpoint.tensors, extents))
        return ends, records


def _in_words(calibration: dict[str, Any]) -> str:
    """How codes were chosen, for a person."""
    if calibration.get("method") != "gptq":
        return "plain rounding"
    steps = f", tuned in {calibration['tune']} steps" if calibration.get("tune") else ""
    return f"{calibration['tokens']} tokens of the text {calibration['text'][:8]}{steps}"
