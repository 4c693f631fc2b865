"""Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): much is tried on little text, little on all of it.

Knows settings and what a measurement says; neither models nor text.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from tiercache.calibrate.measure import Measured
from tiercache.calibrate.settings import Try

METHOD = "halving/1"
"""Goes into the journal: another way to measure does not go on from this one's measurements."""

PIECE = 64
"""Tokens of a piece of text: as few as leave a token some context."""
_FACTOR = 3  # each round has so many times more pieces, and so many times fewer settings, than the one before


def spread(pieces: Sequence[Tensor], tokens: int) -> list[Tensor]:
    """Whole pieces of about so many tokens from all over the text, in an order whose beginning is from all over it."""
    whole = [piece for piece in pieces if len(piece) == len(pieces[0])]
    count = min(max(1, tokens // len(pieces[0])), len(whole))
    at = np.linspace(0, len(whole) - 1, count).round().astype(int)
    return [whole[at[place]] for place in np.random.default_rng(0).permutation(count)]


def rounds(pieces: int) -> list[int]:
    """How many pieces each round has; all of them in the last."""
    found, some = [], 1
    while some < pieces:
        found.append(some)
        some *= _FACTOR
    return [*found, pieces]


def halving_passes(groups: Sequence[Sequence[Try]], pieces: int) -> int:
    """Passes over a piece that `best` makes, at most."""
    total = 0
    for group in groups:
        count = len(group)
        for some in rounds(pieces):
            total += some * count if count > 1 or some == pieces else 0
            count = -(-count // _FACTOR)
    return total


def best(
    groups: Sequence[Sequence[Try]],
    pieces: int,
    measure: Callable[[Try, int], Measured],
    objective: Callable[[Measured], float],
) -> list[Try]:
    """The best setting of each group; none of a group in which nothing is finite on the whole text.

    `measure` says what a setting loses on the first so many `pieces` of the text; of that `objective` is to be small.
    """

    def loss(some: int, one: Try) -> float:
        found = measure(one, some)
        return objective(found) if found.finite else math.inf

    ranked = [_ranked(group, pieces, loss) for group in groups]
    winners = [next((one for one in group if measure(one, pieces).finite), None) for group in ranked]
    return [winner for winner in winners if winner is not None]


def _ranked(group: Sequence[Try], pieces: int, loss: Callable[[int, Try], float]) -> list[Try]:
    """A group, the best first: those that were in a later round before all others. Equal ones stay in their order."""
    left, behind = list(group), list[Try]()
    for some in rounds(pieces):
        if len(left) > 1:
            left.sort(key=partial(loss, some))
        if some < pieces:
            count = -(-len(left) // _FACTOR)
            left, behind = left[:count], left[count:] + behind
    return left + behind
