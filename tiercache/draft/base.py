"""What a drafter is: what it asks for, what it is told, and what it may be asked.

Knows trees and tokens; nothing of the target. A drafter never decides what is emitted, so a bad one costs time and
nothing else.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch

from policies.temperature import TemperatureScaling
from tiercache.draft.tree import DraftTree
from tiercache.kv.tree_pass import TreeRun

# The noise that the target will be given when it chooses the token at an absolute position: [vocabulary], fp32.
Noise = Callable[[int], torch.Tensor]
# The run's logits processors at nodes: (for each the tokens from the root's successor to it, logits [nodes,
# vocabulary]) -> scores. They are a drafter's to rank by; the verifier asks the processors themselves.
Shape = Callable[[Sequence[Sequence[int]], torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class DrafterRequirements:
    """What a drafter wants to be told of every pass, and what it takes.

    Attributes:
        topk: the target's likeliest tokens of each node, so many.
        logits: the whole rows of logits of each node.
        shared_kv: it runs the target's own model on the target's KV cache.
        vocabulary: it guesses tokens of this many; None for any.
        device_bytes: what it holds where the model computes.
        host_bytes: what it holds in main memory.
        node_bytes: what each node takes while a tree grows and is verified, where the model computes.
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
    """How large a tree may be.

    Attributes:
        nodes: at most.
        depth: of the deepest node; children of the root have 1.
        width: nodes expanded in one drafting pass, and children of a node.
        floor: a node whose whole path is accepted with less than this probability, as the drafter sees it, is not
            worth verifying.
        grow_floor: likewise, not worth another drafting pass.
        sharpness: factor on scores that makes a drafter's confidence as high as it is right.
        enough: accepted tokens to be expected of a tree for which no further drafter need be asked; None where that
            is not known.
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
    """The sequence that is being continued, as a drafter sees it; `tokens` grows as the loop commits.

    Attributes:
        tokens: ids of the prompt and of everything emitted; the last one is the root of the next tree.
        vocabulary: of the target.
        noise: the target's noise by absolute position (`len(tokens)` is the next token's); None in greedy decoding.
        shape: the run's processors, for drafters that have logits; None where there are none.
        room: positions left before the sequence must end.
        run: the target's own model and KV cache at the root, for drafters that share it.
    """

    tokens: list[int]
    vocabulary: int
    noise: Noise | None = None
    shape: Shape | None = None
    room: int = 1 << 30
    run: TreeRun | None = None


@dataclass(frozen=True)
class Feedback:
    """What one pass of the target showed. The prompt's pass has an empty tree.

    Attributes:
        tree: what was verified.
        path: the accepted nodes, in order.
        emitted: the accepted tokens and the target's own one after them, as committed (an end of the sequence may
            have cut them short).
        topk: likeliest tokens of the root and of every node [1 + nodes, k], best first, if asked for; after a prompt
            one row for each of its last tokens, the root's last.
        logits: whole rows likewise, if asked for; valid only during the call.
    """

    tree: DraftTree
    path: tuple[int, ...]
    emitted: tuple[int, ...]
    topk: torch.Tensor | None = None
    logits: torch.Tensor | None = None


class Drafter(Protocol):
    """Guesses what follows.

    Attributes:
        name: as statistics and tables have it.
        needs: what it wants to be told, and what it takes.
        open_ended: its trees end by themselves where a budget's floors say so; it may be asked for the largest.
        tables: it only looks up, and never takes a pass of a model.
        passes: of a model, that its newest proposal took.
    """

    name: str
    needs: DrafterRequirements
    open_ended: bool
    tables: bool
    passes: int

    @property
    def score_scale(self) -> TemperatureScaling:
        """Of its scores: learnt by whoever asks it, and told in the budget."""

    def begin(self, context: Context) -> None:
        """A new sequence; forget the last one, but not what was learnt."""

    def propose(self, budget: TreeBudget) -> DraftTree:
        """A tree below the context's last token; may be empty."""

    def observe(self, feedback: Feedback) -> None:
        """What came of it; the context's tokens hold the emitted ones already."""

    def close(self) -> None:
        """Give back what it holds, and put what was learnt where it is kept; harmless when done twice."""


class BaseDrafter:
    """The parts of `Drafter` that most leave empty."""

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


def joined(needs: Sequence[DrafterRequirements]) -> DrafterRequirements:
    """What several drafters need that are asked one at a time, for any vocabulary."""
    return DrafterRequirements(
        topk=max((need.topk for need in needs), default=0),
        logits=any(need.logits for need in needs),
        shared_kv=any(need.shared_kv for need in needs),
        device_bytes=sum(need.device_bytes for need in needs),
        host_bytes=sum(need.host_bytes for need in needs),
        node_bytes=max((need.node_bytes for need in needs), default=0),
    )
