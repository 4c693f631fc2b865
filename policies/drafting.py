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
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from policies.acceptance import Acceptance, Floats, PassCosts, Record, expected_tokens

_SWITCH = 1.03  # another drafter must promise this much more than the one in use
_SHARE, _START, _BANK = 0.01, 5.0, 10.0  # of all seconds, and in plain passes: what looking around may cost
_FIRST_NODES, _FIRST_DEPTH, _GROWTH = 4, 2, 4  # a tree is at most so much larger than any before
_REPLAN, _LONGEST = 16, 128  # rounds between plans, and between looks
_NEAR, _KNOWN = 0.9, 8  # looks come oftener at what is as fast as this share of the best, or had fewer rounds
_OUTLIER = 3.0  # seconds above so many times the expected ones are a disturbance, unless they come twice


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

    def __post_init__(self) -> None:
        costs = np.array([self.start_s, self.pass_s, self.node_s])
        if not (np.isfinite(costs) & (costs >= 0)).all():
            raise ValueError(f"{self.name}: costs of {costs.tolist()} s; give seconds of 0 or more")
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
    offers = _Offers(arms, verify, max_nodes=max_nodes, max_depth=max_depth, width=width)
    best = max((offers.best(arm) for arm in range(len(arms))), key=lambda choice: choice.tokens_per_s)
    return best if best.tokens_per_s > offers.plain.tokens_per_s else offers.plain


class _Offers:
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


