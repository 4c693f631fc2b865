"""Peer: transformers with accelerate's disk offload, timed over a greedy decode.

It knows transformers and accelerate, and nothing of tiercache's engine. Four choices favour the peer:
matrices are placed one by one, for a fuller RAM budget than whole layers give; the embedding comes last,
because a pass reads a single row of it; what is placed in RAM is copied out of the mapped checkpoint, where
reading the rest would evict it; and torch multiplies by whichever of its two ways is faster here. What is
placed on disk is read in every pass, from the checkpoint's own files: the offload folder stays empty.

    python -m benchmarks.peers.transformers_disk DIR --tokens 4 --offload-dir DIR --cpu-memory 900000000
"""

from __future__ import annotations

import argparse
import time
import timeit
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import nn

from benchmarks.peers import PeerReport, Step, time_decode
from tiercache.compat import cache_kwargs


def main() -> None:
    """Read the command line, measure, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--offload-dir", type=Path, required=True)
    parser.add_argument("--cpu-memory", type=int, required=True, help="bytes of weights to keep in RAM")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(measure(options.checkpoint, options.tokens, options.offload_dir, options.cpu_memory).to_json())


def measure(checkpoint: Path, num_tokens: int, offload_folder: Path, cpu_bytes: int) -> PeerReport:
    """Load with `cpu_bytes` of the weights in RAM and the rest on disk, then time a greedy decode."""
    started_s = time.perf_counter()
    model = load(checkpoint, offload_folder, cpu_bytes)
    load_s = time.perf_counter() - started_s
    onednn = onednn_pays(model.dtype)
    in_ram_bytes = sum(parameter.nbytes for parameter in model.parameters() if not parameter.is_meta)
    with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=onednn):
        return time_decode(
            "transformers-disk",
            transformers.__version__,
            greedy_step(model),
            num_tokens=num_tokens,
            load_s=load_s,
            settings=f"oneDNN {onednn}, {in_ram_bytes} bytes in RAM, {torch.get_num_threads()} threads",
        )


def load(checkpoint: Path, offload_folder: Path, cpu_bytes: int) -> transformers.PreTrainedModel:
    """The model in its checkpoint's dtype; mapped, with no copies and no hooks, when everything fits."""
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    with torch.device("meta"):
        meta_model = transformers.AutoModelForCausalLM.from_config(config)
    model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint,
        device_map=device_map(meta_model, cpu_bytes),
        offload_folder=offload_folder,
        local_files_only=True,
    )
    if any(parameter.is_meta for parameter in model.parameters()):
        keep_in_ram(model)
    return model


def keep_in_ram(model: nn.Module) -> None:
    """Copy what was placed in RAM out of the mapped file, whose pages go as soon as others are read."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            parameter.data = parameter.data.clone()


def device_map(meta_model: transformers.PreTrainedModel, cpu_bytes: int) -> dict[str, str]:
    """Place each module that owns weights: in RAM while the budget lasts, else on disk."""
    owned = {name: own_bytes(module) for name, module in meta_model.named_modules() if owns_tensors(module)}
    embedding = meta_model.get_input_embeddings()
    head = meta_model.get_output_embeddings()
    names = {module: name for name, module in meta_model.named_modules()}
    tied = head.weight is embedding.weight
    if tied:
        owned[names[head]] = 0
    else:
        owned[names[embedding]] = owned.pop(names[embedding])  # to the end of the queue
    placed: dict[str, str] = {}
    for name, num_bytes in owned.items():
        placed[name] = "cpu" if num_bytes <= cpu_bytes else "disk"
        cpu_bytes -= num_bytes if placed[name] == "cpu" else 0
    if tied:
        placed[names[head]] = placed[names[embedding]]
    return placed


def owns_tensors(module: nn.Module) -> bool:
    """Whether the module itself, not a child, has parameters or buffers."""
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def own_bytes(module: nn.Module) -> int:
    """The bytes of the module's own parameters; buffers are small and always computed in RAM."""
    return sum(parameter.nbytes for parameter in module.parameters(recurse=False))


def onednn_pays(dtype: torch.dtype) -> bool:
    """Whether torch multiplies one token faster through oneDNN: by processor, it is twice as fast or half."""
    row, matrix = torch.ones(1, 4096, dtype=dtype), torch.ones(8192, 4096, dtype=dtype)
    seconds: dict[bool, float] = {}
    for enabled in (True, False):
        with torch.inference_mode(), torch.backends.mkldnn.flags(enabled=enabled):
            seconds[enabled] = min(timeit.repeat(lambda: nn.functional.linear(row, matrix), number=1, repeat=8))
    return seconds[True] < seconds[False]


def greedy_step(model: transformers.PreTrainedModel) -> Step:
    """A step that keeps the KV cache between calls."""
    cache = transformers.DynamicCache(config=model.config)

    def step(token_ids: Sequence[int]) -> int:
        logits = model(torch.tensor([token_ids]), **cache_kwargs(model, cache), use_cache=True, logits_to_keep=1).logits
        return int(logits[0, -1].argmax())

    return step


if __name__ == "__main__":
    main()
