"""Who drafts the next round and how much, from what the running machine shows; see `policies.drafting`.

Knows seconds, counts and rates; neither tokens nor models.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from policies.acceptance import PassCosts, Record
from policies.drafting import Arm, Choice, SpeedUpTable
from policies.throughput import ThroughputEstimator

_SWITCH = 1.03  # another drafter must promise this much more than the one in use
_LOOKS, _DRAFTS = 0.01, 0.005  # of all seconds: what looks may cost, and drafting that is slower than plain passes
_START = 2.0  # plain passes' seconds that these purses hold at first
_BANK, _WON = 7.0, 16.0  # likewise at most (and at least, below zero): the purse for looks, and that for drafting
_CHARGED = 2.0  # of what a round was thought to take, at most, is charged: a disturbance is nobody's fault
_FIRST_NODES, _FIRST_DEPTH, _GROWTH = 4, 2, 4  # a tree is at most so much larger than any before
_REPLAN, _LONGEST = 16, 128  # rounds between plans (twice that of plain ones), and between looks
_NEAR = 0.9  # looks come oftener at what is as fast as this share of the best
_ANEW = 8  # rounds between looks at a drafter when a text begins, at most
_PLAN_S = 0.4  # at least between plans while passes are plain: a plan takes about a millisecond
_MEASURED = 2  # rounds, with passes if it takes any, after which an open-ended drafter's costs are known
_SURER = 1.5  # times as much must guesses promise: the surest ones are also those most overrated
_WHOLE = 5  # rounds with passes before cheaper guesses may take their place
_OUTLIER = 3.0  # seconds above so many times the expected ones are a disturbance, unless they come twice


class Budgeter:
    """Decides round by round what to draft, and learns from what came of it. The same rounds give the same decisions.

    What is thought best is what `choose` finds with what was measured. Now and then it looks elsewhere: at another
    drafter, a plain pass, a few more or fewer nodes, ever less often where that does not pay. Two purses bound the
    loss, each filled with a share of all seconds and a few plain passes at first: one pays for the seconds by which
    looks were slower than the best; the other for those by which any drafting was slower than plain passes (a
    conservative bandit: Wu et al., arXiv 1602.04282, section 3), and is filled up again by drafting that pays. While
    a purse is empty, what it pays for is not done, but for plain passes, which all promises are measured by.

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
        self._paces = [ThroughputEstimator() for _ in arms]
        self._dues, self._gaps = [0] * len(arms), [1] * len(arms)
        self._limits = {"max_nodes": max_nodes, "max_depth": max_depth, "width": width}
        self.shape = (max_depth, ranks)
        self._verify = PassCosts()
        self._round = self._plan_at = self._plain_due = 0
        self._plain_gap, self._size_due, self._size_gap, self._wider, self._slow = 4, 0, 8, True, False
        self._looks_s = self._drafts_s = self._since_s = 0.0  # the purses, and the time since the last plan
        self._offers: SpeedUpTable | None = None
        self._best = Choice(None, 0, 0, width, 0.0, 0.0)
        self._tops: list[Choice] = []
        self._known: dict[int, tuple[tuple[int, int], Arm]] = {}

    def renew(self) -> None:
        """Another text begins, in which another drafter may be the best: what was looked at rarely is due sooner."""
        self._gaps = [min(gap, _ANEW) for gap in self._gaps]
        self._dues = [min(due, self._round + gap) for due, gap in zip(self._dues, self._gaps, strict=True)]

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
        due = self._round >= self._plan_at and (self._best.arm is not None or self._since_s >= _PLAN_S)
        if self._offers is None or due:
            self._offers, self._since_s = self._plan(), 0.0
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
        charged = seconds = draft_s + verify_s
        passes, usual = choice.depth if passes is None else passes, choice.seconds
        if choice.arm is not None and self._verify.largest and seconds > _CHARGED * usual:  # a larger tree, maybe
            start, each, node = self._costs(choice.arm)
            usual = max(usual, start + each * passes + node * nodes + float(self._verify.at(nodes + 1)))
        self._verify.observe(nodes + 1, verify_s)
        self._round, self._since_s = self._round + 1, self._since_s + seconds
        if self._round == 1:
            self._looks_s = self._drafts_s = _START * verify_s
        if choice.arm is not None:
            record, size = self._records[choice.arm], (choice.depth, choice.nodes)
            record.drafted(self._round, *size)
            record.costs.observe(passes, nodes, draft_s)
            if tried is not None and accepted is not None:
                depth = self._arms[choice.arm].max_depth
                record.acceptance.observe(np.asarray(tried)[:depth], np.asarray(accepted)[:depth])
            slow = record.rounds > 3 and seconds > _OUTLIER * usual
            if slow and not self._slow:
                seconds = _OUTLIER * usual
            if slow:
                self._plan_at, self._since_s = self._round, np.inf
            self._slow = slow
            whole = choice.enough == np.inf
            draft_s *= seconds / (draft_s + verify_s)  # a disturbance counts as much less there
            self._paces[choice.arm].observe(emitted, seconds, nodes, passes, draft_s, whole=whole)
            if choice.gain > 0:
                record.compare(*size, (emitted - 1, choice.gain), (seconds, choice.seconds))
            if record.rounds > 3:  # else nothing was to be expected
                charged = min(seconds, _CHARGED * usual)
        self._pay(choice, charged, emitted)
        if choice.look:
            self._settle(choice, seconds - emitted / self._best.tokens_per_s)

    def _arm(self, place: int) -> Arm:
        """A drafter as it is now known."""
        arm, record = self._arms[place], self._records[place]
        state = (record.rounds, self._verify.largest)
        if place in self._known and self._known[place][0] == state:
            return self._known[place][1]
        depth = min(arm.max_depth, max(_FIRST_DEPTH, record.depth * 2))
        nodes = min(arm.max_nodes, max(_FIRST_NODES, min(record.nodes, self._verify.largest) * _GROWTH))
        found = Arm(
            *(arm.name, *self._costs(place), record.acceptance.rates()[:depth]),
            correction=record.correction(depth, nodes),
            stretch=record.stretch(depth, nodes),
            max_depth=depth,
            max_nodes=nodes,
        )
        self._known[place] = (state, found)
        return found

    def _costs(self, place: int) -> tuple[float, float, float]:
        """Seconds of a proposal, of a drafting pass and of a node: measured, or what to think before."""
        return self._records[place].costs.estimate()

    def _plan(self) -> SpeedUpTable:
        """Finds what is best now."""
        arms = [self._arm(place) for place in range(len(self._arms))]
        most = max(arm.max_nodes for arm in arms)
        offers = SpeedUpTable(arms, self._verify.at(np.arange(1, most + 2)), **self._limits)
        self._tops = self._best_of_each(offers, [arm.pass_s for arm in arms])
        best, margin = max(self._tops, key=lambda choice: choice.tokens_per_s), _SWITCH
        if self._best.arm is not None:
            used, margin = self._tops[self._best.arm], 1.0
            best = best if best.tokens_per_s > used.tokens_per_s * _SWITCH else used
        self._best = best if best.tokens_per_s > offers.plain.tokens_per_s * margin else offers.plain
        longest = _REPLAN if self._best.arm is not None else 2 * _REPLAN  # plain passes tell little that is new
        self._plan_at = self._round + min(longest, max(1, self._round // 4))
        return offers

    def _best_of_each(self, offers: SpeedUpTable, passes: Sequence[float]) -> list[Choice]:
        """What is best of each drafter: a size of tree, or if it ends trees by itself the largest, under floors."""
        tops = [offers.best(place) for place in range(len(self._arms))]
        known = [
            place for place, arm in enumerate(self._arms) if arm.open_ended and self._measured(place, passes[place])
        ]
        rounds = {place: self._paces[place].round(1 + tops[place].gain, tops[place].seconds) for place in known}
        rate = max([tokens / seconds for tokens, seconds in rounds.values()], default=0.0)
        rate = max(rate, offers.plain.tokens_per_s)
        for place, (tokens, seconds) in rounds.items():
            pace = self._paces[place]
            usual = max(2.0, pace.nodes)  # one more costs what it does at trees of this size
            draft_s = tops[place].seconds - float(self._verify.at(1 + tops[place].nodes))
            enough = _SURER * pace.enough(rate, tops[place].gain, draft_s) if pace.drafted >= _WHOLE else np.inf
            less, more = self._verify.at([1 + usual / 2, 1 + usual * 3 / 2])
            tops[place] = replace(
                tops[place],
                nodes=offers.largest(place),
                depth=self._arms[place].max_depth,
                tokens_per_s=tokens / seconds,
                floor=float(more - less) / usual * rate,
                grow_floor=passes[place] * rate,
                gain=0.0,
                seconds=seconds,
                enough=enough,
            )
        return tops

    def _measured(self, place: int, pass_s: float) -> bool:
        """Whether an open-ended drafter's costs are known; `pass_s` as estimated."""
        if not self._arms[place].passes:
            return self._records[place].rounds >= _MEASURED
        return pass_s > 0 and self._tried(place)

    def _tried(self, place: int) -> bool:
        """Whether a drafter's passes were measured."""
        return self._paces[place].drafted >= _MEASURED

    def _look(self, offers: SpeedUpTable) -> Choice | None:
        """A choice to learn from, if one is due and can be paid for."""
        if self._best.arm is not None and self._plain_due <= self._round:  # whatever is in the purses
            return replace(offers.plain, look=True)
        due = [place for place, due in enumerate(self._dues) if place != self._best.arm and due <= self._round]
        wanted = sorted((self._other(place) for place in due), key=lambda choice: -choice.tokens_per_s)
        if self._best.arm is not None and self._size_due <= self._round:
            wanted += self._beside(self._best, offers)
        found = next((choice for choice in wanted if self._affords(choice)), None)
        return None if found is None else replace(found, look=True)

    def _other(self, place: int) -> Choice:
        """What to look at of a drafter that is not the best one; every other time what its passes bring."""
        top = self._tops[place]
        passes = top.enough is not None and self._tried(place) and self._records[place].rounds % 2 == 0
        return replace(top, enough=np.inf) if passes else top

    def _beside(self, best: Choice, offers: SpeedUpTable) -> list[Choice]:
        """Another size of the best drafter's tree; or if its size is its own, passes where guesses would do."""
        assert best.arm is not None
        if best.enough is not None:
            return [replace(best, enough=np.inf)] if best.enough < np.inf else []
        sizes = [best.nodes * 2 // 3, max(best.nodes + 1, best.nodes * 3 // 2)]
        if not 1 <= sizes[self._wider] <= offers.largest(best.arm):
            self._wider = not self._wider
        nodes = sizes[self._wider]
        return [offers.best(best.arm, nodes)] if 1 <= nodes <= offers.largest(best.arm) else []

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
        looks, drafts = self._looks_s + _LOOKS * seconds, self._drafts_s + _DRAFTS * seconds
        if choice.look:
            looks -= seconds - emitted / self._best.tokens_per_s
        if choice.arm is not None:
            drafts -= seconds - emitted / choice.plain_tokens_per_s
        plain_s = 1 / choice.plain_tokens_per_s
        self._looks_s = min(max(looks, -_BANK * plain_s), _BANK * plain_s)
        self._drafts_s = min(max(drafts, -_BANK * plain_s), _WON * plain_s)

    def _settle(self, choice: Choice, lost_s: float) -> None:
        """When to look at the same again: sooner where it was faster than what is thought best."""
        won = lost_s < 0
        self._plan_at = min(self._plan_at, self._round + min(4, self._round // 8))
        self._since_s = np.inf if won else self._since_s
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
            self._gaps[place] = _gap(self._gaps[place], won, longest)
            self._dues[place] = self._round + (0 if won else self._gaps[place])


def _gap(gap: int, won: bool, longest: int) -> int:
    return max(1, gap // 2) if won else min(gap * 2, longest)
