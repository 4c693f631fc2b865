"""Counter-based Gumbel noise: the same number for a seed, sample, position and token, whoever asks and in which order.

A target that takes `argmax(scores + noise)` samples from `softmax(scores)` (the Gumbel-max trick), and what it emits
depends on nothing but its scores and the seed: not on the tree that was verified, nor on the drafter (Coupling
without communication and drafter-invariant speculative decoding, arXiv 2408.07978, section 3).

Knows integers; nothing of models.
"""

from collections import OrderedDict

import torch

# Odd constants and shifts of splitmix64 (Steele, Lea and Flood, 2014), as signed 64-bit integers: torch multiplies
# modulo 2**64.
_GOLDEN, _MIX_1, _MIX_2 = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_KEPT = 64


class GumbelNoise:
    """Standard Gumbel noise for every token of a vocabulary at any position.

    Args:
        seed, sample: of the request, and of the sample within it.
        vocabulary: tokens.
        device: where the noise is wanted.
    """

    def __init__(self, seed: int, vocabulary: int, device: torch.device | None = None, *, sample: int = 0) -> None:
        self.seed = seed
        self._key = _mix(_mix(torch.tensor(_signed(seed))) + sample)
        self._tokens = torch.arange(1, vocabulary + 1) * _GOLDEN
        self._device = device
        self._kept: OrderedDict[int, torch.Tensor] = OrderedDict()

    def __call__(self, position: int) -> torch.Tensor:
        """The noise of the token at an absolute position: [vocabulary], fp32. Not to be changed in place."""
        found = self._kept.get(position)
        if found is None:
            bits = _mix(self._tokens + _mix(self._key + position))
            uniform = ((bits >> 11) & ((1 << 53) - 1)).to(torch.float64).add_(0.5).mul_(2.0**-53)  # within (0, 1)
            found = uniform.log_().neg_().log_().neg_().to(torch.float32)
            found = found if self._device is None else found.to(self._device)
            self._kept[position] = found
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return found


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def _mix(value: torch.Tensor) -> torch.Tensor:
    """The finaliser of splitmix64."""
    value = value + _GOLDEN
    value = (value ^ _shift(value, 30)) * _MIX_1
    value = (value ^ _shift(value, 27)) * _MIX_2
    return value ^ _shift(value, 31)


def _shift(value: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, filling with zeros."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)
