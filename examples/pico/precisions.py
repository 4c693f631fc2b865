"""Held-out perplexity of pico at every precision, through `tiercache.offload` as a user would run it; a table.

Run as `python -m examples.pico.precisions`. Knows no training.
"""

import json
import math
import tempfile
from pathlib import Path

import transformers

import tiercache
from tiercache.quant.planes import PRECISIONS

from .perplexity import heldout_loss, heldout_tokens

PICO = Path(__file__).parent / "checkpoint"
_TOKENS = 8 * 512  # what `heldout_loss` asks for in one pass


def main() -> None:
    """Measure and print: a line a precision, and last a line of JSON."""
    tokens = heldout_tokens(transformers.PreTrainedTokenizerFast.from_pretrained(PICO))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        tiercache.convert(PICO, Path(folder) / "store", show_progress=False)
        for precision in ("source", *reversed(PRECISIONS)):
            path = PICO if precision == "source" else Path(folder) / "store"
            with tiercache.offload(path, precision=precision, context=_TOKENS, logits=_TOKENS) as model:
                loss, sizes = heldout_loss(model, tokens), model.tiercache.pass_bytes()
            rows.append({"precision": precision, "perplexity": math.exp(loss), "pass_bytes": sizes["needed"]})
            print(f"{precision:<8} perplexity {math.exp(loss):.3f}  {sizes['needed']} bytes a pass", flush=True)
    print(json.dumps({"schema": "tiercache.pico/1", "tokens": len(tokens) - 1, "rows": rows}))


if __name__ == "__main__":
    main()
