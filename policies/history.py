"""What a drafter has shown so far: how often its guesses were accepted, what it costs, how fast its rounds were."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from policies.acceptance import Acceptance
from policies.arrays import ArrayLike, Floats, IntArray, np
from policies.costs import DraftCosts
from policies.drafting import DrafterProfile, RoundPlan
from policies.throughput import RoundOutcome, ThroughputEstimator

_KEEP = 0.99  # weight of a round after another
_PULL_ALL, _PULL_SIZE = 4.0, 24.0  # tokens and rounds that a promise counts for, beside what was measured
_FADE, _LEAST = 64.0, 8.0  # unused rounds after which trials count half, and how many are kept nevertheless
_DEEPER, _LARGER = 2, 4  # times the depth and nodes of the last tree a tree may have: what more costs is a guess
_MEASURED = 2  # rounds, with passes if it takes any, after which a drafter that ends its trees is let to
_SURER = 1.5  # times as much must guesses promise: the surest ones are also those most overrated
_KNOWN = 3  # rounds, before which what a drafter brings is a guess


class DrafterHistory:
    """What a drafter has shown: acceptance, costs, and by size of tree what came of what both had promised.

    What was measured of a size is believed over the promise the more, the more rounds there were.

    Args:
        profile: what to think of the drafter before any round; of deeper rates than it has, the last row.
        ranks: of the table of acceptance.

    Attributes:
        acceptance, costs, throughput: as far as measured.
        rounds: that it drafted.
    """

    def __init__(self, profile: DrafterProfile, ranks: int) -> None:
        depth, nodes, prior = profile.max_depth, profile.max_nodes, None
        if profile.rates is not None:
            given = np.asarray(profile.rates, dtype=np.float64)[:depth, :ranks]
            prior = np.zeros((depth, ranks))
            prior[:, : given.shape[1]] = given[np.minimum(np.arange(depth), len(given) - 1)]
        self._first = profile
        self.acceptance = Acceptance(depth, ranks, prior)
        self.costs = DraftCosts((profile.start_s, profile.pass_s, profile.node_s))
        self.throughput = ThroughputEstimator()
        sizes = (depth.bit_length(), nodes.bit_length())
        self._tokens, self._seconds = np.zeros((2, *sizes)), np.zeros((2, *sizes))  # measured and promised
        self._depth = self._nodes = 1  # of the last tree that it was asked for
        self.rounds = self._last = 0

    @property
    def known(self) -> bool:
        """Whether there were rounds enough to know about what it brings."""
        return self.rounds >= _KNOWN

    def profile(self, verified: int) -> DrafterProfile:
        """The drafter as it is now known; the target has verified `verified` tokens in one pass at most."""
        depth = min(self._first.max_depth, self._depth * _DEEPER)
        nodes = min(self._first.max_nodes, min(self._nodes, verified) * _LARGER)
        start_s, pass_s, node_s = self.costs.estimate()
        return replace(
            self._first,
            start_s=start_s,
            pass_s=pass_s,
            node_s=node_s,
            rates=self.acceptance.rates()[:depth],
            correction=self.correction(depth, nodes),
            stretch=self.stretch(depth, nodes),
            max_depth=depth,
            max_nodes=nodes,
        )

    def seconds(self, passes: int, nodes: int) -> float:
        """That drafting so many nodes in so many passes is thought to take."""
        start_s, pass_s, node_s = self.costs.estimate()
        return start_s + pass_s * passes + node_s * nodes

    @property
    def ends_trees(self) -> bool:
        """Whether its trees end by themselves, and its costs are known, so that they can."""
        if not self._first.open_ended:
            return False
        return self.throughput.drafted >= _MEASURED if self._first.passes else self.rounds >= _MEASURED

    def by_floors(
        self, plan: RoundPlan, nodes: int, tokens_per_s: float, verify: Callable[[ArrayLike], Floats]
    ) -> RoundPlan:
        """The plan of a drafter whose trees end by themselves: as large as it likes, above floors.

        Args:
            plan: its best tree of a fixed size.
            nodes: at most.
            tokens_per_s: of the fastest that there is, which the floors are measured by.
            verify: seconds of the target's pass by its tokens.
        """
        usual = max(2.0, self.throughput.nodes)  # one more costs what it does at trees of this size
        less, more = verify([1 + usual / 2, 1 + usual * 3 / 2])
        draft_s = plan.seconds - float(verify(1 + plan.nodes))
        brought = self.throughput.enough(tokens_per_s, plan.gain, draft_s)
        tokens, seconds = self.throughput.round(1 + plan.gain, plan.seconds)
        return replace(
            plan,
            nodes=nodes,
            depth=self._first.max_depth,
            tokens_per_s=tokens / seconds,
            floor=float(more - less) / usual * tokens_per_s,
            grow_floor=self.costs.estimate()[1] * tokens_per_s,
            gain=0.0,
            seconds=seconds,
            enough=_SURER * brought if self.throughput.drafted >= _KNOWN else np.inf,
        )

    def observe(
        self,
        now: int,
        plan: RoundPlan,
        outcome: RoundOutcome,
        tried: ArrayLike | None = None,
        accepted: ArrayLike | None = None,
    ) -> None:
        """What came of a round: its number, its plan, and trials as of `Acceptance`, of any depth."""
        self.drafted(now, plan.depth, plan.nodes)
        self.costs.observe(outcome.passes, outcome.nodes, outcome.draft_s)
        if tried is not None and accepted is not None:
            depth = self._first.max_depth
            self.acceptance.observe(np.asarray(tried)[:depth], np.asarray(accepted)[:depth])
        self.throughput.observe(outcome, whole=plan.enough == np.inf)
        if plan.gain > 0:
            tokens, seconds = (outcome.emitted - 1, plan.gain), (outcome.seconds, plan.seconds)
            self.compare(plan.depth, plan.nodes, tokens, seconds)

    def drafted(self, now: int, depth: int, nodes: int) -> None:
        """It was asked for such a tree in round `now`; what was known counts less the longer it was not asked."""
        keep = 0.5 ** ((now - self._last - 1) / _FADE)
        if keep < 1:
            self.acceptance.fade(keep, _LEAST)
            self._tokens, self._seconds = self._tokens * keep, self._seconds * keep
        self._last, self.rounds = now, self.rounds + 1
        self._depth, self._nodes = depth, nodes

    def compare(self, depth: int, nodes: int, tokens: tuple[float, float], seconds: tuple[float, float]) -> None:
        """Tokens beyond the target's own, and seconds: measured and promised, of a tree that was asked for."""
        size = (slice(None), depth.bit_length() - 1, nodes.bit_length() - 1)
        self._tokens, self._seconds = self._tokens * _KEEP, self._seconds * _KEEP
        self._tokens[size] += tokens
        self._seconds[size] += seconds[0] / seconds[1], 1.0

    def correction(self, depth: int, nodes: int) -> Floats:
        """Tokens beyond the target's own over those that rates promise [depth, nodes]."""
        return _by_size(self._tokens, depth, nodes)

    def stretch(self, depth: int, nodes: int) -> Floats:
        """Seconds over those that costs promise [depth, nodes]."""
        return _by_size(self._seconds, depth, nodes)


def _by_size(sums: Floats, depth: int, nodes: int) -> Floats:
    """Measured over promised for each size, leaning on that of all sizes, which leans on 1."""
    measured, promised = sums
    overall = (_PULL_ALL + measured.sum()) / (_PULL_ALL + promised.sum())
    table = (_PULL_SIZE * overall + measured) / (_PULL_SIZE + promised)
    return np.asarray(table[_logarithms(depth)[:, None], _logarithms(nodes)])


@cache
def _logarithms(most: int) -> IntArray:
    """Of 1..most to base 2, rounded down."""
    return np.asarray(np.frexp(np.arange(1, most + 1))[1] - 1)
