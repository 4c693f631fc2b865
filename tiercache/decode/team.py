"""Who drafts for an attached model, and how much: its drafters, the budgeter that chooses among them, and the account.

Knows drafters and the policy; nothing of the target but what feedback says. Lives as long as the model is attached, so
what was learnt of costs and acceptance serves the next call as well.

Ordering: while the target verifies, drafters that ask for it are called in one thread of their own, which ends before
anything else is asked of them.
"""

import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from policies.acceptance import trials
from policies.drafting import Budgeter, Choice
from policies.sharpness import Sharpness
from tiercache.draft.base import Context, Drafter, Feedback, Needs, TreeBudget
from tiercache.draft.tree import ROOT, DraftTree
from tiercache.stats import DraftStats

_EXTEND_S = 60.0  # an upper bound; the pass itself is the deadline
_NEWEST = 63  # plain passes beside the newest one


@dataclass(frozen=True)
class Round:
    """One tree and what came of it.

    Attributes:
        choice: the budget it was drafted under.
        passes: that drafting it took.
        feedback: what was verified and emitted.
        draft_s, verify_s: seconds of proposing, and of the target's pass with its walk.
        began_s: the clock at its start.
    """

    choice: Choice
    passes: int
    feedback: Feedback
    draft_s: float
    verify_s: float
    began_s: float


class Team:
    """See the module.

    Args:
        drafters: the arms.
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
        fixed: Choice,
        *,
        most_nodes: int,
        context: int,
        stats: DraftStats,
    ) -> None:
        self._drafters, self._budgeter, self._fixed = tuple(drafters), budgeter, fixed
        stats.drafters = tuple(drafter.name for drafter in drafters)
        stats.arm_rounds, stats.arm_tokens = [0] * len(drafters), [0] * len(drafters)
        self.most_nodes, self.context, self.stats = most_nodes, context, stats
        self._sharpness = [Sharpness() for _ in drafters]
        self._branches = True
        self.needs = joined([drafter.needs for drafter in drafters])
        self.name = " or ".join(drafter.name for drafter in drafters)

    def begin(self, context: Context) -> None:
        """A new text."""
        self._branches = context.run is None or context.run.supports_tree
        for drafter in self._drafters:
            drafter.begin(context)

    def prefilled(self, feedback: Feedback, seconds: float) -> None:
        """The prompt's pass is done and the first token is out."""
        for drafter in self._drafters:
            drafter.observe(feedback)

    def propose(self, room: int) -> tuple[DraftTree, Choice, int]:
        """A tree, the choice that it was drafted under, and the passes that took; empty where plain is faster."""
        choice = self._fixed if self._budgeter is None else self._budgeter.decide(room)
        nodes, depth = min(choice.nodes, self.most_nodes), min(choice.depth, room - 1)
        if choice.arm is None or nodes < 1 or depth < 1:
            return DraftTree(), choice, 0
        drafter = self._drafters[choice.arm]
        width = choice.width if self._branches else 1
        sharpness = self._sharpness[choice.arm].value
        budget = TreeBudget(nodes, depth, width, choice.floor, choice.grow_floor, sharpness)
        return drafter.propose(budget), choice, drafter.passes

    @contextmanager
    def extending(self, tree: DraftTree) -> Iterator[None]:
        """The target runs meanwhile."""
        busy = [drafter for drafter in self._drafters if drafter.needs.extends]
        if not busy:
            yield
            return
        thread = threading.Thread(target=_extend, args=(busy, tree), name="tiercache-extend")
        thread.start()
        try:
            yield
        finally:
            thread.join()

    def observe(self, done: Round) -> None:
        """Account for a round, and tell everybody."""
        for drafter in self._drafters:
            drafter.observe(done.feedback)
        tree, choice, emitted = done.feedback.tree, done.choice, len(done.feedback.emitted)
        told_s = time.perf_counter() - done.began_s - done.verify_s  # telling the drafters is a cost of drafting
        self._account(done, told_s)
        self._sharpen(done)
        if self._budgeter is not None:
            tried, accepted = trials(tree.parents, done.feedback.path, *self._budgeter.shape)
            counts = (len(tree), emitted, tried, accepted, done.passes)
            self._budgeter.observe(choice, told_s, done.verify_s, *counts)

    def _sharpen(self, done: Round) -> None:
        """Compare the best guess at each node that was arrived at with what became of it."""
        tree, taken = done.feedback.tree, set(done.feedback.path)
        if done.choice.arm is None or tree.logq is None or tree.q is not None:
            return
        for parent in (ROOT, *done.feedback.path):
            if children := tree.children.get(parent):
                self._sharpness[done.choice.arm].observe(math.exp(tree.logq[children[0]]), children[0] in taken)

    def _account(self, done: Round, draft_s: float) -> None:
        stats, tree, path = self.stats, done.feedback.tree, done.feedback.path
        emitted = len(done.feedback.emitted)
        stats.rounds += 1
        stats.tokens += emitted
        stats.nodes += len(tree)
        stats.accepted += len(path)
        stats.draft_s += draft_s
        stats.verify_s += done.verify_s
        if not len(tree):
            stats.plain_rounds += 1
            stats.plain_passes_s = [*stats.plain_passes_s[-_NEWEST:], done.verify_s]
        if done.choice.arm is not None:
            stats.arm_rounds[done.choice.arm] += 1
            stats.arm_tokens[done.choice.arm] += emitted
        while len(stats.tried_by_depth) < max(tree.depths, default=0):
            stats.tried_by_depth.append(0)
            stats.accepted_by_depth.append(0)
        for parent in (ROOT, *path):
            if children := tree.children.get(parent):
                stats.tried_by_depth[tree.depths[children[0]] - 1] += 1
        for node in path:
            stats.accepted_by_depth[tree.depths[node] - 1] += 1

    def close(self) -> None:
        """Let the drafters put away what they learnt; harmless when done twice."""
        for drafter in self._drafters:
            drafter.close()


def joined(needs: Sequence[Needs]) -> Needs:
    """What several drafters need together."""
    return Needs(
        topk=max((need.topk for need in needs), default=0),
        logits=any(need.logits for need in needs),
        hidden_layers=tuple(sorted({layer for need in needs for layer in need.hidden_layers})),
        shared_kv=any(need.shared_kv for need in needs),
        extends=any(need.extends for need in needs),
        device_bytes=sum(need.device_bytes for need in needs),
        host_bytes=sum(need.host_bytes for need in needs),
        node_bytes=max((need.node_bytes for need in needs), default=0),
    )


def _extend(drafters: Sequence[Drafter], tree: DraftTree) -> None:
    for drafter in drafters:
        drafter.extend(tree, _EXTEND_S)
