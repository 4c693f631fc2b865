"""llama.cpp on the model's own GGUF file: the same prompts, as many threads, greedily. A process of its own.

Reads {"gguf", "threads", "tokens", "end", "prompts"} as JSON from standard input, prints one line of JSON. Weights are
repacked, which is llama.cpp's default.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.peers import llamacpp


def main() -> None:
    """Answer every prompt, a context for each."""
    asked: dict[str, Any] = json.load(sys.stdin)
    import llama_cpp

    llama_cpp.llama_backend_init()
    model = llamacpp.load(llama_cpp, Path(asked["gguf"]), repack=True)
    prefill, prefill_s, written, decode_s = 0, 0.0, 0, 0.0
    for place, prompt in enumerate([asked["prompts"][0], *asked["prompts"]]):
        context = llamacpp.context_of(llama_cpp, model, len(prompt) + asked["tokens"], asked["threads"], len(prompt))
        step = llamacpp.greedy_step(llama_cpp, model, context)
        begin = time.perf_counter()
        answer = [step(prompt)]
        first = time.perf_counter()
        while len(answer) < asked["tokens"] and answer[-1] != asked["end"]:
            answer.append(step(answer[-1:]))
        end = time.perf_counter()
        llama_cpp.llama_free(context)
        if place == 0:
            continue  # it warmed up
        prefill, prefill_s = prefill + len(prompt), prefill_s + first - begin
        written, decode_s = written + len(answer) - 1, decode_s + end - first
    llama_cpp.llama_model_free(model)
    found = {"version": llama_cpp.__version__, "threads": asked["threads"]}
    rates = {"tokens_per_s": written / max(decode_s, 1e-9), "prefill_tokens_per_s": prefill / prefill_s}
    print(json.dumps(found | rates))


if __name__ == "__main__":
    main()
