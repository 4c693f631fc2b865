"""Makes counter-based Gumbel noise: seed, position and token decide each number, whatever was asked before.

A target that takes `argmax(scores + noise)` samples from `softmax(scores)` (the Gumbel-max trick), and what it emits
depends on nothing but its scores and the seed: not on the tree that was verified, nor on the drafter (Coupling
without communication and drafter-invariant speculative decoding, arXiv 2408.07978, section 3).

Knows integers; it does not know models.
"""

import math
from collections import OrderedDict
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from tiercache.tiers.device import on_host

# Odd constants and shifts of splitmix64 (Steele, Lea and Flood, 2014), all modulo 2**64.
_GOLDEN, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = 1 << 64
_MASK = _WORD - 1
KEPT_POSITIONS = 18
"""Positions whose noise is kept: those of one round, from the root to a leaf 16 tokens deep, and the token after it."""

_FEW = 8  # noise is made of the scores alone that are not banned, where these are less than such a share of all
_AT_ONCE, _NUMBERS = 8, 1 << 14  # positions made together: no more, and no more numbers; small arrays cost by the call


class GumbelNoise:
    """Standard Gumbel noise for every token of a vocabulary at any position.

    Args:
        seed: of the request.
        vocabulary: tokens.
        device: where the noise is wanted.
    """

    def __init__(self, seed: int, vocabulary: int, device: torch.device | None = None) -> None:
        self.seed = seed
        self._key = _mix(_mix(seed))
        self._tokens = np.arange(1, vocabulary + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        self._device = device
        self._kept: OrderedDict[int, torch.Tensor] = OrderedDict()

    def __call__(self, position: int) -> torch.Tensor:
        """The noise of the token at an absolute position: [vocabulary], fp32. Not to be changed in place."""
        if position not in self._kept:
            last = position + max(1, min(_AT_ONCE, _NUMBERS // len(self._tokens)))
            self._kept.update(zip(range(position, last), self._make(range(position, last)), strict=True))
            while len(self._kept) > KEPT_POSITIONS:
                self._kept.popitem(last=False)
        return self._kept[position]

    def of(self, position: int) -> Callable[[int], float]:
        """What gives the noise of single tokens at a position, where a row of all tokens would be work for nothing."""
        row = self._kept.get(position)
        if row is not None and on_host(row.device):
            found: Callable[[int], float] = row.numpy().item
            return found
        return partial(_gumbel, _mix(self._key + position))

    def added(self, scores: torch.Tensor, position: int) -> torch.Tensor:
        """The scores [vocabulary] of the token at a position with its noise; for few of them no whole row is made."""
        if position not in self._kept and scores.dtype in (torch.float32, torch.float64):
            allowed = np.flatnonzero(scores.numpy(force=True) != -np.inf)
            if len(allowed) * _FEW < len(scores):
                some = _gumbels(self._tokens[allowed] + np.uint64(_mix(self._key + position)))
                return scores.index_add(0, torch.from_numpy(allowed).to(scores.device), some.to(scores))
        return scores + self(position)

    def _make(self, positions: range) -> torch.Tensor:
        """The noise of several positions [positions, vocabulary]."""
        bits = self._tokens + np.array([_mix(self._key + position) for position in positions], np.uint64)[:, None]
        found = _gumbels(bits)
        return found if self._device is None else found.to(self._device)


def _gumbels(bits: NDArray[np.uint64]) -> torch.Tensor:
    """Noise from the bits that tell token and position, which it changes."""
    _mix_each(bits)
    bits >>= np.uint64(11)
    uniform = torch.from_numpy(bits.astype(np.float64)).add_(0.5).mul_(2.0**-53)  # within (0, 1)
    return uniform.log_().neg_().log_().neg_().to(torch.float32)


def _gumbel(key: int, token: int) -> float:
    """What `_gumbels` makes of one token at the position of a key."""
    value = ((token + 1) * _GOLDEN + key + _GOLDEN) & _MASK  # `_mix`, for it is asked for thousands
    value = ((value ^ value >> 30) * _MIX_1) & _MASK
    value = ((value ^ value >> 27) * _MIX_2) & _MASK
    uniform = (((value ^ value >> 31) >> 11) + 0.5) * 2.0**-53
    surprise = -math.log(uniform)
    return float(np.float32(-math.log(surprise))) if surprise > 0 else math.inf  # 0 where it was rounded to 1


def _mix(value: int) -> int:
    """The finaliser of splitmix64."""
    value = (value + _GOLDEN) % _WORD
    value = (value ^ value >> 30) * _MIX_1 % _WORD
    value = (value ^ value >> 27) * _MIX_2 % _WORD
    return value ^ value >> 31


def _mix_each(values: NDArray[np.uint64]) -> None:
    """The same in place, for all at once."""
    values += np.uint64(_GOLDEN)
    values ^= values >> np.uint64(30)
    values *= np.uint64(_MIX_1)
    values ^= values >> np.uint64(27)
    values *= np.uint64(_MIX_2)
    values ^= values >> np.uint64(31)
