"""What is added up over a text about every block, as arrays that can be put away after each chunk and gone on with.

All sums are fp64 and of whole chunks in their order, so that a calibration that was cut off ends with the same values.
Names of axes: L blocks, N neurons, S scorers, R the ranking's planes (1 and 2), H the shares of `HALVES`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from policies.precision import PRECISION_NAMES
from tiercache.model.importance import SCORERS

RANKS = (1, 2)
HALVES = (0.25, 0.5)
"""Shares of the neurons that recall, overlap and unions are told of."""
QUANTILES = (0.25, 0.5, 0.75, 0.9)
UNIONS = (2, 4, 8, 16, 64)
PAIRED = 256
"""Neurons of a block whose co-activation is counted."""
POINTS = 129
"""Where curves over the neurons, most important first, are sampled: evenly, none and all included."""

Sums = dict[str, np.ndarray]


def scorers(inward: int) -> tuple[str, ...]:
    """Those that make a difference in a block with `inward` inward matrices."""
    return tuple(SCORERS) if inward > 1 else ("product", "inputs")


def empty(layers: int, neurons: int, inward: int) -> Sums:
    """Before the first chunk."""
    named, ranks, paired = len(scorers(inward)), len(RANKS), min(PAIRED, neurons)
    shapes: dict[str, tuple[int, ...]] = {
        "chunks": (layers,),
        "tokens": (layers,),
        "ordered": (layers,),  # tokens whose neurons were put in order: in large models not all
        "norms": (layers, neurons),
        "squares": (layers, len(RANKS), neurons),  # of the down columns at int3 and int4
        "dots": (layers, len(RANKS), neurons),  # of them with those at int8
        "frequency": (layers, neurons),
        "thresholds": (layers, named, ranks, len(QUANTILES)),
        "pair_of": (layers, paired),
        "pair_frequency": (layers, paired),
        "pairs": (layers, paired, paired),
        "recall": (layers, named, ranks, len(HALVES)),
        "previous": (layers, len(HALVES)),
        "overlap": (layers, len(HALVES)),
        "unions": (layers, len(HALVES), len(UNIONS)),
        "union_runs": (layers, len(UNIONS)),
        "neighbours": (layers,),
        "zeros": (layers,),
        "losses": (layers, 3),
        "own_losses": (layers, 3),
        "curves": (layers, named, ranks, 3, POINTS),  # at skip, int3 and int4
    }
    return {name: np.zeros(shape) for name, shape in shapes.items()}


def means(sums: Mapping[str, np.ndarray], inward: int) -> dict[str, Any]:
    """The same as means, as plain data: what a report shows."""
    tokens, ordered = sums["tokens"][:, None], sums["ordered"]
    neighbours = np.maximum(sums["neighbours"], 1)[:, None]
    recall = sums["recall"] / ordered[:, None, None, None]
    unions = sums["unions"] / np.maximum(sums["union_runs"], 1)[:, None, :]
    thresholds = sums["thresholds"] / sums["chunks"][:, None, None, None]
    return {
        "recall": _by_scorer(inward, lambda s, r: _by_half(recall[:, s, r])),
        "previous": _by_half(sums["previous"] / neighbours),
        "overlap": _by_half(sums["overlap"] / neighbours),
        "unions": {
            _percent(half): {
                str(window): unions[:, h, w].tolist() for w, window in enumerate(UNIONS) if sums["union_runs"][0, w]
            }
            for h, half in enumerate(HALVES)
        },
        "zeros": (sums["zeros"] / sums["tokens"]).tolist(),
        "losses": (sums["losses"] / tokens).tolist(),
        "own_losses": (sums["own_losses"] / tokens).tolist(),
        "thresholds": _by_scorer(inward, lambda s, r: thresholds[:, s, r].tolist()),
        "quantiles": list(QUANTILES),
    }


def lift(sums: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of the paired neurons: how often two are important together, as a multiple of what independence would give."""
    own = sums["pair_frequency"]
    expected = own[:, :, None] * own[:, None, :] / np.maximum(sums["tokens"], 1)[:, None, None]
    made: np.ndarray = np.divide(sums["pairs"], expected, out=np.zeros_like(expected), where=expected > 0)
    return made.astype(np.float32)


def _by_scorer(inward: int, value: Callable[[int, int], Any]) -> dict[str, dict[str, Any]]:
    """A value for each scorer, and for each precision that it ranks at."""
    places = list(enumerate(RANKS))
    return {name: {PRECISION_NAMES[rank]: value(s, r) for r, rank in places} for s, name in enumerate(scorers(inward))}


def _by_half(values: np.ndarray) -> dict[str, list[float]]:
    return {_percent(half): values[:, h].tolist() for h, half in enumerate(HALVES)}


def _percent(share: float) -> str:
    return f"{share:.0%}"
