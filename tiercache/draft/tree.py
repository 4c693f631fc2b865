"""Defines the draft tree: guessed tokens in flat lists, as verification takes them.

Knows tokens and parents; it does not know models, or how the tokens were guessed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch

from tiercache.errors import DraftError

# How the children of a node came about: chosen by score alone; drawn one after another without replacement; or
# ranked by score plus the noise that the target will be given too.
Order = Literal["deterministic", "without_replacement", "shared_gumbel"]
ROOT = -1

_ROUNDING = 1e-7


@dataclass(frozen=True)
class DraftTree:
    """Guesses of what follows the root, the newest token, which is no node itself.

    Attributes:
        tokens: of each node; parents come before children, and siblings in the order in which they were drawn.
        parents: of each node; `ROOT` where it follows the root.
        order: how siblings were drawn.
        q: where `order` is a drawing, the distribution that the children of each parent were really drawn from
            [vocabulary], after every processor, by parent; None otherwise.
        logq: log of the drafter's probability of each node given its parent, if it has any.

    Raises:
        DraftError: anything of this does not hold.
    """

    tokens: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    order: Order = "deterministic"
    q: Mapping[int, torch.Tensor] | None = None
    logq: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        nodes = len(self.tokens)
        if self.order not in get_args(Order):
            raise DraftError(f"unknown order {self.order!r}; choose one of {', '.join(get_args(Order))}")
        for name in ("parents", "logq"):
            part = getattr(self, name)
            if part is not None and len(part) != nodes:
                raise DraftError(f"a tree of {nodes} tokens has {len(part)} {name}; give one for each node")
        for node, parent in enumerate(self.parents):
            if not ROOT <= parent < node:
                raise DraftError(f"node {node} has parent {parent}; parents must come before their children")
        if self.logq is not None and not all(logq <= _ROUNDING for logq in self.logq):
            raise DraftError("a node's logq is above 0 or no number; give the log of a probability")
        drawn = self.order == "without_replacement"
        if drawn != (self.q is not None):
            need = "needs q, the distributions that siblings were drawn from" if drawn else "must not carry q"
            raise DraftError(f"a tree of order {self.order!r} {need}")
        if self.q is not None and (missing := set(self.parents) - set(self.q)):
            raise DraftError(f"q lacks the distribution of the children of node {min(missing)}")
        if drawn and len(set(zip(self.parents, self.tokens, strict=True))) < nodes:
            raise DraftError("siblings drawn without replacement cannot be the same token; draw again")

    def __len__(self) -> int:
        """Nodes."""
        return len(self.tokens)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Of each node; children of the root have 1."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent == ROOT else depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> Mapping[int, tuple[int, ...]]:
        """The children of each node that has some, and of `ROOT`, in the order in which they were drawn."""
        found: dict[int, list[int]] = {}
        for node, parent in enumerate(self.parents):
            found.setdefault(parent, []).append(node)
        return {parent: tuple(nodes) for parent, nodes in found.items()}

    @property
    def is_chain(self) -> bool:
        """Whether no node has a sibling."""
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def child(self, node: int, token: int) -> int | None:
        """The first child of `node` (`ROOT` for the root) that has `token`; None where no child has it."""
        return next((child for child in self.children.get(node, ()) if self.tokens[child] == token), None)

    def along(self, emitted: Sequence[int]) -> tuple[int, ...]:
        """The nodes that `emitted` leads through, as far as there are any."""
        path: list[int] = []
        for token in emitted:
            if (child := self.child(path[-1] if path else ROOT, token)) is None:
                break
            path.append(child)
        return tuple(path)

    def outcomes(self, emitted: Sequence[int]) -> Iterator[tuple[float, bool]]:
        """Of the likeliest child at each node that `emitted` leads to: its probability, and whether it came.

        Nothing where nodes have no probability, or were drawn by it.
        """
        if self.logq is None or self.q is not None:
            return
        path = self.along(emitted)
        for parent, token in zip((ROOT, *path), emitted, strict=False):
            if children := self.children.get(parent):
                best = max(children, key=self.logq.__getitem__)
                yield math.exp(self.logq[best]), self.tokens[best] == token

    def pruned(self, keep: Sequence[int]) -> "DraftTree":
        """The tree of the nodes in `keep`, ascending; a node whose parent is not kept goes too."""
        place = {ROOT: ROOT}
        for node in keep:
            if self.parents[node] in place:
                place[node] = len(place) - 1
        nodes = [node for node in keep if node in place]
        q = None
        if self.q is not None:
            q = {place[parent]: row for parent, row in self.q.items() if parent in place}
        return DraftTree(
            tuple(self.tokens[node] for node in nodes),
            tuple(place[self.parents[node]] for node in nodes),
            self.order,
            q,
            None if self.logq is None else tuple(self.logq[node] for node in nodes),
        )


def chain(tokens: Sequence[int], logq: Sequence[float] | None = None) -> DraftTree:
    """A tree without branches."""
    return DraftTree(tuple(tokens), tuple(range(-1, len(tokens) - 1)), logq=None if logq is None else tuple(logq))
