"""What a training run does at each step: its arguments, learning rate and batch; knows no model and no data."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Everything that decides the weights; two runs with equal values see the same data in the same order.

    From `late_step` on the batch is `late_batch`: the end of the committed run had fewer tokens for each step,
    so that it ended within its hour on two shared cores.
    """

    steps: int = 1400
    batch: int = 8
    late_batch: int = 4
    late_step: int = 565
    window: int = 512
    peak_rate: float = 2e-3
    final_rate: float = 1e-4
    warmup_steps: int = 100
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    seed: int = 1
    vocabulary: int = 2048
    hidden: int = 256
    ffn: int = 768
    layers: int = 6
    heads: int = 4
    kv_heads: int = 2


def learning_rate(hyper: Hyper, step: int) -> float:
    """Linear warm-up to the peak, then half a cosine down to the final rate."""
    if step < hyper.warmup_steps:
        return hyper.peak_rate * (step + 1) / hyper.warmup_steps
    done = (step - hyper.warmup_steps) / max(1, hyper.steps - hyper.warmup_steps)
    return hyper.final_rate + (hyper.peak_rate - hyper.final_rate) * (1 + math.cos(math.pi * done)) / 2


def batch_size(hyper: Hyper, step: int) -> int:
    """Windows in the batch of a step."""
    return hyper.batch if step < hyper.late_step else hyper.late_batch


def windows_before(hyper: Hyper, step: int) -> int:
    """Windows that the steps before this one have used."""
    early = min(step, hyper.late_step)
    return early * hyper.batch + (step - early) * hyper.late_batch
