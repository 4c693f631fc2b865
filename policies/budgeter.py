"""Who drafts the next round and how much, from what the running machine shows; see `policies.drafting`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

from policies.acceptance import RANKS
from policies.arrays import ArrayLike, np
from policies.candidates import NOISE, PlanChoice, plan_choice
from policies.costs import PassCosts
from policies.drafting import DrafterProfile, RoundPlan
from policies.history import DrafterHistory
from policies.throughput import RoundOutcome

_SHARE = 0.01  # of all seconds: what may be lost by exploration, and by drafting that is slower than plain passes
_START = 2.0  # plain passes whose seconds may be lost at once: enough to try a drafter, too few to be noticed
_MOST = 16.0  # likewise after drafting has paid: bad luck for a dozen rounds does not end it, and no more is lost
_REPLAN = 16  # rounds between plans: one takes half a millisecond, which beside so many passes is nothing
_OUTLIER = 2.0  # seconds beyond so many times the expected ones are another program's doing


class Budgeter:
    """Decides round by round what to draft, and learns from what came of it. The same rounds give the same decisions.

    What is thought best is the fastest entry of the speed-up table (`SpeedUpTable`) that follows from all measured.
    *Exploration* is a round of something else, to learn from: a plain pass, another drafter, another size of tree.
    There is one rule for it: something is explored again when the seconds since it last was, times a small share, are
    worth what it is expected to lose against the best, so that all of it costs no more than that share of all seconds.
    What was faster than the best is explored again at once.

    The *budget* bounds what is lost against plain passes (a conservative bandit: Wu et al., arXiv 1602.04282, section
    3). It holds a few plain passes' seconds at first and grows by a share of all seconds; a drafted round takes from
    it the seconds by which it was slower than plain passes, or adds those by which it was faster. While it is empty,
    nothing is drafted. So drafting that is slower than plain passes costs a small share of all seconds at most.

    Args:
        drafters: their costs and rates are what to think before measuring; costs of 0 are unknown.
        max_nodes, max_depth, width: see `SpeedUpTable`.

    Raises:
        ValueError: no drafter, or a limit below 1.
    """

    def __init__(
        self, drafters: Sequence[DrafterProfile], *, max_nodes: int = 64, max_depth: int = 16, width: int = 8
    ) -> None:
        if not drafters or min(max_nodes, max_depth, width) < 1:
            raise ValueError(
                f"{len(drafters)} drafters, {max_nodes} nodes, depth {max_depth}, width {width}: all from 1"
            )
        self._histories = [DrafterHistory(drafter.within(max_nodes, max_depth), RANKS) for drafter in drafters]
        self._limits = {"max_nodes": max_nodes, "max_depth": max_depth, "width": width}
        self.shape = (max_depth, RANKS)
        self._verify = PassCosts()
        self._round = self._replan_at = 0
        self._clock_s = self._budget_s = 0.0
        self._explored_s: dict[tuple[int | None, bool], float] = {}  # the clock when each was last explored
        nothing = RoundPlan(None, 0, 0, width, 0.0, 0.0)
        self._candidates = PlanChoice(nothing, nothing)

    def renew(self) -> None:
        """Another text begins, in which another drafter may be the best: explore all of them."""
        for place in range(len(self._histories)):
            if place != self._candidates.best.drafter:
                self._explored_s.pop((place, False), None)

    def decide(self, room: int | None = None) -> RoundPlan:
        """What to do in the next round; `room` is how many tokens may still be emitted, where that is known."""
        if self._verify.largest and self._round >= self._replan_at:
            self._candidates = plan_choice(self._histories, self._verify, self._candidates.best.drafter, self._limits)
            drafts = self._candidates.best.drafter is not None  # else nothing new is seen until an exploration
            self._replan_at = self._round + min(_REPLAN, max(1, self._round // 4)) if drafts else sys.maxsize
        due = (replace(plan, exploration=True) for plan in self._candidates.others if self._due(plan))
        plan = next(due, self._candidates.plain if self._budget_s <= 0 else self._candidates.best)
        if room is None or plan.depth < room:
            return plan
        if room <= 1:  # the target's own token fills it
            return self._candidates.plain
        return replace(plan, depth=room - 1, gain=0.0)  # what it promised is void

    def observe(
        self,
        plan: RoundPlan,
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
            plan: what `decide` gave.
            draft_s, verify_s: seconds that drafting and the target's pass took.
            nodes: verified; 0 for a plain pass, or where the drafter had no guess.
            emitted: tokens.
            tried, accepted: by depth and rank, of `shape`; see `policies.acceptance.trials`.
            passes: that drafting really took; as many as the plan is deep if not given.

        Raises:
            ValueError: seconds or counts that cannot be.
        """
        if not 0 <= draft_s < np.inf or nodes < 0 or emitted < 1 or not -1 < (plan.drafter or 0) < len(self._histories):
            raise ValueError(f"drafting took {draft_s} s, {nodes} nodes gave {emitted} tokens; give what was measured")
        passes, seconds = plan.depth if passes is None else passes, draft_s + verify_s
        history = None if plan.drafter is None else self._histories[plan.drafter]
        if history is not None and history.known and seconds > _OUTLIER * plan.seconds:  # what it should have taken
            expected = history.seconds(passes, nodes) + float(self._verify.at(nodes + 1))
            seconds = min(seconds, _OUTLIER * max(expected, plan.seconds))
        self._verify.observe(nodes + 1, verify_s)
        self._round, self._clock_s = self._round + 1, self._clock_s + seconds
        if self._round == 1:
            self._budget_s = _START * seconds
        if history is not None:
            outcome = RoundOutcome(emitted, seconds, nodes, passes, draft_s, draft_s * seconds / (draft_s + verify_s))
            history.observe(self._round, plan, outcome, tried, accepted)
        if plan.plain_tokens_per_s:
            self._account(plan, seconds, emitted)

    def _account(self, plan: RoundPlan, seconds: float, emitted: int) -> None:
        """Keeps the budget, and the clock of what was explored."""
        plain_s = 1 / plan.plain_tokens_per_s
        lost_s = 0.0 if plan.drafter is None else seconds - emitted * plain_s
        self._budget_s = min(self._budget_s + _SHARE * seconds - lost_s, _MOST * plain_s)
        if plan.exploration:
            won = emitted / seconds > self._candidates.best.tokens_per_s
            self._explored_s[self._key(plan)] = -np.inf if won else self._clock_s
            self._replan_at = self._round

    def _key(self, plan: RoundPlan) -> tuple[int | None, bool]:
        """What is explored by a plan: plain passes, a drafter, or larger trees of the best one."""
        return plan.drafter, plan.drafter == self._candidates.best.drafter and plan.nodes > self._candidates.best.nodes

    def _due(self, plan: RoundPlan) -> bool:
        """Whether to explore a plan now; a drafter hardly known may bring nothing."""
        lost_s = max(plan.seconds * (1 - plan.tokens_per_s / self._candidates.best.tokens_per_s), NOISE * plan.seconds)
        waited_s = self._clock_s - self._explored_s.get(self._key(plan), -np.inf)
        known = plan.drafter is None or self._histories[plan.drafter].known
        if known and waited_s * _SHARE < lost_s * len(self._candidates.others):
            return False
        tokens = plan.tokens_per_s * plan.seconds if known else 1.0
        slower_s = plan.seconds - tokens / plan.plain_tokens_per_s
        return plan.drafter is None or self._budget_s > max(0.0, slower_s)
