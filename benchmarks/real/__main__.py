"""`make real`: what a real model loses in each mode, how fast it is, what drafting brings, and llama.cpp beside it.

    python -m benchmarks.real [--tokens 4096] [--per-kind 2] [--answer 32]

The model is kept in the cache folder; its planes and their calibration are made anew. Tables come on standard error as
they are measured; one line of JSON comes last, on standard output. No line is left out because it is bad.
"""

import argparse
import json
import platform
import shutil
import sys
import time
from typing import Any

import torch
import transformers

import tiercache
from benchmarks.real import drafting, model, peer, report, text
from profiler.processor import processor_name
from tiercache.calibrate.command import calibrate
from tiercache.calibrate.report import cost
from tiercache.config.environment import home_folder
from tiercache.errors import TiercacheError
from tiercache.progress import note
from tiercache.quality.command import quality

SCHEMA = "tiercache.real/1"
MODES = ("int8", "int4", "int3", "mixed:0.75", "mixed:0.5", "mixed:0.45/int4")
_CALIBRATED_ON = {"tokens": 2048, "measure_tokens": 256}
_WINDOW, _DECODED = 512, 32


def main() -> int:
    """Measure everything; the exit code is that of an error of tiercache's, or 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of held-out prose; of code a quarter as many")
    parser.add_argument("--per-kind", type=int, default=2, help="instructions of each of the eight kinds, 6 at most")
    parser.add_argument("--answer", type=int, default=32, help="tokens of an answer, at most")
    options = parser.parse_args()
    try:
        print(json.dumps(measure(options.tokens, options.per_kind, options.answer)))
    except TiercacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def measure(tokens: int, per_kind: int, answer: int) -> dict[str, Any]:
    """All parts, each with its seconds."""
    clock = _Clock()
    real = model.get()
    clock.lap("model", f"{model.NAME} lies in {real.checkpoint}")
    store = real.checkpoint.parent / "store"
    shutil.rmtree(store, ignore_errors=True)
    scratch = home_folder() / "real"
    files = {name: scratch / f"{name}.txt" for name in ("calibration", "prose", "code")}
    files["calibration"].write_text(text.calibration(), encoding="utf-8")
    files["prose"].write_text(text.prose("heldout"), encoding="utf-8")
    files["code"].write_text(text.code("heldout"), encoding="utf-8")
    tiercache.convert(real.checkpoint, store, calibrate=files["calibration"], show_progress=False)
    clock.lap("store", "converted to planes, codes calibrated on the calibration split")
    calibrated = calibrate(store, files["calibration"], **_CALIBRATED_ON, show_progress=False)
    clock.lap("calibration", f"calibrated for mixed mode: {cost(calibrated)}")
    losses = {}
    for name, count in (("prose", tokens), ("code", tokens // 4)):
        losses[name] = quality(
            real.checkpoint, files[name], modes=MODES, reference="source", store=store, tokens=count,
            window=_WINDOW, decode=_DECODED, show_progress=False,
        )  # fmt: skip
        clock.lap(f"quality, {name}", report.quality(name, losses[name]))
    tokenizer = transformers.AutoTokenizer.from_pretrained(real.checkpoint)
    prompts = [each.ids(tokenizer) for each in text.instructions(per_kind)]
    beside = peer.llamacpp(real.gguf, prompts, answer, tokenizer.eos_token_id)
    clock.lap("llama.cpp", report.llamacpp(beside))
    rows = drafting.contest(store, prompts, answer)
    clock.lap("drafters", report.drafters(rows, beside))
    found = {
        "schema": SCHEMA,
        "hardware": {"processor": processor_name(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "llama_cpp": beside.get("version"),
        },
        "model": model.NAME,
        "instructions": len(prompts),
        "answer_tokens": answer,
        "quality": losses,
        "drafting": rows,
        "llama.cpp": beside,
        "seconds": clock.laps,
    }
    note(f"{sum(clock.laps.values()):.0f} s in all", show=True)
    return found


class _Clock:
    """Seconds of each part, told as it ends."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._begin = time.perf_counter()

    def lap(self, name: str, told: str) -> None:
        """The part that ends now."""
        now = time.perf_counter()
        self.laps[name], self._begin = now - self._begin, now
        note(f"{told}\n[{name}: {self.laps[name]:.0f} s]", show=True)


if __name__ == "__main__":
    sys.exit(main())
