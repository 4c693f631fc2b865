"""How much each neuron of a feed-forward block matters to a token, guessed before its planes are fetched.

All scorers answer the same question from what costs little: inward products with the lowest planes, which are
resident, or the input itself. The truth that they are held against is what the neuron adds to the output:
|act(g) u| times the norm of its down column (WINA, arXiv 2505.19427, section 3, for the weighting). Knows tensors; not
where planes lie.

    product     |act(g) u|      gate and up; without a gate |act(g)|
    gate        |act(g)|        CATS, arXiv 2404.08763, section 3: the up rows of what is skipped are never read
    up          |u|             FloE, arXiv 2505.05950, Algorithm 1
    inputs      |act(g) u| from the larger half of the inputs (TEAL, arXiv 2408.14690, section 4)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.tiers.device import on_host

Activation = Callable[[Tensor], Tensor]
_TEAL_SHARE = 0.5


@dataclass(frozen=True)
class Scorer:
    """One way to rank.

    Attributes:
        parts: which inward matrices it needs of every neuron: 0 is gate (or the only one), 1 is up.
        channels: share of the inputs, largest first, that its products use.
    """

    parts: tuple[int, ...]
    channels: float = 1.0


SCORERS: Mapping[str, Scorer] = MappingProxyType(
    {
        "product": Scorer((0, 1)),
        "gate": Scorer((0,)),
        "up": Scorer((1,)),
        "inputs": Scorer((0, 1), _TEAL_SHARE),
    }
)


def needed(name: str, inward: int) -> tuple[int, ...]:
    """The inward matrices that a scorer reads, of a block that has `inward` of them.

    Raises:
        UsageError: no such scorer, or one by an up matrix where there is none.
    """
    if name not in SCORERS:
        raise UsageError(f"unknown scorer {name!r}; choose one of {', '.join(SCORERS)}")
    parts = tuple(part for part in SCORERS[name].parts if part < inward)
    if not parts:
        raise UsageError(f"scorer {name!r} needs a gated feed-forward block; use 'product'")
    return parts


def scores(values: Sequence[Tensor | None], activation: Activation, norms: Tensor) -> Tensor:
    """How much neurons matter, [tokens, neurons].

    Args:
        values: inward products [tokens, neurons]: of gate (or the only matrix) and of up, biases included; None
            where they are not known.
        activation: of the block.
        norms: of the down columns, [neurons].
    """
    gate, up = values[0], values[1] if len(values) > 1 else None
    made: Tensor | None = None if gate is None else activation(gate)
    if up is not None:
        made = up if made is None else made * up
    assert made is not None
    return made.abs() * norms


def largest(x: Tensor, share: float) -> Tensor:
    """x with the smaller channels of each token set to zero."""
    if share >= 1:
        return x
    keep = max(1, round(share * x.shape[-1]))
    least = x.abs().topk(keep, dim=-1).values[..., -1:]
    return x.where(x.abs() >= least, 0)


def first(score: Tensor, counts: Sequence[int], *, in_order: bool) -> Tensor:
    """The most important neurons of one token, class after class of `counts` neurons: [sum of counts].

    Args:
        score: [neurons].
        counts: how many each class has.
        in_order: most important first within a class as well, which costs a sort; else in the order in which they lie,
            which what follows walks through faster.
    """
    total = sum(counts)
    if in_order or not on_host(score.device):
        return score.topk(total).indices
    numbers = score.numpy()
    edges = [len(numbers) - count for count in accumulate(counts)]
    parted = np.partition(numbers, sorted({edge for edge in edges if edge < len(numbers)})) if total else numbers
    if total and np.isnan(parted[-1]):  # of a broken model; comparisons would lose neurons
        return score.topk(total).indices
    before, found = np.zeros(len(numbers), np.bool_), [np.zeros(0, np.int64)]
    for edge in edges:
        if edge == len(numbers):
            continue
        taken = numbers > parted[edge]
        ties = len(numbers) - edge - np.count_nonzero(taken)
        taken[np.flatnonzero(numbers == parted[edge])[:ties]] = True
        found.append(np.flatnonzero(taken & ~before))
        before = taken
    return torch.from_numpy(np.concatenate(found))


def recall(guess: Tensor, truth: Tensor, share: float) -> float:
    """Which share of the truly most important `share` of the neurons a guess finds among as many, over all tokens.

    guess, truth: [tokens, neurons].
    """
    count = max(1, round(share * truth.shape[1]))
    wanted = torch.zeros_like(truth, dtype=torch.bool).scatter_(1, truth.topk(count, dim=1).indices, True)
    return float(wanted.gather(1, guess.topk(count, dim=1).indices).float().mean())


def previous(truth: Tensor) -> Tensor:
    """The importance of the token before, for each but the first: what ATU assumes of the next token."""
    return truth[:-1]
