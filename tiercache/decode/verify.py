"""Decides which drafted tokens are emitted, by rules that walk down a draft tree by the target's scores.

Every rule asks for the scores of a node only when it has arrived there, once, so that logits processors which keep
state see each emitted token once and in order, and so that the caller may stop at any token.

Knows trees and scores; it does not know models or drafters.
"""

import math
from collections.abc import Callable, Iterator
from typing import get_args

import torch
from torch import Tensor

from tiercache.draft.base import Noise
from tiercache.draft.noise import GumbelNoise
from tiercache.draft.tree import ROOT, DraftTree, Order
from tiercache.errors import DraftError, UsageError
from tiercache.tiers.device import on_host

_OF_NUMPY = (torch.float32, torch.float64)

# The target's scores at a node (`ROOT` for the root), after all logits processors: [vocabulary], fp32, banned = -inf.
Scores = Callable[[int], Tensor]
# Tokens to emit, each with the accepted node whose token it is; the target's own token comes last, with None.
Walk = Iterator[tuple[int, int | None]]


class Rule:
    """Decides what is emitted.

    Attributes:
        name: as statistics have it.
        orders: of the trees that it takes; an empty tree fits any rule.
    """

    name: str
    orders: tuple[Order, ...] = get_args(Order)

    def walk(self, tree: DraftTree, scores: Scores, position: int) -> Walk:
        """Walk down `tree`; `position` is the absolute one of the root's successor.

        Raises:
            DraftError: the tree's order does not fit, or its q is not what its children were drawn from.
            UsageError: while walking, scores that are NaN or that ban every token.
        """
        if len(tree) and tree.order not in self.orders:  # found at the call, not at the first token
            raise DraftError(
                f"rule {self.name!r} takes trees of order {', '.join(self.orders)}, not {tree.order!r}; "
                "choose another grower or the rule 'walk', which takes every tree"
            )
        return self._steps(tree, scores, position)

    def _steps(self, tree: DraftTree, scores: Scores, position: int) -> Walk:
        node: int | None = ROOT
        while node is not None:
            token, node = self._choose(tree, node, scores(node), position)
            yield token, node
            position += 1

    def _choose(self, tree: DraftTree, node: int, scores: Tensor, position: int) -> tuple[int, int | None]:
        """The token to emit at a node with these scores, and the child that has it; `position` is the token's."""
        raise NotImplementedError


class TargetWalk(Rule):
    """The target's own next token, and down as long as a child has it.

    With noise that depends on seed, position and token alone, what is emitted is token for token what plain decoding
    with the same noise emits, whatever the tree (Gumbel-max trick; drafter-invariant speculative decoding,
    arXiv 2408.07978, section 3). Without noise it is greedy decoding.

    Args:
        noise: by absolute position, [vocabulary]; None to decode greedily.
    """

    name = "walk"

    def __init__(self, noise: Noise | None) -> None:
        self._noise = noise

    def _choose(self, tree: DraftTree, node: int, scores: Tensor, position: int) -> tuple[int, int | None]:
        if isinstance(self._noise, GumbelNoise):
            scores = self._noise.added(scores, position)
        elif self._noise is not None:
            scores = scores + self._noise(position)
        return _likeliest(tree, node, scores)


class Rejection(Rule):
    """Recursive rejection of children that were drawn without replacement, in the order in which they were drawn.

    A child x stays with probability min(1, p[x] / q[x]); otherwise p becomes norm(max(p - q, 0)), x leaves q, and the
    next child is tried; the last p draws the target's own token (recursive rejection sampling, arXiv 2402.14160,
    section 3.1; Sequoia, arXiv 2402.12374, algorithm 2).

    Args:
        generator: draws, independently of the drafter that drew the tree; None to decode greedily, where p is 1 at one
            token and the rule becomes the target's walk.
    """

    name = "rejection"
    orders: tuple[Order, ...] = ("without_replacement",)

    def __init__(self, generator: torch.Generator | None) -> None:
        self._generator = generator

    def _choose(self, tree: DraftTree, node: int, scores: Tensor, position: int) -> tuple[int, int | None]:
        if self._generator is None:
            return _likeliest(tree, node, scores)
        p = _probabilities(scores, node)
        children = tree.children.get(node, ())
        if not children:
            return _draw(p, self._generator), None
        assert tree.q is not None  # `walk` refuses a tree without
        q = tree.q[node].to(p, copy=True)
        for child in children:
            token = tree.tokens[child]
            q /= q.sum()
            given, wanted = float(q[token]), float(p[token])
            if not given > 0:
                raise DraftError(
                    f"node {child} has token {token}, to which q gives {given}; q must be what it was drawn from"
                )
            rest = (p - q).clamp_(min=0)
            mass = rest.sum()
            # No rest means that p is q but for rounding, where a rejection has no probability.
            if _uniform(self._generator) * given < wanted or not mass > 0:
                return token, child
            p = rest / mass
            q[token] = 0
        return _draw(p, self._generator), None


