"""Who drafts for an attached model, and how much: its drafters, the budgeter that chooses among them, and the account.

Knows drafters and the policy; nothing of the target but what feedback says. Lives as long as the model is attached, so
what was learnt of costs and acceptance serves the next call as well.

Ordering: while the target verifies, drafters that ask for it are called in one thread of their own, which ends before
anything else is asked of them.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from policies.acceptance import trials
from policies.budgeter import Budgeter
from policies.drafting import RoundPlan
from tiercache.draft.base import Context, Drafter, Feedback, TreeBudget, joined
from tiercache.draft.tree import ROOT, DraftTree
from tiercache.stats import DraftStats

_AT_ONCE = 64  # plain passes that drafters are told of together, at most
_NOTHING = DraftTree()


@dataclass(frozen=True)
class Round:
    """One tree and what came of it.

    Attributes:
        plan: what it was drafted under.
        passes: that drafting it took.
        feedback: what was verified and emitted, with all rows of logits.
        draft_s, verify_s: seconds of proposing, and of the target's pass with its walk.
        began_s: the clock at its start.
    """

    plan: RoundPlan
    passes: int
    feedback: Feedback
    draft_s: float
    verify_s: float
    began_s: float


class DrafterScheduler:
    """See the module.

    Args:
        drafters: who may draft.
        budgeter: chooses among them for each round; None to always use `fixed`.
        fixed: the budget of every round.
        most_nodes: of any tree.
        context: tokens of text that a KV cache was reserved for.
        stats: the account.
    """

    def __init__(
        self,
        drafters: Sequence[Drafter],
        budgeter: Budgeter | None,
        fixed: RoundPlan,
        *,
        most_nodes: int,
        context: int,
        stats: DraftStats,
    ) -> None:
        self._drafters, self._budgeter, self._fixed = tuple(drafters), budgeter, fixed
        stats.drafters = tuple(drafter.name for drafter in drafters)
        stats.arm_rounds, stats.arm_tokens = [0] * len(drafters), [0] * len(drafters)
        self.most_nodes, self.context, self.stats = most_nodes, context, stats
        self._branches = True
        self._plain: list[torch.Tensor] = []  # logits of passes without a tree that nobody was told of yet
        self._late_s = 0.0  # of this round, telling of rounds before it
        self._tokens: list[int] = []  # of the text
        self._pass_s = 0.0  # of the target's newest pass, which the next is thought to take as well
        self.needs = joined([drafter.needs for drafter in drafters])
        self.name = " or ".join(drafter.name for drafter in drafters)

    def begin(self, context: Context) -> None:
        """A new text."""
        self._plain, self._tokens, self._late_s = [], context.tokens, 0.0
        self._branches = context.run is None or context.run.supports_tree
        if self._budgeter is not None:
            self._budgeter.renew()
        for drafter in self._drafters:
            drafter.begin(context)

    def prefilled(self, feedback: Feedback, seconds: float) -> None:
        """The prompt's pass is done and the first token is out; `feedback` as in `Round`."""
        self._pass_s = seconds
        self._tell(feedback)

    def propose(self, room: int, ahead: int | None = None) -> tuple[DraftTree, RoundPlan, int]:
        """A tree, the plan that it was drafted under, and the passes that took; empty where plain is faster.

        Args:
            room: tokens that may still be emitted.
            ahead: draft a chain of so many tokens, or as many as a tree may have, whatever it costs.
        """
        if ahead is not None and (depth := min(ahead, room - 1, self._fixed.nodes, self._fixed.depth)) > 0:
            plan = RoundPlan(len(self._drafters) - 1, depth, depth, 1, 0.0, 0.0)
        else:
            plan = self._fixed if self._budgeter is None else self._budgeter.decide(room)
        nodes, depth = min(plan.nodes, self.most_nodes), min(plan.depth, room - 1)
        if plan.drafter is None or nodes < 1 or depth < 1:
            return _NOTHING, plan, 0
        self._tell_plain(tuple(self._tokens[-1:]))
        drafter = self._drafters[plan.drafter]
        width = plan.width if self._branches else 1
        score_scale = drafter.score_scale.value
        budget = TreeBudget(nodes, depth, width, plan.floor, plan.grow_floor, score_scale, plan.enough)
        return drafter.propose(budget), plan, drafter.passes

    @contextmanager
    def extending(self, tree: DraftTree) -> Iterator[None]:
        """The target runs meanwhile; what a drafter raises there is raised here, after both have ended."""
        busy = [drafter for drafter in self._drafters if drafter.needs.extends]
        if not busy:
            yield
            return
        failures: list[Exception] = []
        thread = threading.Thread(target=_extend, args=(busy, tree, self._pass_s, failures), name="tiercache-extend")
        thread.start()
        try:
            yield
        finally:
            thread.join()
        if failures:
            raise failures[0]

    def observe(self, done: Round) -> None:
        """Account for a round, and tell everybody."""
        self._pass_s = done.verify_s
        feedback, plan = done.feedback, done.plan
        if plan.drafter is None and not (self.needs.logits or self.needs.hidden_layers):
            assert feedback.logits is not None
            self._plain.append(feedback.logits)
            if len(self._plain) == min(_AT_ONCE, self.most_nodes):  # as many rows as a tree would have
                self._tell_plain(feedback.emitted)
        else:
            self._tell(feedback)
        told_s = time.perf_counter() - done.began_s - done.verify_s  # telling the drafters is a cost of drafting
        tree, emitted = feedback.tree, len(feedback.emitted)
        self.stats.add(plan.drafter, tree.depths, [tree.depths[node] for node in feedback.path], emitted)
        self.stats.spend(told_s, done.verify_s, plain=not len(tree))
        if plan.drafter is not None:
            for confidence, came in tree.outcomes(feedback.emitted):
                self._drafters[plan.drafter].score_scale.observe(confidence, came)
        told_s, self._late_s = max(0.0, told_s - self._late_s), 0.0  # of having drafters at all, not of this plan
        if self._budgeter is None:
            return
        if plan.drafter is None:
            self._budgeter.observe(plan, told_s, done.verify_s, len(tree), emitted)
            return
        tried, accepted = trials(tree.parents, feedback.path, *self._budgeter.shape)
        arrived, last = len(feedback.path), feedback.path[-1] if feedback.path else ROOT
        if not done.passes and last not in tree.children and arrived < min(plan.depth, len(tried)):
            tried[arrived, 0] += 1  # a child was asked for, and no table had one; a model may have thought it too dear
        self._budgeter.observe(plan, told_s, done.verify_s, len(tree), emitted, tried, accepted, done.passes)

    def _tell(self, feedback: Feedback) -> None:
        rows = feedback.logits
        assert rows is not None
        topk = min(self.needs.topk, rows.shape[-1])
        likeliest = torch.topk(rows, topk).indices.cpu() if topk else None
        told = replace(feedback, topk=likeliest, logits=rows if self.needs.logits else None)
        for drafter in self._drafters:
            drafter.observe(told)

    def _tell_plain(self, emitted: tuple[int, ...]) -> None:
        """Of several passes without a tree at once, as of a prompt's last tokens: passes may take milliseconds."""
        rows, self._plain = self._plain, []
        if rows:
            begin = time.perf_counter()
            self._tell(Feedback(_NOTHING, (), emitted[-1:], None, torch.cat(rows)))
            self._late_s += time.perf_counter() - begin

    def end(self) -> None:
        """The text has ended: what nobody was told of yet is told now."""
        self._tell_plain(tuple(self._tokens[-1:]))

    def close(self) -> None:
        """Let the drafters put away what they learnt, whatever one raises; harmless when done twice."""
        with ExitStack() as stack:
            for drafter in self._drafters:
                stack.callback(drafter.close)


def _extend(drafters: Sequence[Drafter], tree: DraftTree, pass_s: float, failures: list[Exception]) -> None:
    for drafter in drafters:
        try:
            drafter.extend(tree, pass_s)
        except Exception as error:
            failures.append(error)
