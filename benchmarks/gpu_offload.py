"""Offload on a CUDA card, end to end: are the bits the resident model's, are the tokens, does the budget hold?

Uses the bundled model, or a random one of a known shape (`... FOLDER tinyllama-1.1b`); speed is measured elsewhere.
Takes a folder to make stores in, if one is named. Prints one line of JSON.
"""

import faulthandler
import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

import tiercache
from tiercache.bench import shapes
from tiercache.compat import cache_kwargs, cache_out
from tiercache.errors import DoesNotFitError
from tiercache.tiers.device import device_of

PICO = Path(__file__).parent.parent / "examples" / "pico" / "checkpoint"
PROMPT = "def read_lines(path):\n    with open(path) as file:\n        return"
PLENTY_BYTES, DRAM_BYTES = 1 << 30, 1 << 30
LARGER = 6  # times as much, for a shape of a billion weights
SPARE = 1 << 20  # a budget between the smallest and plenty
LABELS = ("plenty", "smallest and 1 MiB", "smallest")
DRAFTERS = ("resident", "auto", "ngram")
TOKEN_COUNTS = (1, 4, 8, 9, 24, 33, 65, 130)  # the last but one: a drafted tree with its root
CONTEXT = 192
NEW_TOKENS = 48
HANGS_S = 60  # the log tells every so often where it is

Row = dict[str, Any]