class Budgeter:
    """Decides round by round what to draft, and learns from what came of it. The same rounds give the same decisions.

    What is thought best is what `choose` finds with what was measured. Now and then it looks elsewhere: at another
    drafter, a plain pass, a few more or fewer nodes, ever less often where that does not pay. Two purses bound the
    loss, each filled with 1 % of all seconds and a few plain passes at first: one pays for the seconds by which
    looks were slower than the best; the other for those by which any drafting was slower than plain passes (a
    conservative bandit: Wu et al., arXiv 1602.04282, section 3), and is filled up again by drafting that pays. While
    a purse is empty, what it pays for is not done.

    Args:
        arms: the drafters. Their costs and rates are what to think before measuring; costs of 0 are unknown.
        max_nodes, max_depth, width: see `choose`.
        ranks: of the table of acceptance.

    Raises:
        ValueError: no arm, or a limit below 1.
    """

    def __init__(
        self, arms: Sequence[Arm], *, max_nodes: int = 64, max_depth: int = 16, width: int = 8, ranks: int = 8
    ) -> None:
        if not arms or min(max_nodes, max_depth, width, ranks) < 1:
            raise ValueError(f"{len(arms)} drafters, {max_nodes} nodes, depth {max_depth}, width {width}; all from 1")
        self._arms = [
            replace(a, max_nodes=min(a.max_nodes, max_nodes), max_depth=min(a.max_depth, max_depth)) for a in arms
        ]
        self._records = [
            Record(a.max_depth, a.max_nodes, ranks, (a.start_s, a.pass_s, a.node_s), a.rates) for a in self._arms
        ]
        self._dues, self._gaps = [0] * len(arms), [1] * len(arms)
        self._limits = {"max_nodes": max_nodes, "max_depth": max_depth, "width": width}
        self.shape = (max_depth, ranks)
        self._verify = PassCosts()
        self._round = self._plan_at = self._plain_due = 0
        self._plain_gap, self._size_due, self._size_gap, self._wider, self._slow = 4, 0, 8, True, False
        self._looks_s = self._drafts_s = 0.0  # the purses
        self._offers: _Offers | None = None
        self._best = Choice(None, 0, 0, width, 0.0, 0.0)
        self._tops: list[Choice] = []
        self._known: dict[int, tuple[tuple[int, int], Arm]] = {}

    def decide(self, room: int | None = None) -> Choice:
        """What to do in the next round; `room` is how many tokens may still be emitted, where that is known."""
        choice = self._decide()
        if room is None or choice.depth < room:
            return choice
        if room <= 1:  # the target's own token fills it
            rate = self._best.plain_tokens_per_s
            return Choice(None, 0, 0, self._limits["width"], rate, rate)
        return replace(choice, depth=room - 1, gain=0.0)  # what it promised is void

    def _decide(self) -> Choice:
        if not self._verify.largest:
            return self._best
        if self._offers is None or self._round >= self._plan_at:
            self._offers = self._plan()
        look = self._look(self._offers)
        if look is None and self._best.arm is not None and self._drafts_s <= 0:
            return self._offers.plain
        return look or self._best

    def observe(
        self,
        choice: Choice,
        draft_s: float,
        verify_s: float,
        nodes: int,
        emitted: int,
        tried: ArrayLike | None = None,
        accepted: ArrayLike | None = None,
        passes: int | None = None,
    ) -> None:
        """What came of a round.

        Args:
            choice: what `decide` gave.
            draft_s, verify_s: seconds that drafting and the target's pass took.
            nodes: verified; 0 for a plain pass, or where the drafter had no guess.
            emitted: tokens.
            tried, accepted: by depth and rank, of `shape`; see `policies.acceptance.trials`.
            passes: that drafting really took; as many as the choice is deep if not given.

        Raises:
            ValueError: seconds or counts that cannot be.
        """
        if not 0 <= draft_s < np.inf or nodes < 0 or emitted < 1 or not -1 < (choice.arm or 0) < len(self._arms):
            raise ValueError(f"drafting took {draft_s} s, {nodes} nodes gave {emitted} tokens; give what was measured")
        self._verify.observe(nodes + 1, verify_s)
        self._round += 1
        if self._round == 1:
            self._looks_s = self._drafts_s = _START * verify_s
        seconds = draft_s + verify_s
        if choice.arm is not None:
            record, size = self._records[choice.arm], (choice.depth, choice.nodes)
            record.drafted(self._round, *size)
            record.costs.observe(choice.depth if passes is None else passes, nodes, draft_s)
            if tried is not None and accepted is not None:
                depth = self._arms[choice.arm].max_depth
                record.acceptance.observe(np.asarray(tried)[:depth], np.asarray(accepted)[:depth])
            slow = record.rounds > 3 and seconds > _OUTLIER * choice.seconds
            if slow and not self._slow:
                seconds = _OUTLIER * choice.seconds
            self._slow, self._plan_at = slow, self._round if slow else self._plan_at
            if choice.gain > 0:
                record.compare(*size, (emitted - 1, choice.gain), (seconds, choice.seconds))
        self._pay(choice, seconds, emitted)
        if choice.look:
            self._settle(choice, emitted > seconds * self._best.tokens_per_s)

    def _arm(self, place: int) -> Arm:
        """A drafter as it is now known."""
        arm, record = self._arms[place], self._records[place]
        state = (record.rounds, self._verify.largest)
        if place in self._known and self._known[place][0] == state:
            return self._known[place][1]
        depth = min(arm.max_depth, max(_FIRST_DEPTH, record.depth * 2))
        nodes = min(arm.max_nodes, max(_FIRST_NODES, min(record.nodes, self._verify.largest) * _GROWTH))
        found = Arm(
            *(arm.name, *record.costs.estimate(), record.acceptance.rates()[:depth]),
            correction=record.correction(depth, nodes),
            stretch=record.stretch(depth, nodes),
            max_depth=depth,
            max_nodes=nodes,
        )
        self._known[place] = (state, found)
        return found

    def _plan(self) -> _Offers:
        """Finds what is best now."""
        arms = [self._arm(place) for place in range(len(self._arms))]
        most = max(arm.max_nodes for arm in arms)
        offers = _Offers(arms, self._verify.at(np.arange(1, most + 2)), **self._limits)
        self._tops = [offers.best(place) for place in range(len(arms))]
        best, margin = max(self._tops, key=lambda choice: choice.tokens_per_s), _SWITCH
        if self._best.arm is not None:
            used, margin = self._tops[self._best.arm], 1.0
            best = best if best.tokens_per_s > used.tokens_per_s * _SWITCH else used
        self._best = best if best.tokens_per_s > offers.plain.tokens_per_s * margin else offers.plain
        self._plan_at = self._round + min(_REPLAN, max(1, self._round // 4))
        return offers

    def _look(self, offers: _Offers) -> Choice | None:
        """A choice to learn from, if one is due and can be paid for."""
        due = [place for place, due in enumerate(self._dues) if place != self._best.arm and due <= self._round]
        wanted = sorted((self._tops[place] for place in due), key=lambda choice: -choice.tokens_per_s)
        if self._best.arm is not None:
            if self._plain_due <= self._round:
                wanted.append(offers.plain)
            nodes = self._best.nodes
            nodes = max(nodes + 1, nodes * 3 // 2) if self._wider else nodes * 2 // 3
            if self._size_due <= self._round and 1 <= nodes <= offers.largest(self._best.arm):
                wanted.append(offers.best(self._best.arm, nodes))
        found = next((choice for choice in wanted if self._affords(choice)), None)
        return None if found is None else replace(found, look=True)

    def _affords(self, choice: Choice) -> bool:
        """Whether the purses hold what a look is expected to lose; a drafter hardly known may bring nothing."""
        tokens = choice.tokens_per_s * choice.seconds
        if choice.arm is not None and self._records[choice.arm].rounds < 3:
            tokens = 1.0
        loss = choice.seconds - tokens / self._best.tokens_per_s
        drafting = 0.0 if choice.arm is None else choice.seconds - tokens / choice.plain_tokens_per_s
        return loss <= self._looks_s and drafting <= self._drafts_s

    def _pay(self, choice: Choice, seconds: float, emitted: int) -> None:
        """Fills the purses, and takes from them what the round lost."""
        if not choice.plain_tokens_per_s:
            return
        bank = _BANK / choice.plain_tokens_per_s
        looks, drafts = (purse + _SHARE * seconds for purse in (self._looks_s, self._drafts_s))
        if choice.look:
            looks -= seconds - emitted / self._best.tokens_per_s
        if choice.arm is not None:
            drafts -= seconds - emitted / choice.plain_tokens_per_s
        self._looks_s, self._drafts_s = min(looks, bank), min(drafts, bank)

    def _settle(self, choice: Choice, won: bool) -> None:
        """When to look at the same again: sooner where it was faster than what is thought best."""
        self._plan_at = min(self._plan_at, self._round + min(4, self._round // 8))
        near = choice.tokens_per_s > _NEAR * self._best.tokens_per_s
        longest = _LONGEST // 8 if near else _LONGEST
        if choice.arm is None:
            self._plain_gap = _gap(self._plain_gap, won, longest)
            self._plain_due = self._round + self._plain_gap
        elif choice.arm == self._best.arm:
            self._size_gap = _gap(self._size_gap, won, longest)
            self._size_due, self._wider = self._round + self._size_gap, self._wider == won
        else:
            place = choice.arm
            longest = longest if self._records[place].rounds > _KNOWN else 2
            self._gaps[place] = _gap(self._gaps[place], won, longest)
            self._dues[place] = self._round + (0 if won else self._gaps[place])


def _gap(gap: int, won: bool, longest: int) -> int:
    return max(1, gap // 2) if won else min(gap * 2, longest)
