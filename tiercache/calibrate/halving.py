"""Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): much is tried on little text, little on all of it.

Knows settings and what a measurement says; neither models nor text.
"""

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from tiercache.calibrate.measure import Measured
from tiercache.calibrate.settings import Try

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


def passes(groups: Sequence[Sequence[Try]], pieces: int) -> int:
    """Passes over a piece that `best` makes, at most."""
    total = 0
    for group in groups:
        count = len(group)
        for some in rounds(pieces):
            total += some * count
            count = -(-count // _FACTOR)
    return total


def best(
    groups: Sequence[Sequence[Try]],
    pieces: int,
    measure: Callable[[Try, int], Measured],
    objective: Callable[[Measured], float],
) -> list[Try]:
    """The best setting of each group; none of a group in which nothing is finite.

    Args:
        groups: settings that compete.
        pieces: of the text.
        measure: what a setting loses on the first so many pieces.
        objective: of it, what is to be small.
    """
    left = [list(group) for group in groups]
    *early, last = rounds(pieces)
    for some in early:
        left = [_better(group, some, measure, objective) if len(group) > 1 else group for group in left]
    return [one for group in left for one in _better(group, last, measure, objective)[:1]]


def _better(
    group: Sequence[Try], pieces: int, measure: Callable[[Try, int], Measured], objective: Callable[[Measured], float]
) -> list[Try]:
    """The better ones of a group, the best first."""
    found = [(measure(one, pieces), one) for one in group]
    finite = [(objective(measured), one) for measured, one in found if measured.finite]
    finite.sort(key=lambda pair: pair[0])  # equal ones stay in their order: the forecast's
    return [one for _, one in finite[: -(-len(group) // _FACTOR)]]
