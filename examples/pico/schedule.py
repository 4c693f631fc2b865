"""What a training run does at each step: its arguments, learning rate and batch; knows no model and no data."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Hyper:
    """Everything that decides the weights; two runs with equal values see the same data in the same order."""

    steps: int = 4400
    batch: int = 4
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
