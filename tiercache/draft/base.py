"""Defines the protocol of a drafter: what it requires, what it is asked and what it is told.

A drafter guesses the tokens that the target model would emit next. It never decides what is emitted, so a bad drafter
costs time and nothing else. This module knows draft trees and tokens; it does not know the target.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from policies.temperature import TemperatureScaling
from tiercache.draft.tree import DraftTree
from tiercache.kv.tree_pass import TreeRun

# The noise that is added to the target's scores of the token at an absolute position: [vocabulary], fp32.
Noise = Callable[[int], torch.Tensor]
# The request's logits processors, applied at several nodes: (for each node the tokens from the root's successor to it,
# logits [nodes, vocabulary]) -> scores. A drafter ranks by them; verification applies the processors themselves.
NodeProcessors = Callable[[Sequence[Sequence[int]], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class DrafterRequirements:
    """What a drafter wants to be told of every pass, and how much memory it takes.

    Attributes:
        topk: it wants this many of the target's likeliest tokens at each node.
        logits: it wants the whole row of logits of each node.
        shared_kv: it runs the target's own model on the target's KV cache.
        vocabulary: size of the vocabulary that it guesses from; None for any.
        device_bytes: memory that it holds where the model computes.
        host_bytes: main memory that it holds.
        node_bytes: memory of each node where the model computes, while a tree grows and is verified.
    """

    topk: int = 0
    logits: bool = False
    shared_kv: bool = False
    vocabulary: int | None = None
    device_bytes: int = 0
    host_bytes: int = 0
    node_bytes: int = 0


@dataclass(frozen=True)
class TreeBudget:
    """How large a draft tree may be.

    Attributes:
        nodes: how many it may have.
        depth: how deep it may be; children of the root have depth 1.
        width: how many nodes one drafting pass expands, and how many children a node may have.
        floor: a node whose whole path is accepted with less than this probability, by the drafter's estimate, is not
            worth verifying.
        grow_floor: such a node is not worth another drafting pass.
        score_scale: factor on scores, by temperature scaling, with which a drafter's confidence matches its acceptance
            rate.
        enough: accepted tokens that a tree must promise so that no further drafter is asked; None where that is not
            known.
        deadline_s: seconds that proposing may take; None for no bound.
    """

    nodes: int
    depth: int = 16
    width: int = 8
    floor: float = 0.0
    grow_floor: float = 0.0
    score_scale: float = 1.0
    enough: float | None = None
    deadline_s: float | None = None


@dataclass
class Context:
    """The sequence that is being continued, as a drafter sees it.

    Attributes:
        tokens: ids of the prompt and of everything emitted; the decode loop appends to it. The last one is the root of
            the next tree.
        vocabulary: size of the target's vocabulary.
        noise: the target's noise by absolute position (`len(tokens)` is the next token's); None in greedy decoding.
        processors: the request's logits processors, for drafters that have logits; None where there are none.
        room: positions left before the sequence must end.
        run: the target's own model and KV cache at the root, for drafters that share them.
    """

    tokens: list[int]
    vocabulary: int
    noise: Noise | None = None
    processors: NodeProcessors | None = None
    room: int = 1 << 30
    run: TreeRun | None = None


@dataclass(frozen=True)
class Feedback:
    """The result of one pass of the target. The prompt's pass has an empty tree.

    Attributes:
        tree: the tree that was verified.
        path: the accepted nodes, in order.
        emitted: the accepted tokens and the target's own token after them; the end of the sequence may cut them short.
        topk: the target's likeliest tokens at the root and at every node [1 + nodes, k], best first, if required. After
            a prompt there is one row for each of its last tokens; the root's row comes last.
        logits: whole rows likewise, if required; valid only during the call.
    """

    tree: DraftTree
    path: tuple[int, ...]
    emitted: tuple[int, ...]
    topk: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Drafter(Protocol):
    """Guesses the tokens that follow.

    Attributes:
        name: its name in statistics and tables.
        needs: its requirements.
        open_ended: its trees end by themselves where the budget's floors say so, so that it may be asked for the
            largest tree.
        tables: it only looks tokens up, and never runs a model.
        passes: how many passes of a model its newest proposal took.
    """

    name: str
    needs: DrafterRequirements
    open_ended: bool
    tables: bool
    passes: int

    @property
    def score_scale(self) -> TemperatureScaling:
        """The factor on its scores. The caller of `propose` learns it and passes it on in the budget."""

    def begin(self, context: Context) -> None:
        """Start a new sequence: forget the last one, but not what was learnt."""

    def propose(self, budget: TreeBudget) -> DraftTree:
        """Return a draft tree below the context's last token; it may be empty."""

    def observe(self, feedback: Feedback) -> None:
        """Learn from a verified tree; the context's tokens hold the emitted ones already."""

    def close(self) -> None:
        """Release what it holds and store what was learnt; harmless when done twice."""


class BaseDrafter:
    """Implements the parts of `Drafter` that most drafters leave empty."""

    name = "base"
    needs = DrafterRequirements()
    open_ended = tables = False
    passes = 0

    @cached_property
    def score_scale(self) -> TemperatureScaling:
        """See `Drafter`."""
        return TemperatureScaling()

    def begin(self, context: Context) -> None:
        """See `Drafter`."""
        self.context = context

    def propose(self, budget: TreeBudget) -> DraftTree:
        """See `Drafter`."""
        return DraftTree()

    def observe(self, feedback: Feedback) -> None:
        """See `Drafter`."""

    def close(self) -> None:
        """See `Drafter`."""


def combined_requirements(needs: Sequence[DrafterRequirements]) -> DrafterRequirements:
    """The requirements of several drafters that are asked one at a time, for any vocabulary."""
    return DrafterRequirements(
        topk=max((need.topk for need in needs), default=0),
        logits=any(need.logits for need in needs),
        shared_kv=any(need.shared_kv for need in needs),
        device_bytes=sum(need.device_bytes for need in needs),
        host_bytes=sum(need.host_bytes for need in needs),
        node_bytes=max((need.node_bytes for need in needs), default=0),
    )
