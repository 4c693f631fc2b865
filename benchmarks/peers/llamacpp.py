"""Peer: llama.cpp on the CPU through llama-cpp-python, timed over a greedy decode of token ids.

It knows llama.cpp's C interface, and nothing of tiercache's engine or of torch, whose import would cost the
peer some 200 MB of its cap. The weights stay mapped; they are repacked only when asked, since under a cap a repacked
copy would not fit.

    python -m benchmarks.peers.llamacpp model.gguf --tokens 4 --threads 2
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers import BATCH_IDS, PROMPT_IDS, PeerReport, Step, time_decode
from tiercache.errors import EnvironmentUnsupportedError, StoreError


def main() -> None:
    """Read the command line, measure, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--repack", action="store_true", help="let llama.cpp copy the weights into its own layout")
    parser.add_argument("--batch", action="store_true", help="time a pass over a batch of tokens as well")
    options = parser.parse_args()
    report = measure(options.gguf, options.tokens, options.threads, repack=options.repack, batch=options.batch)
    print(report.to_json())


def measure(model_file: Path, num_tokens: int, threads: int, *, repack: bool, batch: bool) -> PeerReport:
    """Map the model, then time a greedy decode on the CPU."""
    import llama_cpp  # an optional dependency, built from source: only this peer needs it

    started_s = time.perf_counter()
    llama_cpp.llama_backend_init()
    model = load(llama_cpp, model_file, repack=repack)
    widest = len(BATCH_IDS) if batch else len(PROMPT_IDS)
    context = context_of(llama_cpp, model, len(PROMPT_IDS) + num_tokens + 2 * widest, threads, widest)
    load_s = time.perf_counter() - started_s
    try:
        return time_decode(
            "llama.cpp",
            llama_cpp.__version__,
            greedy_step(llama_cpp, model, context),
            num_tokens=num_tokens,
            load_s=load_s,
            settings=f"mmap, {'repacked' if repack else 'not repacked'}, {threads} threads",
            batch=batch,
        )
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def load(llama_cpp: Any, model_file: Path, *, repack: bool) -> int:
    """Map a model; `repack` lets llama.cpp copy its weights into a layout of its own."""
    params = llama_cpp.llama_model_default_params()
    _set(params, n_gpu_layers=0, load_mode=llama_cpp.LLAMA_LOAD_MODE_MMAP, use_extra_bufts=repack)
    model = llama_cpp.llama_model_load_from_file(str(model_file).encode(), params)
    if not model:
        raise StoreError(f"llama.cpp cannot load {model_file}; its own message is above. Write it again.")
    return int(model)


def context_of(llama_cpp: Any, model: int, num_positions: int, threads: int, batch: int) -> int:
    """A context for passes of at most `batch` tokens: the buffers for logits and activations grow with it."""
    params = llama_cpp.llama_context_default_params()
    _set(params, n_ctx=num_positions, n_batch=batch, n_ubatch=batch, n_threads=threads, n_threads_batch=threads)
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise EnvironmentUnsupportedError(
            f"llama.cpp cannot make a context of {num_positions} positions; its own message is above. Free some memory."
        )
    return int(context)


def _set(params: ctypes.Structure, **values: int) -> None:
    """Set fields that exist: ctypes would accept any other name in silence, and the setting would be lost."""
    known = {field[0] for field in params._fields_}
    if missing := sorted(values.keys() - known):
        raise EnvironmentUnsupportedError(
            f"This llama-cpp-python has no {', '.join(missing)} in {type(params).__name__}. "
            "Install the version that the Makefile names."
        )
    for name, value in values.items():
        setattr(params, name, value)


def greedy_step(llama_cpp: Any, model: int, context: int) -> Step:
    """A step over llama.cpp's own KV cache; positions count on by themselves."""
    vocabulary_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def step(token_ids: Sequence[int]) -> int:
        ids = (llama_cpp.llama_token * len(token_ids))(*token_ids)
        status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(token_ids)))
        if status:
            raise RuntimeError(f"llama_decode returned {status} for {len(token_ids)} tokens")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, -1), (vocabulary_size,))
        return int(logits.argmax())

    return step


if __name__ == "__main__":
    main()
