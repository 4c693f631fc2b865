"""How large a tree to draft, how deep and by which drafter, or whether to draft at all.

A round costs drafting and one pass of the target over the root and the nodes; it emits the accepted nodes and one
token of the target's own. Wanted is the most tokens per second, as in the cost models of Sequoia (arXiv 2402.12374,
section 4.2), here from what the running machine shows.

Why there are floors: let S(x) be the seconds of a round with tree x, T(x) its tokens, and r the best T/S there is.
Then T(x) - r S(x) is at most 0 for all trees and 0 for the best (Dinkelbach, On nonlinear fractional programming,
1967). A node that is accepted with probability p, path included, adds p to T and its share s of the pass to S: the
tree is better for it where p > r s, wherever in the tree it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from policies.acceptance import RANKS, Acceptance, expected_tokens
from policies.arrays import ArrayLike, Floats, np


@dataclass(frozen=True, eq=False)
class DrafterProfile:
    """A drafter as far as it is known: its costs and how often its guesses are accepted.

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

    def within(self, max_nodes: int, max_depth: int) -> DrafterProfile:
        """The same of trees that are no larger."""
        return replace(self, max_nodes=min(self.max_nodes, max_nodes), max_depth=min(self.max_depth, max_depth))


@dataclass(frozen=True)
class RoundPlan:
    """What to do in the next round.

    Attributes:
        drafter: its index; None to pass without drafting.
        nodes, depth, width: of the tree, at most; see `SpeedUpTable`.
        tokens_per_s: expected.
        plain_tokens_per_s: expected without drafting.
        floor: a node whose path is accepted with less than this probability costs more than it brings.
        grow_floor: likewise a drafting pass.
        gain: tokens beyond the target's own that the rates promise, uncorrected.
        seconds: of the round that the costs promise, unstretched.
        exploration: to learn something, and not because it is thought best.
        enough: accepted tokens that a guess must promise for further passes of a drafting model to bring less than
            they cost; None where that is not known. Where it is, only the floors bound the tree.
    """

    drafter: int | None
    nodes: int
    depth: int
    width: int
    tokens_per_s: float
    plain_tokens_per_s: float
    floor: float = 0.0
    grow_floor: float = 0.0
    gain: float = 0.0
    seconds: float = 0.0
    exploration: bool = False
    enough: float | None = None


class SpeedUpTable:
    """Tokens and seconds of the best tree of each drafter, depth and node count.

    Args:
        drafters: who may draft.
        verify: seconds of the target's pass by the nodes it verifies, 0..max_nodes; 0 is a plain one.
        max_nodes, max_depth: of a tree.
        width: nodes of one depth that get children, and children of a node.

    Attributes:
        plain: the plan without drafting.

    Raises:
        ValueError: no drafter, a limit below 1, or seconds that are too few, not finite or not above 0.
    """

    def __init__(
        self, drafters: Sequence[DrafterProfile], verify: ArrayLike, *, max_nodes: int, max_depth: int, width: int
    ) -> None:
        if not drafters or min(max_nodes, max_depth, width) < 1:
            raise ValueError(
                f"{len(drafters)} drafters, {max_nodes} nodes, depth {max_depth}, width {width}; all from 1"
            )
        max_nodes = min(max_nodes, max(drafter.max_nodes for drafter in drafters))
        max_depth = min(max_depth, max(drafter.max_depth for drafter in drafters))
        self._verify = np.asarray(verify, dtype=np.float64)[: max_nodes + 1]
        if self._verify.shape != (max_nodes + 1,) or not (np.isfinite(self._verify) & (self._verify > 0)).all():
            raise ValueError(f"give seconds above 0 for passes over each of 0..{max_nodes} nodes")
        self._drafters, self._width = drafters, width
        self.plain = RoundPlan(None, 0, 0, width, *(1 / float(self._verify[0]),) * 2, seconds=float(self._verify[0]))
        self._gain = expected_tokens(_table(drafters, max_depth), max_nodes, width) - 1  # [drafter, depth, nodes]
        start, each, node = (
            np.array([getattr(drafter, name) for drafter in drafters])[:, None, None]
            for name in ("start_s", "pass_s", "node_s")
        )
        depths, nodes = np.arange(1, max_depth + 1)[:, None], np.arange(1, max_nodes + 1)
        self._seconds = start + each * depths + node * nodes + self._verify[1:]
        self._rate = np.zeros_like(self._gain)
        for place, drafter in enumerate(drafters):
            part = np.s_[: drafter.max_depth, : drafter.max_nodes]
            correction, stretch = (
                value if value.ndim == 0 else value[:max_depth, :max_nodes]
                for value in (np.asarray(drafter.correction), np.maximum(drafter.stretch, 1e-9))
            )
            tokens, taken = 1 + self._gain[place][part] * correction, self._seconds[place][part] * stretch
            self._rate[place][part] = tokens / taken

    def best(self, drafter: int, nodes: int | None = None) -> RoundPlan:
        """The fastest tree of a drafter, of any size or of so many nodes, even where a plain pass is faster."""
        if nodes is None:
            depth, place = np.unravel_index(int(self._rate[drafter].argmax()), self._rate[drafter].shape)
        else:
            depth, place = self._rate[drafter, :, nodes - 1].argmax(), np.intp(nodes - 1)
        return self._plan(drafter, int(depth) + 1, int(place) + 1)

    def largest(self, drafter: int) -> int:
        """Most nodes that a tree of a drafter may have now."""
        return min(self._drafters[drafter].max_nodes, len(self._verify) - 1)

    def _plan(self, drafter: int, depth: int, nodes: int) -> RoundPlan:
        at = (drafter, depth - 1, nodes - 1)
        rate, half = float(self._rate[at]), nodes // 2
        slope = max(0.0, float(self._verify[nodes] - self._verify[half])) / (nodes - half)
        return RoundPlan(
            *(drafter, nodes, depth, self._width, rate, self.plain.tokens_per_s),
            floor=slope * rate,
            grow_floor=self._drafters[drafter].pass_s * rate,
            gain=float(self._gain[at]),
            seconds=float(self._seconds[at]),
        )


def _table(drafters: Sequence[DrafterProfile], max_depth: int) -> Floats:
    """The rates of all drafters: [drafters, max_depth, most ranks], 0 where one has none."""
    parts = []
    for drafter in drafters:
        rates = (
            Acceptance(drafter.max_depth, RANKS).rates()
            if drafter.rates is None
            else np.asarray(drafter.rates, dtype=np.float64)
        )
        if rates.ndim != 2 or 0 in rates.shape:
            raise ValueError(f"{drafter.name}: rates of shape {rates.shape}; give [depths, ranks], one of each or more")
        parts.append(rates[: min(max_depth, drafter.max_depth)])
    table = np.zeros((len(drafters), max_depth, max(part.shape[1] for part in parts)))
    for place, part in enumerate(parts):
        table[place, : part.shape[0], : part.shape[1]] = part
    return table