class Typical(Rule):
    """Medusa's typical acceptance (arXiv 2401.10774, section 2.3.1): lossy.

    A child is good enough if the target gives it more than min(epsilon, delta * exp(-entropy)). Of those the likeliest
    is taken, node by node, where the paper compares whole paths; and where none is good enough, the target draws,
    where the paper takes its likeliest token.

    Args:
        generator: draws the target's own tokens; None to decode greedily, which is lossless.
        epsilon, delta: a probability that always suffices, and the share of exp(-entropy) that does.
    """

    name = "typical"

    def __init__(self, generator: torch.Generator | None, epsilon: float = 0.09, delta: float = 0.3) -> None:
        self._generator, self._epsilon, self._delta = generator, epsilon, delta

    def _choose(self, tree: DraftTree, node: int, scores: Tensor, position: int) -> tuple[int, int | None]:
        if self._generator is None:
            return _likeliest(tree, node, scores)
        p = _probabilities(scores, node)
        entropy = float(torch.special.entr(p).sum())
        likeliest, chosen = min(self._epsilon, self._delta * math.exp(-entropy)), None
        for child in tree.children.get(node, ()):
            if (probability := float(p[tree.tokens[child]])) > likeliest:
                likeliest, chosen = probability, child
        return (_draw(p, self._generator), None) if chosen is None else (tree.tokens[chosen], chosen)


class ShiftedRejection(Rejection):
    """RAPID's shifted target (arXiv 2502.20330, equation 6): lossy, for drafters that know what the target does not.

    Where the drafter has drawn, the target's scores become scores + eta * (q - p), one step of distillation from the
    drafter; tokens to which the drafter gives less than `cut` times its best stay (as in the authors' program). What
    is emitted is distributed as the shifted target.

    Args:
        generator: see `Rejection`.
        eta: how far; 0 changes nothing.
        cut: share of the drafter's best probability.
    """

    name = "shifted rejection"

    def __init__(self, generator: torch.Generator | None, eta: float, cut: float = 0.1) -> None:
        super().__init__(generator)
        self._eta, self._cut = eta, cut

    def _choose(self, tree: DraftTree, node: int, scores: Tensor, position: int) -> tuple[int, int | None]:
        if tree.q is not None and node in tree.q:
            q = tree.q[node].to(scores)
            step = torch.where(q >= self._cut * q.max(), q - torch.softmax(scores, -1), 0.0)
            scores = scores + self._eta * step
        return super()._choose(tree, node, scores, position)


def _likeliest(tree: DraftTree, node: int, scores: Tensor) -> tuple[int, int | None]:
    """The token of the highest score, and the child that has it."""
    best, token = _highest(scores)
    if not best > -math.inf:  # NaN is no more than anything
        raise _no_token(scores, node)
    return token, tree.child(node, token)


def _highest(scores: Tensor) -> tuple[float, int]:
    """The highest of some scores and the first token that has it; NaN is higher than any number."""
    if on_host(scores.device) and scores.dtype in _OF_NUMPY:  # which is ten times as fast
        values = scores.numpy(force=True)
        token = int(values.argmax())
        return float(values[token]), token
    both = torch.stack([part.double() for part in scores.max(-1)])  # so that a card is waited for once
    best, place = both.tolist()
    return best, int(place)


def _probabilities(scores: Tensor, node: int) -> Tensor:
    """Softmax [vocabulary] in fp64: what a rejection leaves is a small difference."""
    p = torch.softmax(scores.double(), -1)
    if not p[0] >= 0:  # the sum reaches every token, so one NaN, or nothing but -inf, makes them all NaN
        raise _no_token(scores, node)
    return p


def _draw(p: Tensor, generator: torch.Generator) -> int:
    """A token with probability `p` [vocabulary], by one number from a generator on any device."""
    sums = p.cumsum(-1)
    token = int(torch.searchsorted(sums, _uniform(generator) * sums[-1], right=True))
    # Rounding may lead past the last token that has any.
    return token if token < len(p) and p[token] > 0 else int(p.argmax())


def _uniform(generator: torch.Generator) -> float:
    return float(torch.rand((), dtype=torch.float64, generator=generator, device=generator.device))


def _no_token(scores: Tensor, node: int) -> UsageError:
    where = "the root" if node == ROOT else f"node {node}"
    if bool((scores == -math.inf).all()):
        return UsageError(
            f"the logits processors ban all {len(scores)} tokens after {where}; leave at least one of them"
        )
    unfit = int((~torch.isfinite(scores) & (scores != -math.inf)).sum())
    return UsageError(
        f"{unfit} of {len(scores)} scores of the target after {where} are not numbers; look for an overflow in the "
        "model (try dtype float32) or in the logits processors"
    )
