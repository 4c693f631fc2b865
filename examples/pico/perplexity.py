"""The yardstick: a causal language model's mean loss on the held-out files; knows no training, no tiers."""

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from .data import read_texts, split_files, token_stream

_BATCH = 8


def heldout_text() -> list[str]:
    """The held-out documents of the running interpreter (another Python version has other text)."""
    return read_texts(split_files()[1])


def heldout_tokens(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """The held-out documents as one stream of int64 tokens: [tokens]."""
    return token_stream(tokenizer, heldout_text())


@torch.inference_mode()
def heldout_loss(model: PreTrainedModel, tokens: Tensor, window: int = 512) -> float:
    """Mean negative log likelihood in nats per token, each token but the first predicted exactly once.

    Windows do not overlap, so that the first tokens of each see little context: a sliding window would give
    a somewhat lower loss. What counts is that every model compared is asked the same.
    """
    was_training = model.training
    model.eval()
    count = len(tokens) - 1
    whole = count // window * window
    inputs, targets = tokens[:whole].view(-1, window), tokens[1 : whole + 1].view(-1, window)
    parts = list(zip(inputs.split(_BATCH), targets.split(_BATCH), strict=True))
    if whole < count:
        parts.append((tokens[whole:count][None], tokens[whole + 1 :][None]))
    total = sum(_summed_loss(model, *part) for part in parts)
    model.train(was_training)
    return total / count


def _summed_loss(model: PreTrainedModel, inputs: Tensor, targets: Tensor) -> float:
    """Summed nats over one batch: inputs and targets [batch, window]."""
    logits = model(inputs.to(model.device), use_cache=False).logits.float()  # [batch, window, vocabulary]
    wanted = targets.to(logits.device).flatten()
    return float(functional.cross_entropy(logits.flatten(0, 1), wanted, reduction="sum"))
