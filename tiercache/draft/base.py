"""Defines the base class of drafters: what one requires, what it is asked and what it is told.

A drafter guesses the tokens that the target model would emit next. It never decides what is emitted, so a bad drafter
costs time and nothing else. This module knows draft trees and tokens; it does not know the target.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from policies.temperature import TemperatureScaling
from tiercache.draft.tree import DraftTree
from tiercache.errors import UsageError
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
    """

    topk: int = 0
    logits: bool = False
    shared_kv: bool = False
    vocabulary: int | None = None
    device_bytes: int = 0
    host_bytes: int = 0


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
    """

    nodes: int
    depth: int = 16
    width: int = 8
    floor: float = 0.0
    grow_floor: float = 0.0
    score_scale: float = 1.0
    enough: float | None = None


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
    """The result of the target's newest pass. The prompt's pass has an empty tree.

    Passes without a tree are told together, up to 64 of them; `emitted` is then the newest one's alone. Learn from
    `context.tokens`, which hold all that was emitted.

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


class Drafter:
    """Guesses the tokens that follow. A drafter is a subclass that has `propose`; the rest has defaults.

    Attributes:
        name: its name in statistics and tables.
        requirements: what it wants to be told, and the memory that it takes.
        open_ended: its trees end by themselves where the budget's floors say so, so that it may be asked for the
            largest tree.
        runs_model: its proposals may take passes of a model; otherwise it only looks tokens up.
        passes: how many passes of a model its newest proposal took.
        context: the sequence, from `begin` on.
    """

    name = "drafter"
    requirements = DrafterRequirements()
    open_ended = runs_model = False
    passes = 0
    context: Context

    @cached_property
    def score_scale(self) -> TemperatureScaling:
        """The factor on its scores. The caller of `propose` learns it and passes it on in the budget."""
        return TemperatureScaling()

    def begin(self, context: Context) -> None:
        """Start a new sequence: forget the last one, but not what was learnt."""
        self.context = context

    def propose(self, budget: TreeBudget) -> DraftTree:
        """Return a draft tree below the context's last token; it may be empty.

        Its nodes are no more, and no deeper, than the budget says. What exceeds it, the room or the vocabulary is cut.
        """
        raise NotImplementedError

    def observe(self, feedback: Feedback) -> None:
        """Learn from a verified tree; the context's tokens hold the emitted ones already."""

    def close(self) -> None:
        """Release what it holds and store what was learnt; harmless when done twice."""


def joint_requirements(drafters: Sequence[Drafter]) -> DrafterRequirements:
    """The requirements of several drafters.

    Raises:
        UsageError: they guess from different vocabularies.
    """
    parts = [drafter.requirements for drafter in drafters]
    vocabularies = sorted({part.vocabulary for part in parts if part.vocabulary is not None})
    if len(vocabularies) > 1:
        raise UsageError(f"drafters of {vocabularies} tokens in one; they must share a vocabulary")
    return DrafterRequirements(
        topk=max((part.topk for part in parts), default=0),
        logits=any(part.logits for part in parts),
        shared_kv=any(part.shared_kv for part in parts),
        vocabulary=vocabularies[0] if vocabularies else None,
        device_bytes=sum(part.device_bytes for part in parts),
        host_bytes=sum(part.host_bytes for part in parts),
    )
