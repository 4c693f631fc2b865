"""Trains the pico model on the standard library, saves it with its figures; knows nothing of tiers or planes.

Run from the root of the repository: `python -m examples.pico.train`. The default arguments are those of the
committed checkpoint. An interrupted run resumes where its last state was saved.
On cores that other work shares, set OMP_WAIT_POLICY=passive: waiting threads that spin halved the pace.
"""

import argparse
import dataclasses
import json
import math
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .data import Windows, read_texts, split_files, token_stream, train_tokenizer
from .perplexity import heldout_loss, heldout_text, heldout_tokens
from .schedule import Hyper, learning_rate

HERE = Path(__file__).parent
LossFunction = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    """Read the arguments, then tokenizer, training, saving and evaluation, in that order."""
    options = _parser().parse_args()
    hyper = Hyper(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Hyper)})
    training, heldout = split_files()
    texts = read_texts(training)
    tokenizer = train_tokenizer(texts, hyper.vocabulary)
    stream = token_stream(tokenizer, texts)
    print(f"{len(texts)} files, {len(stream):,} tokens; {len(heldout)} files held out", flush=True)

    trainer = Trainer(hyper, stream, tokenizer, options.state, compiled=not options.eager)
    trainer.resume()
    trainer.run(options.save_every_s)

    save_checkpoint(trainer.model, tokenizer, options.out)
    figures = evaluate(options.out)
    report = _report(hyper, trainer, texts, stream, figures)
    options.report.mkdir(parents=True, exist_ok=True)
    (options.report / "heldout.txt").write_text("".join(f"{name}\n" for name in heldout))
    (options.report / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    options.state.unlink(missing_ok=True)
    print(json.dumps(figures))


def _parser() -> argparse.ArgumentParser:
    shown = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shown)
    parser.add_argument("--out", type=Path, default=HERE / "checkpoint", help="folder of the checkpoint")
    parser.add_argument("--report", type=Path, default=HERE, help="folder of training.json and heldout.txt")
    parser.add_argument("--state", type=Path, default=Path(".work/pico-state.pt"), help="file to resume from")
    parser.add_argument("--save-every-s", type=float, default=120.0, help="seconds between two saved states")
    parser.add_argument("--eager", action="store_true", help="without torch.compile and its C++ compiler")
    for field in dataclasses.fields(Hyper):
        kind = float if isinstance(field.default, float) else int
        parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default)
    return parser


