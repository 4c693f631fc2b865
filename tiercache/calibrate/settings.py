"""Which recipes are worth measuring: the bytes to try, and what the sums expect each recipe to lose.

What a recipe loses in a block is expected from curves: with the neurons in the order of a scorer, what the first so
many of them lose together at each level. Errors of single neurons are added as if independent, which ranks recipes and
says nothing exact: the best few are measured. Knows recipes, bytes and curves; no tensors.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from policies import precision
from policies.precision import TOP, Recipe, Sizes
from tiercache.calibrate.sums import POINTS, RANKS, scorers

SHARES = (0.25, 0.35, 0.45, 0.5, 0.6, 0.75)
"""Of int8's bytes; beside them those that int4 reads, and that int3 reads with its ranking."""
_RANKED = {"product": 2, "gate": 1, "up": 1}
_BEST = 3

Recipes = tuple[Recipe, ...]


@dataclass(frozen=True)
class Try:
    """A way to run all blocks that is worth measuring; attributes as of `tiercache.store.calibration.Setting`."""

    share: float
    rank: int
    recipes: Recipes

    @property
    def key(self) -> str:
        """Says which way it is, however it was come by, so that it is measured once."""
        each = [(r.scorer, r.rank, r.ranked, *r.shares) for r in self.recipes]
        return hashlib.sha256(repr(each).encode()).hexdigest()


def shares(sizes: Sizes) -> list[float]:
    """What to try, of int8's bytes."""
    whole = sizes.neuron(TOP)
    ranking = [sizes.inward * sizes.row(rank) for rank in RANKS]
    own = [sizes.neuron(2) / whole, *((sizes.neuron(1) + read) / whole for read in ranking)]
    return sorted({*SHARES, *(share for share in own if share < 1)})


def uniform(level: int, inward: int, layers: int) -> Recipes:
    """Every neuron at one level."""
    parts = (float(level == 3), float(level == 2), float(level == 1))
    return (Recipe("product", min(level, 2), inward, parts),) * layers


class Forecast:
    """What recipes are expected to lose, block by block, by the sums of a text."""

    def __init__(self, sums: Mapping[str, np.ndarray], sizes: Sizes) -> None:
        self.layers, self.neurons = sums["norms"].shape
        self.sizes = sizes
        # [blocks, scorers, ranks, levels, points]: of a token, relative to the residual stream
        self._curves = sums["curves"] / sums["ordered"][:, None, None, None, None]
        self._scorers = {name: place for place, name in enumerate(scorers(sizes.inward))}
        self._grid = np.linspace(0, self.neurons, POINTS)

    def losses(self, recipe: Recipe) -> np.ndarray:
        """Of each block: [blocks]."""
        high, middle, low = recipe.counts(self.neurons)
        ends = (high, high + middle, high + middle + low, self.neurons)
        curves = self._curves[:, self._scorers[recipe.scorer], RANKS.index(recipe.rank)]
        lost = np.zeros(self.layers)
        for level, first, last in zip((2, 1, 0), ends[:3], ends[1:], strict=True):
            lost += [np.interp(last, self._grid, row) - np.interp(first, self._grid, row) for row in curves[:, level]]
        return lost

    def tries(self, share: float, rank: int) -> list[Try]:
        """The best few for a share of the bytes, those that promise most first."""
        made = self._candidates(share, rank)
        made.sort(key=lambda recipe: (float(self.losses(recipe).sum()), recipe.scorer, recipe.shares))
        best = made[:_BEST]
        for name in sorted(self._scorers):  # a forecast may be wrong about a scorer as a whole
            of_it = [recipe for recipe in made if recipe.scorer == name]
            best += [recipe for recipe in of_it[:1] if recipe not in best]
        found = [Try(share, rank, (recipe,) * self.layers) for recipe in best]
        divided = self._divided(share, rank)
        if divided is not None and len(set(divided)) > 1:
            found.append(Try(share, rank, divided))
        return found

    def _candidates(self, share: float, rank: int) -> list[Recipe]:
        known = {name: min(ranked, self.sizes.inward) for name, ranked in _RANKED.items() if name in self._scorers}
        return precision.candidate_recipes(share, self.neurons, self.sizes, known, (rank,))

    def _divided(self, share: float, rank: int) -> Recipes | None:
        """Bytes divided over the blocks by what each would lose, instead of evenly; None where there is no choice."""
        groups = [self._candidates(some, rank) for some in shares(self.sizes)]
        options = [min(group, key=lambda recipe: float(self.losses(recipe).sum())) for group in groups if group]
        if not options:
            return None
        reads = [recipe.read_bytes(self.neurons, self.sizes) for recipe in options]
        start = min(range(len(options)), key=reads.__getitem__)
        budget = share * precision.exact_bytes(self.neurons, self.sizes) * self.layers
        if reads[start] * self.layers > budget:
            return None
        losses = np.stack([self.losses(recipe) for recipe in options], axis=1).tolist()
        chosen = precision.divide(losses, [reads] * self.layers, budget, start)
        return tuple(options[place] for place in chosen)

    def read_bytes(self, recipes: Sequence[Recipe]) -> int:
        """Bytes of the neurons that a token reads."""
        return sum(recipe.read_bytes(self.neurons, self.sizes) for recipe in recipes)

    def tried(self) -> list[Try]:
        """All that is worth measuring, by share, then by rank."""
        return [one for share in shares(self.sizes) for rank in RANKS for one in self.tries(share, rank)]


def described(recipes: Sequence[Recipe]) -> str:
    """In one line."""
    ways = {recipe: recipes.count(recipe) for recipe in recipes}
    if len(ways) > 1:
        return f"by block, {', '.join(sorted({recipe.scorer for recipe in ways}))}"
    recipe = recipes[0]
    parts = zip(precision.PRECISION_NAMES[:0:-1], recipe.shares, strict=True)
    used = [f"{name} {part:.0%}" for name, part in parts if part > 0]
    return f"{recipe.scorer}: {', '.join(used) or 'nothing'}"


def plain(recipes: Sequence[Recipe]) -> list[dict[str, Any]]:
    """As JSON says it."""
    return [{**asdict(recipe), "shares": list(recipe.shares)} for recipe in recipes]