class Checks:
    """Rows of results; a check that raises is a row too."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    @contextmanager
    def row(self, check: str) -> Iterator[Row]:
        """A row to fill; `ok` is False until the check says otherwise."""
        row: Row = {"check": check, "ok": False}
        self.rows.append(row)
        begin = time.perf_counter()
        try:
            yield row
        except Exception as error:  # the next check still runs
            row["error"] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        row["seconds"] = round(time.perf_counter() - begin, 1)
        told = {name: row[name] for name in row if name != "ok"}
        print("ok  " if row["ok"] else "FAIL", told, file=sys.stderr, flush=True)


def main() -> int:
    """Run every check on the card; 1 if one failed."""
    faulthandler.dump_traceback_later(HANGS_S, repeat=True)
    where, shape = (*sys.argv[1:], None, None)[:2]
    if where is not None and shape is not None:
        checks = check_shape(shape, Path(where), torch.device("cuda", 0))
    else:
        ids = transformers.AutoTokenizer.from_pretrained(PICO)(PROMPT, return_tensors="pt").input_ids
        with tempfile.TemporaryDirectory(dir=where) as folder:
            checks = check_everything(PICO, Path(folder), ids, torch.device("cuda", 0))
    print(json.dumps({"schema": "tiercache.gpu-offload/2", "checks": checks.rows}))
    return 0 if all(row["ok"] for row in checks.rows) else 1


def check_shape(name: str, folder: Path, at: torch.device) -> Checks:
    """Bits of a model of that shape with random weights, made in `folder`: all of it on the card, and the least."""
    card, checks, shape = Card(at, LARGER), Checks(), shapes.find(name)
    store = shapes.make_store(shape, folder / f"{name}-planes-0", 0, show_progress=False)
    checkpoint = shapes.make_checkpoint(shape, folder / f"{name}-bf16-0", 0, show_progress=False)
    ids = torch.arange(3, 43)[None]
    for precision, place in (("int4", store), ("int8", store), ("source", checkpoint)):
        card.placements(checks, place, precision, ids, labels=("plenty", "smallest"))
    return checks


def check_everything(checkpoint: Path, folder: Path, ids: torch.Tensor, at: torch.device) -> Checks:
    """Every check, of stores made in `folder`; then all kinds of runs once more, which may take nothing of the card."""
    card, checks = Card(at), Checks()
    store = folder / "store"
    tiercache.convert(checkpoint, store, plain=True, show_progress=False)  # bits are compared, not answers
    reserved_before = card.reserved_bytes()
    for precision, place in (("source", checkpoint), ("int8", store), ("int4", store)):
        reference = card.placements(checks, place, precision, ids)
        if precision == "source":
            with checks.row("source: transformers' own model on the card") as row:
                plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).to(at).eval()
                compare(row, logits_of(plain, ids.to(at)), reference)
                del plain
    wide, wide_store = folder / "fp32", folder / "fp32-store"  # in bf16 ties may fall either way
    transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).save_pretrained(wide)
    tiercache.convert(wide, wide_store, plain=True, show_progress=False)
    card.drafted(checks, wide, "source", "ngram", ids)
    for drafter in DRAFTERS:
        card.drafted(checks, wide_store, "int8", drafter, ids)
    free_before = card.free_bytes()
    again = Checks()
    for precision, place in (("source", checkpoint), ("int8", store), ("int4", store)):
        card.placements(again, place, precision, ids, labels=("smallest",))
    card.drafted(again, wide_store, "int8", DRAFTERS[0], ids)
    with checks.row("nothing stays on the card") as row:
        # Modules of kernels are loaded when first used, and stay: so the second time may take nothing.
        row["kept_bytes"] = free_before - card.free_bytes()
        row["kept_by_torch_bytes"] = card.reserved_bytes() - reserved_before
        row["ok"] = (
            row["kept_bytes"] <= 0 and row["kept_by_torch_bytes"] <= 0 and all(each["ok"] for each in again.rows)
        )
    return checks


class Card:
    """Where the checks run, and what of its memory is taken. The processor may stand in, whose memory is not counted.

    Args:
        at: torch's name for it.
        times: how much larger budgets are than the bundled model's.
    """

    def __init__(self, at: torch.device, times: int = 1) -> None:
        self.at, self._device, self._times = at, device_of(at), times

    def free_bytes(self) -> int:
        """Free of all of it, once garbage and torch's cache are given back; 0 where nobody counts."""
        gc.collect()
        self._device.release_cache()
        found = self._device.free_bytes()
        return 0 if found is None else found[0]

    def reserved_bytes(self) -> int:
        """What torch holds of it once garbage and its cache are given back; 0 where nobody counts."""
        gc.collect()
        self._device.release_cache()
        return torch.cuda.memory_reserved(self.at) if self._counted else 0

    def placements(
        self, checks: Checks, place: Path, precision: Any, ids: torch.Tensor, labels: tuple[str, ...] = LABELS
    ) -> list[torch.Tensor]:
        """Logits of the first budget, everything on the card by default, and rows that compare others with them."""
        reference: list[torch.Tensor] = []
        least = self.smallest(place, precision)
        for label in labels:
            with checks.row(f"{precision}, hbm={label}") as row:
                hbm = self._times * PLENTY_BYTES if label == "plenty" else least + (SPARE if "and" in label else 0)
                with self.opened(place, precision, hbm, row) as model:
                    found = logits_of(model, ids.to(self.at))
                    row["fused_layers"] = model.tiercache.stats().fused_layers
                reference = reference or found
                compare(row, found, reference)
                row["ok"] = row["ok"] and (precision == "source" or row["fused_layers"] > 0)
        return reference

    def drafted(self, checks: Checks, place: Path, precision: Any, drafter: str, ids: torch.Tensor) -> None:
        """Whether a drafter leaves the tokens as they are."""
        ids = ids.to(self.at)
        with checks.row(f"{precision}, drafter={drafter}: tokens of greedy decoding") as row:
            least = self.smallest(place, precision, drafter=drafter)
            with self.opened(place, precision, least) as model:
                plain = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
            with self.opened(place, precision, least, row, drafter=drafter) as model:
                text = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
                drafting = model.tiercache.stats().drafting
            row["tokens_per_pass"], row["rounds"] = drafting.tokens_per_pass, drafting.rounds
            pairs = enumerate(zip(plain, text, strict=False))
            row["first_difference"] = next((n for n, (a, b) in pairs if a != b), None)
            # "auto" may decide not to draft; how much a drafter drafts goes by what passes take on this machine.
            row["ok"] = plain == text and drafting.rounds < NEW_TOKENS and (drafter == "auto" or drafting.rounds > 0)

    def smallest(self, place: Path, precision: Any, **options: Any) -> int:
        """The smallest `hbm` that is not refused."""
        hbm = 1 << 20
        while True:
            try:
                with self.opened(place, precision, hbm, **options):
                    return hbm
            except DoesNotFitError as error:
                hbm += error.missing_bytes

    @contextmanager
    def opened(self, place: Path, precision: Any, hbm: int, row: Row | None = None, **options: Any) -> Iterator[Any]:
        """An offloaded model; `row` is told the budget, and what of it the card held at most."""
        chosen = {"context": CONTEXT, "logits": 130, "dram": str(self._times * DRAM_BYTES), "device": str(self.at)}
        chosen |= options
        self.reserved_bytes()  # what models before have left as garbage is not this one's
        before = torch.cuda.memory_allocated(self.at) if self._counted else 0
        self._device.reset_peak()
        with tiercache.offload(place, precision=precision, hbm=str(hbm), **chosen) as model:
            yield model
            if row is not None and self._counted:
                row["hbm_bytes"], row["peak_bytes"] = hbm, torch.cuda.max_memory_allocated(self.at) - before
        if row is not None and row.get("peak_bytes", 0) > hbm:
            raise AssertionError(f"{row['peak_bytes']} bytes on the card under a budget of {hbm}")

    @property
    def _counted(self) -> bool:
        """Whether torch counts its memory."""
        return self._device.free_bytes() is not None


def logits_of(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits of a prefill and of passes of other token counts after it, on the CPU."""
    found = []
    with torch.inference_mode():
        output = model(input_ids=ids, use_cache=True, logits_to_keep=16)
        cache = cache_out(output)
        found.append(output.logits.cpu())
        for tokens in TOKEN_COUNTS:
            some = torch.arange(tokens, device=ids.device)[None] * 7 % 1000
            found.append(model(input_ids=some, **cache_kwargs(model, cache), use_cache=True).logits.cpu())
            cache.crop(-tokens)
    return found


def compare(row: Row, logits: list[torch.Tensor], reference: list[torch.Tensor]) -> None:
    """By token count, the largest difference where a bit differs."""
    names = ["prefill", *map(str, TOKEN_COUNTS)]
    pairs = zip(names, logits, reference, strict=True)
    row["differences"] = {name: float((a - b).abs().max()) for name, a, b in pairs if not torch.equal(a, b)}
    row["ok"] = not row["differences"]


if __name__ == "__main__":
    sys.exit(main())
