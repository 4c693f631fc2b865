"""How many neurons get how many bits: recipes, the bytes they read, and the choice among them under a budget.

A *level* is a number of planes: 0 skips a neuron, 1 is int3, 2 is int4, 3 is int8. A *recipe* says how a layer's
neurons are ranked for each token and which share of them, most important first, gets which level (M2Cache, arXiv
2410.14740, section 5.2, with levels that are nested planes). Knows shares, bytes and measured losses; neither neurons
nor tensors.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

PRECISION_NAMES = ("skip", "int3", "int4", "int8")
TOP = len(PRECISION_NAMES) - 1
# Shares at int8, int4 and int3 to try; the last that is not 0 is then set to what the budget leaves for it.
_HIGHS = (0.03, 0.06, 0.1, 0.2, 0.3, 0.45, 0.6)
_TEMPLATES = (
    *((0.4, 0.0, 0.0), (0.0, 0.4, 0.0), (0.0, 0.0, 0.4), (0.0, 0.1, 0.3), (0.0, 0.3, 0.3)),
    *((high, *rest) for high in _HIGHS for rest in ((0.2, 0.0), (0.0, 0.2), (0.15, 0.2))),
)


@dataclass(frozen=True)
class Sizes:
    """Bytes of one row of a layer's feed-forward block, and how many rows a neuron has.

    Attributes:
        planes: of a row of each plane, most significant first.
        scales: of a row's scales.
        inward: rows of a neuron that inputs are multiplied by: 2 with a gate, else 1.
    """

    planes: tuple[int, ...]
    scales: int
    inward: int

    @property
    def parts(self) -> int:
        """Rows of a neuron, its down column included."""
        return self.inward + 1

    def row(self, level: int) -> int:
        """Bytes of a row at `level`."""
        return sum(self.planes[:level]) + self.scales if level else 0

    def neuron(self, level: int) -> int:
        """Bytes of a whole neuron at `level`."""
        return self.parts * self.row(level)


@dataclass(frozen=True)
class Recipe:
    """See the module.

    Attributes:
        scorer: which of `tiercache.model.importance` ranks the neurons.
        rank: planes that ranking reads of the rows it needs, of every neuron; 0 if it reads none.
        ranked: how many of a neuron's inward rows it reads.
        shares: of the neurons, at int8, int4 and int3, most important first; the rest is skipped.
    """

    scorer: str
    rank: int
    ranked: int
    shares: tuple[float, float, float]

    def __post_init__(self) -> None:
        if not all(share >= 0 for share in self.shares) or sum(self.shares) > 1 + 1e-9:
            raise ValueError(f"shares {self.shares} are no division of one layer")
        if not 0 <= self.rank <= TOP or (self.rank == 0) != (self.ranked == 0):
            raise ValueError(f"ranking reads {self.rank} planes of {self.ranked} rows")

    def counts(self, neurons: int) -> tuple[int, int, int]:
        """Neurons at int8, int4 and int3; each token has the same."""
        high = round(self.shares[0] * neurons)
        middle = round((self.shares[0] + self.shares[1]) * neurons) - high
        low = round(sum(self.shares) * neurons) - high - middle
        return high, middle, low

    def wanted(self, neurons: int) -> tuple[int, int, int]:
        """How many of the first neurons want plane 0, plane 1 and plane 2."""
        high, middle, low = self.counts(neurons)
        return high + middle + low, high + middle, high

    def capped(self, level: int) -> "Recipe":
        """The same where no more than `level` planes are at hand."""
        high, middle, low = self.shares
        if level < TOP:
            high, middle = 0.0, high + middle
        if level < TOP - 1:
            middle, low = 0.0, middle + low
        return Recipe(self.scorer, min(self.rank, level), self.ranked, (high, middle, low))

    def read_bytes(self, neurons: int, sizes: Sizes) -> int:
        """Bytes that the products of one token read, ranking included.

        Ranking reads its rows of all neurons. A neuron at the ranking's level or below keeps the values that ranking
        has found for those rows; one above it has them read again, with the planes that were missing.
        """
        total = neurons * self.ranked * sizes.row(self.rank)
        for level, count in zip((3, 2, 1), self.counts(neurons), strict=True):
            again = sizes.inward if level > self.rank else sizes.inward - self.ranked
            total += count * (again + 1) * sizes.row(level)
        return total


def exact_bytes(neurons: int, sizes: Sizes) -> int:
    """What int8 reads."""
    return neurons * sizes.neuron(TOP)


def fitted_recipe(recipe: Recipe, share: float, neurons: int, sizes: Sizes) -> Recipe | None:
    """`recipe` with as many neurons in the lowest level it uses as `share` of int8's bytes allow.

    None where even without them it reads more, or where there is not one neuron to give.
    """
    used = [place for place, part in enumerate(recipe.shares) if part > 0]
    if not used:
        return None
    last = used[-1]
    rest = sum(part for place, part in enumerate(recipe.shares) if place != last)

    def with_count(count: int) -> Recipe:
        shares = list(recipe.shares)
        shares[last] = count / neurons
        return Recipe(recipe.scorer, recipe.rank, recipe.ranked, (shares[0], shares[1], shares[2]))

    budget = share * exact_bytes(neurons, sizes)
    room = int(neurons * (1 - rest) + 1e-9)
    bare = with_count(0).read_bytes(neurons, sizes)
    each = (with_count(room).read_bytes(neurons, sizes) - bare) / max(room, 1)
    count = min(room, int((budget - bare) / each)) if each > 0 else 0
    while count > 0 and with_count(count).read_bytes(neurons, sizes) > budget:
        count -= 1  # roundings of the classes above
    return with_count(count) if count > 0 else None


def candidate_recipes(
    share: float, neurons: int, sizes: Sizes, scorers: Mapping[str, int], ranks: Iterable[int] = (1, 2)
) -> list[Recipe]:
    """Recipes that read at most `share` of int8's bytes and leave little of it unused.

    Args:
        share: of the bytes that int8 reads of a layer's neurons.
        neurons, sizes: of the layer.
        scorers: names, with the number of inward rows that each ranks by.
        ranks: planes to rank with.
    """
    found: dict[tuple[object, ...], Recipe] = {}
    for scorer, ranked in scorers.items():
        for rank, shares in product(ranks if ranked else (0,), _TEMPLATES):
            made = fitted_recipe(Recipe(scorer, rank, min(ranked, sizes.inward), shares), share, neurons, sizes)
            if made is not None:
                found[scorer, rank, made.counts(neurons)] = made
    full = 0.9 * share * exact_bytes(neurons, sizes)
    used = [recipe for recipe in found.values() if recipe.read_bytes(neurons, sizes) >= full]
    return used or list(found.values())


Option = TypeVar("Option")


def search(options: Sequence[Option], loss: Callable[[Option], float]) -> tuple[Option, float]:
    """The option of least measured loss.

    With the KL to the exact model as `loss` it is the direct search; with the predictive entropy of the outputs,
    -sum over tokens and vocabulary of p log p, it is M2Cache's (Algorithm 1, Equation 2), which needs no exact model.

    Raises:
        ValueError: there is no option.
    """
    if not options:
        raise ValueError("nothing to choose from")
    losses = [loss(option) for option in options]
    best = min(range(len(options)), key=losses.__getitem__)
    return options[best], losses[best]


def divide(
    losses: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float, start: int = 0
) -> list[int]:
    """Per layer, which of its options to take so that little is lost within a budget for all layers together.

    Greedy by loss saved per byte over each layer's lower convex hull: the multiple-choice knapsack's relaxation
    (Sinha and Zoltners, 1979), at most one step of one layer from its optimum.

    Args:
        losses: of each layer's options: what is lost there, in one measure for all layers.
        sizes: bytes of each.
        budget: bytes for all layers together.
        start: the option that every layer has at least: none smaller is taken, even if it loses less.
    """
    chosen = [start for _ in losses]
    left = budget - sum(size[start] for size in sizes)
    while True:
        steps = []
        for layer, now in enumerate(chosen):
            for other, size in enumerate(sizes[layer]):
                more = size - sizes[layer][now]
                saved = losses[layer][now] - losses[layer][other]
                if saved > 0 and more <= left and size >= sizes[layer][start]:
                    steps.append((float("inf") if more <= 0 else saved / more, -layer, other))
        if not steps:
            return chosen
        _, layer, other = max(steps)
        left -= sizes[-layer][other] - sizes[-layer][chosen[-layer]]
        chosen[-layer] = other


def share_slots(wanted: Sequence[Sequence[int]], widths: Sequence[int], neurons: int, budget: int) -> list[list[int]]:
    """Slots of each layer's planes within `budget` bytes: in proportion to what a token wants, at most all neurons.

    Args:
        wanted: neurons that a token wants, per layer and plane.
        widths: bytes of a neuron in each plane.
        neurons: of a layer.
        budget: bytes for all slots.
    """
    need = sum(count * widths[plane] for layer in wanted for plane, count in enumerate(layer))
    if not need or budget <= 0:
        return [[0 for _ in layer] for layer in wanted]
    factor = budget / need
    for _ in range(8):  # what one plane cannot use, since it has all neurons, the others get
        slots = [[min(neurons, int(factor * count)) for count in layer] for layer in wanted]
        used = sum(count * widths[plane] for layer in slots for plane, count in enumerate(layer))
        open_need = sum(
            count * widths[plane]
            for layer in wanted
            for plane, count in enumerate(layer)
            if int(factor * count) < neurons
        )
        if not open_need:
            break
        factor += (budget - used) / open_need
    while used > budget:  # roundings upwards of the last step
        layer, plane = max(
            ((a, b) for a, row in enumerate(slots) for b in range(len(row))), key=lambda at: slots[at[0]][at[1]]
        )
        slots[layer][plane] -= 1
        used -= widths[plane]
    return slots
