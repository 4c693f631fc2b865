"""The main job in one screen: a model larger than the memory it is given writes text, with the resident model's logits.

Runs the bundled pico model (11 MiB of weights) from its checkpoint and from a plane store made on the spot, with less
memory than its weights, streams what it writes, and compares the logits bit by bit; exit code 1 if one differs.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import tiercache
from tiercache.config.sizes import human

PICO = Path(__file__).parent / "pico" / "checkpoint"
PROMPT = "def read_lines(path):"
TOKENS = 48


def main() -> None:
    """Stream from the checkpoint in place, then from int8 planes; compare; report."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(PICO)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    size = (PICO / "model.safetensors").stat().st_size
    resident = transformers.AutoModelForCausalLM.from_pretrained(PICO).eval()
    want = step_logits(resident, ids)
    print(f"The weights take {human(size)}. The model gets less, a region of main memory standing in for a GPU.\n")
    budgets: dict[str, Any] = {"hbm": "7MiB", "dram": "3MiB", "context": 96}
    with tiercache.offload(PICO, **budgets) as model:
        equal = all(torch.equal(one, other) for one, other in zip(step_logits(model, ids), want, strict=True))
        stream(model, tokenizer, ids)
        summarise(model)
    print(f"\nLogits of the prefill and of 5 decoded tokens equal the resident model's, bit for bit: {equal}")
    with tempfile.TemporaryDirectory() as folder:
        made = tiercache.convert(PICO, Path(folder) / "store", show_progress=False)
        print(f"\nThe same from a plane store ({human(made.store_bytes)}, three precisions in one copy), at int8:\n")
        with tiercache.offload(Path(folder) / "store", precision="int8", dram="9MiB", context=96) as model:
            stream(model, tokenizer, ids)
            summarise(model)
    print(json.dumps({"schema": "tiercache.demo/1", "equal": equal}))
    sys.exit(0 if equal else 1)


def step_logits(model: transformers.PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """Logits of a prefill, and of five tokens decoded by `generate`."""
    with torch.inference_mode():
        prefill = model(input_ids=ids).logits
    wanted: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True, "do_sample": False}
    decoded = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, **wanted)
    return [prefill, *decoded.logits]


def stream(model: transformers.PreTrainedModel, tokenizer: Any, ids: torch.Tensor) -> None:
    """Write text to standard output as it comes."""
    torch.manual_seed(0)
    streamer = transformers.TextStreamer(tokenizer, skip_special_tokens=True)
    mask = torch.ones_like(ids)
    model.generate(
        ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=True, temperature=0.6, top_k=20, streamer=streamer
    )


def summarise(model: Any) -> None:
    """What the tiers did."""
    stats, passes = model.tiercache.stats(), model.tiercache.pass_bytes()
    print(f"\n{stats.passes} passes, {stats.tokens_per_s:.0f} tokens/s, first pass {stats.first_pass_s * 1e3:.0f} ms;")
    print(f"a pass needs {human(passes['needed'])} of weights, {human(passes['ssd'])} of them from the SSD")
    for name, tier in stats.tiers.items():
        print(
            f"  {name:<5} peak {human(tier.peak_bytes)} of {human(tier.capacity_bytes)}, {tier.hits} hits, "
            f"{tier.misses} misses, {human(tier.loaded_bytes)} brought in, stalls {sum(tier.stall_s.values()):.3f} s"
        )


if __name__ == "__main__":
    main()
