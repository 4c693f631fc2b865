"""Offload on a CUDA card, end to end: are the bits the resident model's, are the tokens, does the budget hold?

Uses the bundled model, so that it takes seconds; speed is measured elsewhere. Prints one line of JSON.
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
from tiercache.compat import cache_kwargs, cache_out
from tiercache.errors import DoesNotFitError

PICO = Path(__file__).parent.parent / "examples" / "pico" / "checkpoint"
PROMPT = "def read_lines(path):\n    with open(path) as file:\n        return"
PLENTY = 1 << 30
SPARE = 1 << 20  # a budget between the smallest and plenty
TOKEN_COUNTS = (1, 4, 8, 9, 24, 33, 64)
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
    """Run every check; 1 if one failed."""
    faulthandler.dump_traceback_later(HANGS_S, repeat=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(PICO)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids.cuda()
    checks = Checks()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        tiercache.convert(PICO, store, show_progress=False)
        for precision, place in (("source", PICO), ("int8", store), ("int4", store)):
            with opened(place, precision, PLENTY) as model:  # the context and modules of kernels, which stay
                logits_of(model, ids)
            del model
        gc.collect()
        free_before = torch.cuda.mem_get_info()[0]
        for precision, place in (("source", PICO), ("int8", store), ("int4", store)):
            reference = placements(checks, place, precision, ids)
            if precision == "source":
                with checks.row("source: transformers' own model on the card") as row:
                    plain = transformers.AutoModelForCausalLM.from_pretrained(PICO).cuda().eval()
                    compare(row, logits_of(plain, ids), reference)
                    del plain
        wide, wide_store = Path(folder) / "fp32", Path(folder) / "fp32-store"  # in bf16 ties may fall either way
        transformers.AutoModelForCausalLM.from_pretrained(PICO, dtype=torch.float32).save_pretrained(wide)
        tiercache.convert(wide, wide_store, show_progress=False)
        drafted(checks, wide, "source", "ngram", ids)
        for drafter in ("auto", "resident", "ngram"):
            drafted(checks, wide_store, "int8", drafter, ids)
    gc.collect()
    with checks.row("VRAM free before and after") as row:
        row["kept_bytes"] = free_before - torch.cuda.mem_get_info()[0]
        row["ok"] = row["kept_bytes"] <= 0
    print(json.dumps({"schema": "tiercache.gpu-offload/1", "checks": checks.rows}))
    return 0 if all(row["ok"] for row in checks.rows) else 1


def placements(checks: Checks, place: Path, precision: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits with everything on the card, and rows that compare others with them."""
    reference: list[torch.Tensor] = []
    for label in ("plenty", "smallest and 1 MiB", "smallest"):
        with checks.row(f"{precision}, hbm={label}") as row:
            hbm = PLENTY if label == "plenty" else smallest(place, precision) + (SPARE if "and" in label else 0)
            with opened(place, precision, hbm, row) as model:
                found = logits_of(model, ids)
            reference = reference or found
            compare(row, found, reference)
    return reference


def drafted(checks: Checks, place: Path, precision: Any, drafter: str, ids: torch.Tensor) -> None:
    """Whether a drafter leaves the tokens as they are."""
    with checks.row(f"{precision}, drafter={drafter}: tokens of greedy decoding") as row:
        least = smallest(place, precision, drafter=drafter)
        with opened(place, precision, least) as model:
            plain = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
        with opened(place, precision, least, row, drafter=drafter) as model:
            text = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)[0].tolist()
            drafting = model.tiercache.stats().drafting
        row["tokens_per_pass"] = drafting.tokens_per_pass
        row["first_difference"] = next((n for n, (a, b) in enumerate(zip(plain, text, strict=False)) if a != b), None)
        row["ok"] = plain == text and drafting.rounds < NEW_TOKENS


def smallest(place: Path, precision: Any, **options: Any) -> int:
    """The smallest `hbm` that is not refused."""
    hbm = 1 << 20
    while True:
        try:
            with opened(place, precision, hbm, **options):
                return hbm
        except DoesNotFitError as error:
            hbm += error.missing_bytes


@contextmanager
def opened(place: Path, precision: Any, hbm: int, row: Row | None = None, **options: Any) -> Iterator[Any]:
    """An offloaded model; `row` is told the budget, and what of it the card held at most."""
    chosen = {"context": CONTEXT, "logits": 65, "dram": "1GiB"} | options
    before = torch.cuda.memory_allocated()
    with tiercache.offload(place, precision=precision, hbm=str(hbm), device="cuda", **chosen) as model:
        yield model
        if row is not None:
            row["hbm_bytes"], row["peak_bytes"] = hbm, torch.cuda.max_memory_allocated() - before
    if row is not None and row["peak_bytes"] > hbm:
        raise AssertionError(f"{row['peak_bytes']} bytes on the card under a budget of {hbm}")


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
