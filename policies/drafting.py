"""How large a tree to draft, how deep and by which drafter, or whether to draft at all.

A round costs drafting and one pass of the target over the root and the nodes; it emits the accepted nodes and one
token of the target's own. Wanted is the most tokens per second, as in the cost models of Sequoia (arXiv 2402.12374,
section 4.2), here from what the running machine shows. Knows seconds, counts and rates; neither tokens nor models.

Why there are floors: let S(x) be the seconds of a round with tree x, T(x) its tokens, and r the best T/S there is.
Then T(x) - r S(x) is at most 0 for all trees and 0 for the best (Dinkelbach, On nonlinear fractional programming,
1967). A node that is accepted with probability p, path included, adds p to T and its share s of the pass to S: the
tree is better for it where p > r s, wherever in the tree it stands.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from policies.acceptance import Acceptance, Floats, expected_tokens


@dataclass(frozen=True, eq=False)
class Arm:
    """A drafter as it is chosen.

    Attributes:
        name: of the drafter.
        start_s: seconds of a proposal, whatever its size.
        pass_s: of a drafting pass; each depth takes one.
        node_s: of a node.
        rates: [depths, ranks], how often the child of a rank is accepted once its parent is; None for a guess.
        correction: tokens measured beyond the target's own, over those that the rates promise; one for all, or
            [max_depth, max_nodes] (by the tree's depth and nodes).
        stretch: seconds of rounds measured over those that the costs promise, likewise.
        max_depth, max_nodes: of its trees.
        open_ended: its trees end by themselves where the floors say so; it may be asked for the largest.
        passes: drafting takes passes of a model.

    Raises:
        ValueError: something is negative, not finite, or of a shape that does not fit.
    """

    name: str
    start_s: float = 0.0
    pass_s: float = 0.0
    node_s: float = 0.0
    rates: ArrayLike | None = None
    correction: ArrayLike = 1.0
    stretch: ArrayLike = 1.0
    max_depth: int = 16
    max_nodes: int = 64
    open_ended: bool = False
    passes: bool = True

    def __post_init__(self) -> None:
        costs = np.array([self.start_s, self.pass_s, self.node_s])
        if not (np.isfinite(costs) & (costs >= 0)).all():
            raise ValueError(f"{self.name}: costs of {costs.tolist()}; give seconds of 0 or more")
        if self.max_depth < 1 or self.max_nodes < 1:
            raise ValueError(f"{self.name}: trees of {self.max_nodes} nodes and depth {self.max_depth}; leave it out")
        for name in ("correction", "stretch"):
            part = np.asarray(getattr(self, name), dtype=np.float64)
            if not (np.isfinite(part) & (part >= 0)).all() or part.shape not in ((), (self.max_depth, self.max_nodes)):
                raise ValueError(f"{self.name}: {name} must be 0 or more, one or [max_depth, max_nodes]")


@dataclass(frozen=True)
class Choice:
    """What to do in the next round.

    Attributes:
        arm: index of the drafter; None to pass without drafting.
        nodes, depth, width: of the tree, at most; see `choose`.
        tokens_per_s: expected.
        plain_tokens_per_s: expected without drafting.
        floor: a node whose path is accepted with less than this probability costs more than it brings.
        grow_floor: likewise a drafting pass.
        gain: tokens beyond the target's own that the rates promise, uncorrected.
        seconds: of the round that the costs promise, unstretched.
        look: chosen to learn something and not because it is thought best.
        enough: accepted tokens that a guess must promise for further passes of a drafting model to bring less than
            they cost; None where that is not known. Where it is, only the floors bound the tree.
    """

    arm: int | None
    nodes: int
    depth: int
    width: int
    tokens_per_s: float
    plain_tokens_per_s: float
    floor: float = 0.0
    grow_floor: float = 0.0
    gain: float = 0.0
    seconds: float = 0.0
    look: bool = False
    enough: float | None = None


def choose(
    arms: Sequence[Arm],
    verify: Callable[[int], float] | ArrayLike,
    *,
    max_nodes: int,
    max_depth: int,
    width: int = 8,
) -> Choice:
    """The drafter and the size of tree with the most tokens per second.

    Args:
        arms: the drafters.
        verify: seconds of the target's pass by the nodes it verifies, 0 for a plain one: a function, or the seconds
            at 0..max_nodes.
        max_nodes, max_depth: of a tree.
        width: nodes of one depth that get children, and children of a node.

    Returns:
        The choice; a plain one unless a tree is faster.

    Raises:
        ValueError: no arm, a limit below 1, or seconds that are too few, not finite or not above 0.
    """
    offers = SpeedUpTable(arms, verify, max_nodes=max_nodes, max_depth=max_depth, width=width)
    best = max((offers.best(arm) for arm in range(len(arms))), key=lambda choice: choice.tokens_per_s)
    return best if best.tokens_per_s > offers.plain.tokens_per_s else offers.plain


class SpeedUpTable:
    """Tokens and seconds of the best tree of each drafter, depth and node count; arguments as of `choose`."""

    def __init__(
        self,
        arms: Sequence[Arm],
        verify: Callable[[int], float] | ArrayLike,
        *,
        max_nodes: int,
        max_depth: int,
        width: int,
    ) -> None:
        if not arms or min(max_nodes, max_depth, width) < 1:
            raise ValueError(f"{len(arms)} drafters, {max_nodes} nodes, depth {max_depth}, width {width}; all from 1")
        max_nodes = min(max_nodes, max(arm.max_nodes for arm in arms))
        max_depth = min(max_depth, max(arm.max_depth for arm in arms))
        seconds = [verify(nodes) for nodes in range(max_nodes + 1)] if callable(verify) else verify
        self._verify = np.asarray(seconds, dtype=np.float64)[: max_nodes + 1]
        if self._verify.shape != (max_nodes + 1,) or not (np.isfinite(self._verify) & (self._verify > 0)).all():
            raise ValueError(f"give seconds above 0 for passes over each of 0..{max_nodes} nodes")
        self._arms, self._width = arms, width
        self.plain = Choice(None, 0, 0, width, *(1 / float(self._verify[0]),) * 2, seconds=float(self._verify[0]))
        self._gain = expected_tokens(_table(arms, max_depth), max_nodes, width) - 1  # [arm, depth, nodes]
        start, each, node = (
            np.array([getattr(arm, name) for arm in arms])[:, None, None] for name in ("start_s", "pass_s", "node_s")
        )
        depths, nodes = np.arange(1, max_depth + 1)[:, None], np.arange(1, max_nodes + 1)
        self._seconds = start + each * depths + node * nodes + self._verify[1:]
        self._rate = np.zeros_like(self._gain)
        for place, arm in enumerate(arms):
            part = np.s_[: arm.max_depth, : arm.max_nodes]
            correction, stretch = (
                value if value.ndim == 0 else value[:max_depth, :max_nodes]
                for value in (np.asarray(arm.correction), np.maximum(arm.stretch, 1e-9))
            )
            tokens, taken = 1 + self._gain[place][part] * correction, self._seconds[place][part] * stretch
            self._rate[place][part] = tokens / taken

    def best(self, arm: int, nodes: int | None = None) -> Choice:
        """The fastest tree of an arm, of any size or of so many nodes, even where a plain pass is faster."""
        if nodes is None:
            depth, place = np.unravel_index(int(self._rate[arm].argmax()), self._rate[arm].shape)
        else:
            depth, place = self._rate[arm, :, nodes - 1].argmax(), np.intp(nodes - 1)
        return self._choice(arm, int(depth) + 1, int(place) + 1)

    def largest(self, arm: int) -> int:
        """Most nodes that a tree of an arm may have now."""
        return min(self._arms[arm].max_nodes, len(self._verify) - 1)

    def _choice(self, arm: int, depth: int, nodes: int) -> Choice:
        at = (arm, depth - 1, nodes - 1)
        rate, half = float(self._rate[at]), nodes // 2
        slope = max(0.0, float(self._verify[nodes] - self._verify[half])) / (nodes - half)
        return Choice(
            *(arm, nodes, depth, self._width, rate, self.plain.tokens_per_s),
            floor=slope * rate,
            grow_floor=self._arms[arm].pass_s * rate,
            gain=float(self._gain[at]),
            seconds=float(self._seconds[at]),
        )


def _table(arms: Sequence[Arm], max_depth: int) -> Floats:
    """The rates of all arms: [arms, max_depth, most ranks], 0 where an arm has none."""
    parts = []
    for arm in arms:
        rates = Acceptance(arm.max_depth, 8).rates() if arm.rates is None else np.asarray(arm.rates, dtype=np.float64)
        if rates.ndim != 2 or 0 in rates.shape:
            raise ValueError(f"{arm.name}: rates of shape {rates.shape}; give [depths, ranks], one of each or more")
        parts.append(rates[: min(max_depth, arm.max_depth)])
    table = np.zeros((len(arms), max_depth, max(part.shape[1] for part in parts)))
    for place, part in enumerate(parts):
        table[place, : part.shape[0], : part.shape[1]] = part
    return table