def build_model(hyper: Hyper, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh float32 Llama whose configuration already carries the tokenizer's bos and eos."""
    torch.manual_seed(hyper.seed)
    config = LlamaConfig(
        vocab_size=hyper.vocabulary,
        hidden_size=hyper.hidden,
        intermediate_size=hyper.ffn,
        num_hidden_layers=hyper.layers,
        num_attention_heads=hyper.heads,
        num_key_value_heads=hyper.kv_heads,
        max_position_embeddings=hyper.window,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


class Trainer:
    """Model, optimizer and position of one run; float32 weights, products in bfloat16."""

    def __init__(
        self, hyper: Hyper, stream: Tensor, tokenizer: PreTrainedTokenizerFast, state: Path, compiled: bool
    ) -> None:
        self.hyper, self.step, self.seconds, self._state = hyper, 0, 0.0, state
        self.model = build_model(hyper, tokenizer).train()
        self._windows = Windows(stream, hyper.window, tokenizer.bos_token_id, hyper.seed)
        self._optimizer = torch.optim.AdamW(_groups(self.model, hyper), betas=(0.9, 0.95), fused=True)
        self._loss: LossFunction = torch.compile(self._plain_loss, dynamic=False) if compiled else self._plain_loss

    def _plain_loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.model(inputs, use_cache=False).logits  # [batch, window, vocabulary]
        return functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def resume(self) -> None:
        """Continue from the saved state, if there is one; refuse one that was made with other values."""
        if not self._state.exists():
            return
        saved = torch.load(self._state, weights_only=True)
        if saved["hyper"] != dataclasses.asdict(self.hyper):
            raise SystemExit(f"{self._state} is of a run with other arguments; delete it or pass --state")
        self.model.load_state_dict(saved["model"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        print(f"resumed at step {self.step}", flush=True)

    def _save_state(self) -> None:
        """Write beside the file and rename, so that an interruption leaves the old state or the new one."""
        self._state.parent.mkdir(parents=True, exist_ok=True)
        beside = self._state.with_suffix(".new")
        state = {
            "hyper": dataclasses.asdict(self.hyper),
            "model": self.model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
        }
        torch.save(state, beside)
        beside.replace(self._state)

    def run(self, save_every_s: float) -> None:
        """Train to the last step."""
        progress = _Progress(self.hyper)
        saved_at = started = time.perf_counter()
        seconds_before = self.seconds
        while self.step < self.hyper.steps:
            progress.add(self.step, self._train_step())
            self.step += 1
            now = time.perf_counter()
            self.seconds = seconds_before + now - started
            if now - saved_at > save_every_s:
                self._save_state()
                saved_at = now
        self._save_state()

    def _train_step(self) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self.hyper, self.step)
        batch = self.hyper.batch
        loss = self._loss(*self._windows.batch(self.step * batch, batch))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.hyper.clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())


class _Progress:
    """Prints a line every few steps, with the pace since the line before."""

    _EVERY = 20

    def __init__(self, hyper: Hyper) -> None:
        self._hyper, self._losses, self._since = hyper, list[float](), time.perf_counter()

    def add(self, step: int, loss: float) -> None:
        self._losses.append(loss)
        if (step + 1) % self._EVERY:
            return
        count, now = len(self._losses), time.perf_counter()
        step_s = (now - self._since) / count
        pace = self._hyper.batch * self._hyper.window / step_s
        left_s = (self._hyper.steps - step - 1) * step_s
        mean = sum(self._losses) / count
        where = f"step {step + 1}/{self._hyper.steps}"
        print(f"{where}  loss {mean:.3f}  {pace:,.0f} tok/s  {left_s / 60:.1f} min left", flush=True)
        self._losses, self._since = [], now


def _groups(model: LlamaForCausalLM, hyper: Hyper) -> list[dict[str, Any]]:
    """Matrices decay; the norms' gains, whose natural value is one, do not."""
    parameters = list(model.parameters())
    return [
        {"params": [item for item in parameters if item.ndim > 1], "weight_decay": hyper.weight_decay},
        {"params": [item for item in parameters if item.ndim == 1], "weight_decay": 0.0},
    ]


def save_checkpoint(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the weights in bfloat16 and swap the folder in when it is whole; the model stays in float32."""
    half = LlamaForCausalLM(model.config).bfloat16()
    half.load_state_dict(model.state_dict())
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    half.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=eos)
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    half.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def evaluate(folder: Path) -> dict[str, float | int]:
    """Figures of the checkpoint as saved: its bfloat16 weights, read back, computed in float32."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = heldout_tokens(tokenizer)
    text_bytes = sum(len(text.encode()) for text in heldout_text())
    loss = heldout_loss(model, tokens)
    return {
        "heldout_nats_per_token": round(loss, 4),
        "heldout_perplexity": round(math.exp(loss), 3),
        "heldout_bits_per_byte": round(loss * (len(tokens) - 1) / math.log(2) / text_bytes, 4),
        "heldout_tokens": len(tokens),
        "heldout_bytes": text_bytes,
    }


def _report(
    hyper: Hyper, trainer: Trainer, texts: list[str], stream: Tensor, figures: dict[str, float | int]
) -> dict[str, Any]:
    return {
        "figures": figures,
        "hyperparameters": dataclasses.asdict(hyper),
        "parameters": sum(item.numel() for item in trainer.model.parameters()),
        "training_files": len(texts),
        "training_bytes": sum(len(text.encode()) for text in texts),
        "training_tokens": len(stream),
        "tokens_seen": hyper.steps * hyper.batch * hyper.window,
        "seconds": round(trainer.seconds),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


if __name__ == "__main__":
    main()
