"""The decode loop: draft a tree, verify it in one pass of the target, keep what is accepted, and repeat.

The verification rule alone decides what is emitted. The loop knows one request, a run of the target and the scheduler
of drafters; it does not know weights or tiers.
"""

import time

import torch
from torch import Tensor

from tiercache.decode.request import Request
from tiercache.decode.scheduler import DrafterScheduler
from tiercache.decode.verify import Rule
from tiercache.draft.base import Context, Feedback, Noise
from tiercache.draft.tree import ROOT, DraftTree
from tiercache.errors import ContextExceededError, DraftError
from tiercache.kv.speckv import AHEAD, WINDOW
from tiercache.kv.tree_pass import TreeRun


class DecodeLoop:
    """Writes one request's text to its end.

    Args:
        run: the target; what it has committed is the beginning of the prompt.
        request: the call.
        scheduler: chooses the drafter and the size of each tree.
        rule: the verification rule; it decides which part of a tree is accepted.
        noise: the rule's, by position; None in greedy decoding.
        vocabulary: size of the target's vocabulary.
        keep: tokens of the prompt whose keys and values are kept (SpecKV, lossy); None for all.
    """

    def __init__(
        self,
        run: TreeRun,
        request: Request,
        scheduler: DrafterScheduler,
        rule: Rule,
        noise: Noise | None,
        vocabulary: int,
        keep: int | None = None,
    ) -> None:
        self._run, self._request, self._scheduler, self._rule = run, request, scheduler, rule
        self._keep = None if keep is None or keep >= request.length else keep  # None once it is done
        tokens = request.text[0, request.padding :].tolist()
        processors = request.node_processors()
        self._context = Context(tokens, vocabulary, noise, processors, request.limit - request.length, run)

    def write(self, piece: int | None) -> None:
        """Prefill what is left of the prompt, `piece` tokens at a time if given, and decode until the request ends."""
        ended = self._prefill(piece)
        while not ended:
            ended = self._round()
        self._scheduler.end()

    def _prefill(self, piece: int | None) -> bool:
        """The prompt; returns whether the text has ended with the first token."""
        self._refuse_beyond()
        prompt = self._request.text[0, self._run.length :]
        rows = torch.empty(0)
        for part in prompt.split(piece or len(prompt)):
            rows = self._run.prefill(part)
        self._scheduler.begin(self._context)
        ended, emitted, _ = self._accept(DraftTree(), rows[-1:])
        self._scheduler.tell(Feedback(DraftTree(), (), emitted, None, rows[-1:]))
        return ended

    def _round(self) -> bool:
        """One tree; returns whether the text has ended."""
        run, context, scheduler = self._run, self._context, self._scheduler
        begin = time.perf_counter()
        context.room = self._request.limit - self._request.length
        self._refuse_beyond()
        tree, plan, passes = scheduler.propose(context.room, None if self._keep is None else AHEAD)
        if len(tree):
            tree = self._fit(tree)
        drafted = time.perf_counter()
        if self._keep is not None:
            self._evict(tree)
            evicted = time.perf_counter() - drafted  # part of the prompt
            begin, drafted = begin + evicted, drafted + evicted
        logits = run.run((context.tokens[-1], *tree.tokens), (ROOT, *(parent + 1 for parent in tree.parents)))
        ended, emitted, path = self._accept(tree, logits)
        kept = path if len(path) < len(emitted) else path[:-1]  # the text ended within: its last token has no KV yet
        run.commit((0, *(node + 1 for node in kept)))
        done = time.perf_counter()
        feedback = Feedback(tree, path, emitted, None, logits)
        del logits
        scheduler.observe(plan, passes, feedback, done - drafted, begin)
        return ended

    def _evict(self, tree: DraftTree) -> None:
        """Evict the prompt's keys and values but those with most attention from its newest and the drafted tokens."""
        assert self._keep is not None
        prompt = torch.tensor(self._context.tokens[-1 - WINDOW : -1], device=self._request.text.device)
        chain = [tree.tokens[node] for node in _first_path(tree)]
        self._run.evict(prompt, [self._context.tokens[-1], *chain], self._keep)
        self._keep = None

    def _accept(self, tree: DraftTree, logits: Tensor) -> tuple[bool, tuple[int, ...], tuple[int, ...]]:
        """Write the accepted tokens and the target's own; whether the text ended, the tokens, the accepted nodes."""
        request, context = self._request, self._context
        emitted: list[int] = []
        path: list[int] = []
        ended = False

        def scores(node: int) -> Tensor:
            return request.shaped(logits[node + 1])

        for token, node in self._rule.walk(tree, scores, len(context.tokens)):
            emitted.append(token)
            if node is not None:
                path.append(node)
            ended = request.write(token)
            if ended:
                break
        context.tokens += emitted
        return ended, tuple(emitted), tuple(path)

    def _refuse_beyond(self) -> None:
        """As a plain pass would: the KV cache that was reserved is full."""
        length, context = self._request.length, self._scheduler.context
        if length > context:
            raise ContextExceededError(
                f"this pass needs a KV cache of {length} tokens, context={context} was reserved; open the model with "
                f"context={length} or more"
            )

    def _fit(self, tree: DraftTree) -> DraftTree:
        """Without what cannot be accepted or run: foreign tokens, nodes too many or deep, a chain model's branches."""
        if not isinstance(tree, DraftTree):
            raise DraftError(f"a drafter proposed a {type(tree).__name__}, not a DraftTree; draft.tree.chain makes one")
        deepest = self._context.room - 1
        keep = [
            node
            for node, token in enumerate(tree.tokens[: self._scheduler.most_nodes])
            if 0 <= token < self._context.vocabulary and tree.depths[node] <= deepest
        ]
        if len(keep) < len(tree):
            tree = tree.pruned(keep)
        if not self._run.supports_tree and not tree.is_chain:
            tree = tree.pruned(_first_path(tree))
        return tree


def _first_path(tree: DraftTree) -> list[int]:
    """The nodes that come by always taking the first child."""
    chain: list[int] = []
    while children := tree.children.get(chain[-1] if chain else ROOT):
        chain.append(children[0])
    return chain
