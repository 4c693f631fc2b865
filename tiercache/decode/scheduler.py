"""The scheduler asks one of an attached model's drafters for each draft tree, and tells all of them what was accepted.

The budgeter, a policy, chooses the drafter and the size of the tree. The scheduler lives as long as the model is
attached, so that measured costs and acceptance rates serve the next call as well. It knows drafters and the policy; of
the target it knows feedback alone.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch

from policies.acceptance import trials
from policies.budgeter import Budgeter
from policies.drafting import RoundPlan
from tiercache.draft.base import Context, Drafter, Feedback, TreeBudget, joint_requirements
from tiercache.draft.row_topk import row_topk
from tiercache.draft.tree import ROOT, DraftTree
from tiercache.stats.drafting import DraftStats

_AT_ONCE = 64  # plain passes that drafters are told of together, at most
_NOTHING = DraftTree()


class DrafterScheduler:
    """Schedules the drafters of an attached model.

    Args:
        drafters: those to choose from.
        budgeter: chooses among them for each round; None to always use `fixed`.
        fixed: the choice of every round.
        most_nodes: nodes that any tree may have.
        context: tokens of text that a KV cache was reserved for.
        stats: counts rounds, tokens and seconds.
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
        self._plain: list[torch.Tensor] = []  # logits of passes without a tree, of which the drafters were not told yet
        self._late_s = 0.0  # of this round, telling of rounds before it
        self._watched: list[Feedback] | None = None
        self._tokens: list[int] = []  # of the text
        self.requirements = joint_requirements(drafters)

    def begin(self, context: Context) -> None:
        """Start a new text."""
        self._plain, self._tokens, self._late_s = [], context.tokens, 0.0
        self._branches = context.run is None or context.run.supports_tree
        if self._budgeter is not None:
            self._budgeter.renew()
        for drafter in self._drafters:
            drafter.begin(context)

    @contextmanager
    def watching(self) -> Iterator[list[Feedback]]:
        """The rounds within, as they come; a round without a tree has an empty one. Logits are left out."""
        before, self._watched = self._watched, []
        try:
            yield self._watched
        finally:
            self._watched = before

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

    def observe(self, plan: RoundPlan, passes: int, feedback: Feedback, verify_s: float, began_s: float) -> None:
        """Count a round, and tell the drafters and the budgeter of it.

        Args:
            plan: what it was drafted under.
            passes: that drafting took.
            feedback: the result of the target's pass, with all rows of logits.
            verify_s: seconds of the target's pass and its verification.
            began_s: the clock at the start of the round.
        """
        if self._watched is not None:
            self._watched.append(replace(feedback, topk=None, logits=None))
        if plan.drafter is None and not self.requirements.logits:
            assert feedback.logits is not None
            self._plain.append(feedback.logits)
            if len(self._plain) == min(_AT_ONCE, self.most_nodes):  # as many rows as a tree would have
                self._tell_plain(feedback.emitted)
        else:
            self.tell(feedback)
        told_s = time.perf_counter() - began_s - verify_s  # telling the drafters is a cost of drafting
        tree, emitted = feedback.tree, len(feedback.emitted)
        self.stats.add(plan.drafter, tree.depths, [tree.depths[node] for node in feedback.path], emitted)
        self.stats.spend(told_s, verify_s, plain=not len(tree))
        if plan.drafter is not None:
            for confidence, came in tree.outcomes(feedback.emitted):
                self._drafters[plan.drafter].score_scale.observe(confidence, came)
        told_s, self._late_s = max(0.0, told_s - self._late_s), 0.0  # of having drafters at all, not of this plan
        if self._budgeter is None:
            return
        if plan.drafter is None:
            self._budgeter.observe(plan, told_s, verify_s, len(tree), emitted)
            return
        tried, accepted = trials(tree.parents, feedback.path, *self._budgeter.shape)
        arrived, last = len(feedback.path), feedback.path[-1] if feedback.path else ROOT
        if not passes and last not in tree.children and arrived < min(plan.depth, len(tried)):
            tried[arrived, 0] += 1  # a child was asked for, and no table had one; a model may have thought it too dear
        self._budgeter.observe(plan, told_s, verify_s, len(tree), emitted, tried, accepted, passes)

    def tell(self, feedback: Feedback) -> None:
        """Tell the drafters of a pass; `feedback` has all rows of logits."""
        rows = feedback.logits
        assert rows is not None
        topk = min(self.requirements.topk, rows.shape[-1])
        likeliest = row_topk(rows, topk)[1].cpu() if topk else None
        told = replace(feedback, topk=likeliest, logits=rows if self.requirements.logits else None)
        for drafter in self._drafters:
            drafter.observe(told)

    def _tell_plain(self, emitted: tuple[int, ...]) -> None:
        """Tell of several passes without a tree at once, as of a prompt's last tokens: a pass may take milliseconds."""
        rows, self._plain = self._plain, []
        if rows:
            begin = time.perf_counter()
            self.tell(Feedback(_NOTHING, (), emitted[-1:], None, torch.cat(rows)))
            self._late_s += time.perf_counter() - begin

    def end(self) -> None:
        """The text has ended: tell the drafters of the passes that they were not told of yet."""
        self._tell_plain(tuple(self._tokens[-1:]))

    def close(self) -> None:
        """Close all drafters, whatever one raises; harmless when done twice."""
        with ExitStack() as stack:
            for drafter in self._drafters:
                stack.callback(drafter.close)
