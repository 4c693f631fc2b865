"""Makes a larger model with truly sparse neurons out of pico: wider, ReLU for SiLU, trained further with an L1 penalty.

Run as `python -m examples.pico.relu --out FOLDER`. The recipe is that of relufication (Mirzadeh et al., "ReLU Strikes
Back", arXiv 2310.04564, section 4) with ProSparse's penalty on the activations (arXiv 2402.13516, section 3.2). The
result is too large to be kept in the repository; an interrupted run resumes where its last state was saved.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .data import read_texts, split_files, token_stream
from .perplexity import heldout_loss, heldout_tokens
from .schedule import Hyper
from .train import Trainer, save_checkpoint

PICO = Path(__file__).parent / "checkpoint"
_NEW_DOWN_STD = 0.004  # a new neuron begins nearly silent


def main() -> None:
    """Read the arguments, widen, train, save, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ffn", type=int, default=2048, help="neurons of a layer")
    parser.add_argument("--penalty", type=float, default=0.02, help="weight of the mean activation in the loss")
    parser.add_argument("--peak-rate", type=float, default=1e-3)
    options = parser.parse_args()
    hyper = Hyper(steps=options.steps, ffn=options.ffn, peak_rate=options.peak_rate, seed=3)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(PICO)
    stream = token_stream(tokenizer, read_texts(split_files()[0]))
    trainer = _Sparser(hyper, stream, tokenizer, options.out.with_suffix(".state"), options.penalty)
    trainer.resume()
    trainer.run(save_every_s=120)
    save_checkpoint(trainer.model, tokenizer, options.out)
    print(json.dumps(_figures(options.out, tokenizer, hyper)))


def widened(ffn: int) -> LlamaForCausalLM:
    """Pico in fp32 with `ffn` neurons a layer and ReLU: its own neurons first, then new ones that say little yet."""
    old = LlamaForCausalLM.from_pretrained(PICO, dtype=torch.float32)
    config = LlamaConfig(**{**old.config.to_dict(), "intermediate_size": ffn, "hidden_act": "relu"})
    torch.manual_seed(3)
    model = LlamaForCausalLM(config)
    state = old.state_dict()
    for name, value in model.state_dict().items():
        if value.shape == state[name].shape:
            value.copy_(state[name])
            continue
        if name.endswith("down_proj.weight"):
            value.normal_(std=_NEW_DOWN_STD)
        rows, columns = state[name].shape
        value[:rows, :columns] = state[name]
    return model


class _Sparser(Trainer):
    """The pico trainer over the widened model, with the penalty in the loss."""

    def __init__(
        self, hyper: Hyper, stream: Tensor, tokenizer: PreTrainedTokenizerFast, state: Path, penalty: float
    ) -> None:
        super().__init__(hyper, stream, tokenizer, state, compiled=False)
        self.model.load_state_dict(widened(hyper.ffn).state_dict())
        for layer in self.model.model.layers:
            layer.mlp.act_fn = nn.ReLU()
            layer.mlp.down_proj.register_forward_pre_hook(self._note)
        self.model.config.hidden_act = "relu"
        self._penalty, self._active = penalty, list[Tensor]()

    def _note(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._active.append(arguments[0].abs().mean())

    def _plain_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self._active.clear()
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(inputs, use_cache=False).logits  # [batch, window, vocabulary]
        loss = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        return loss + self._penalty * torch.stack(self._active).float().sum()


def _figures(folder: Path, tokenizer: PreTrainedTokenizerFast, hyper: Hyper) -> dict[str, Any]:
    """Held-out loss of what was saved, and the share of activations that are not zero, by layer."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = heldout_tokens(tokenizer)
    active: list[list[float]] = [[] for _ in model.model.layers]
    for place, layer in enumerate(model.model.layers):

        def note(module: nn.Module, arguments: tuple[Any, ...], place: int = place) -> None:
            active[place].append(float((arguments[0] != 0).float().mean()))

        layer.mlp.down_proj.register_forward_pre_hook(note)
    loss = heldout_loss(model, tokens)
    shares = [round(sum(layer) / len(layer), 4) for layer in active]
    parameters = sum(item.numel() for item in model.parameters())
    report = {"heldout_perplexity": round(math.exp(loss), 3), "active": shares, "parameters": parameters}
    return {**report, "hyperparameters": dataclasses.asdict(hyper)}


if __name__ == "__main__":
    main()
