"""Tokens a second on a real model that lies in main memory: each precision beside llama.cpp, turn about.

Every turn of each is a process of its own with the same prompts and as many threads, greedy. Prints a table of all
turns, and one line of JSON last. Needs the store that `make real` leaves, and `make peers`.

    python -m benchmarks.decoding --turns 5 --precisions int4
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
import transformers

import tiercache
from benchmarks.real import model, peer, text
from tiercache.bench.tables import table
from tiercache.errors import EnvironmentUnsupportedError

PRECISIONS = "source,int8,int4,int3"
_TOKENS, _CONTEXT = 64, 512
_PEER = "llama.cpp"


class _Times:
    """A streamer that notes when tokens come."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def put(self, _: object) -> None:
        """Of the prompt, then of each token."""
        self.seconds.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def main() -> None:
    """Read the command line, take turns, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--precisions", default=PRECISIONS, help=f"some of {PRECISIONS}")
    parser.add_argument("--one", action="store_true", help="measure one precision as standard input says")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(json.load(sys.stdin))))
        return
    rows = turns(options.precisions.split(","), options.turns)
    shown = [[name, *(f"{each['tokens_per_s']:.1f}" for each in found)] for name, found in rows.items()]
    heads = [f"turn {number}" for number in range(1, options.turns + 1)]
    print("\n".join(table(f"{model.NAME}, tokens a second", ("",), heads, shown)), file=sys.stderr)
    print(json.dumps({"schema": "tiercache.decoding/1", "model": model.NAME, "rows": rows, "medians": medians(rows)}))


def turns(precisions: list[str], count: int) -> dict[str, list[dict[str, float]]]:
    """What each made in each turn."""
    real = model.get()
    tokenizer = transformers.AutoTokenizer.from_pretrained(real.checkpoint)
    prompts = [each.ids(tokenizer) for each in text.instructions(1)]
    asked = {
        "checkpoint": str(real.checkpoint),
        "store": str(real.checkpoint.parent / "store"),
        "threads": torch.get_num_threads(),
        "tokens": _TOKENS,
        "end": tokenizer.eos_token_id,
        "prompts": prompts,
    }
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in (_PEER, *precisions)}
    for _ in range(count):
        for name, found in rows.items():
            if name == _PEER:
                made = peer.llamacpp(real.gguf, prompts, _TOKENS, tokenizer.eos_token_id)
                if "left_out" in made:
                    raise EnvironmentUnsupportedError(made["left_out"])
            else:
                made = _alone(asked | {"precision": name})
            found.append(made)
    return rows


def _alone(asked: dict[str, Any]) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.decoding", "--one"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        raise EnvironmentUnsupportedError(f"{asked['precision']} fails: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def medians(rows: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each, and what share of the peer's they are."""
    names = ("tokens_per_s", "prefill_tokens_per_s")
    found = {
        row: {name: statistics.median(each[name] for each in many) for name in names} for row, many in rows.items()
    }
    return {row: each | {"of_peer": each[names[0]] / found[_PEER][names[0]]} for row, each in found.items()}


def measure(asked: dict[str, Any]) -> dict[str, float]:
    """Answer every prompt, after one that warms up; the first token's time is the prefill's."""
    place = asked["checkpoint"] if asked["precision"] == "source" else asked["store"]
    written, decode_s, read, prefill_s = 0, 0.0, 0, 0.0
    torch.set_num_threads(asked["threads"])
    given = {"precision": asked["precision"], "context": _CONTEXT, "device": "cpu", "show_progress": False}
    with tiercache.offload(place, **given) as opened:
        for number, prompt in enumerate([asked["prompts"][0], *asked["prompts"]]):
            times, ids = _Times(), torch.tensor([prompt])
            settings = {"max_new_tokens": asked["tokens"], "do_sample": False, "eos_token_id": asked["end"]}
            begin = time.perf_counter()
            opened.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, streamer=times, **settings)
            if number:
                came = times.seconds[1:]  # the first tells of the prompt
                written, decode_s = written + len(came) - 1, decode_s + came[-1] - came[0]
                read, prefill_s = read + len(prompt), prefill_s + came[0] - begin
    return {"tokens_per_s": written / decode_s, "prefill_tokens_per_s": read / prefill_s}


if __name__ == "__main__":
    main()
