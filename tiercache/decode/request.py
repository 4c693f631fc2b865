"""One call of `generate`, as the decode loop needs it: its text, logits processors, stopping criteria and streamer.

Knows the arguments of transformers' `_sample`; it does not know trees or drafters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor

from tiercache.compat import logits_process
from tiercache.decode.warpers import processed

# Processors that look at each row's own tokens and logits and nothing else, so that a drafter may ask them of any
# node; the others (guidance by a second pass, prefix functions, the user's own) are the verifier's alone.
_ROWWISE = (
    *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "MinPLogitsWarper", "TypicalLogitsWarper"),
    *("EpsilonLogitsWarper", "EtaLogitsWarper", "RepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor"),
    *("SuppressTokensLogitsProcessor", "NoBadWordsLogitsProcessor", "SequenceBiasLogitsProcessor"),
)


@dataclass
class Request:
    """The text of one call so far, and what processes, stops and streams it.

    Attributes:
        ids: room for the whole text [1, capacity]; the first `length` are written.
        length: tokens of it, padding included.
        padding: how many of the first are padding.
        processors: change logits before a token is chosen: (ids [1, length], logits [1, vocabulary]) -> scores.
        criteria: whether the text ends here: (ids [1, length], None) -> [1].
        streamer: is given each token.
        limit: tokens of the whole text at most.
        keep_scores, keep_logits: collect them for each emitted token.
    """

    ids: Tensor
    length: int
    padding: int
    processors: Sequence[Any]
    criteria: Callable[[Tensor, Any], Tensor]
    streamer: Any
    limit: int
    keep_scores: bool = False
    keep_logits: bool = False
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def text(self) -> Tensor:
        """What is written [1, length]."""
        return self.ids[:, : self.length]

    def shaped(self, row: Tensor) -> Tensor:
        """The scores [vocabulary] of the next token from its logits [vocabulary]; called once for each token.

        Not to be changed in place.
        """
        if not self.processors and not self.keep_logits and not self.keep_scores:
            return row.float()
        logits = row.to(torch.float32, copy=True)[None]
        if self.keep_logits:
            self.logits.append(logits.clone())
        scores: Tensor = logits
        for processor in self.processors:
            scores = processed(processor, self.text, scores)
        if self.keep_scores:
            self.scores.append(scores)
        return scores[0]

    def write(self, token: int) -> bool:
        """Add one token; returns whether the text ends with it."""
        if self.length == self.ids.shape[1]:
            self.ids = torch.cat([self.ids, torch.empty_like(self.ids)], dim=1)
        self.ids[0, self.length] = token
        self.length += 1
        if self.streamer is not None:
            self.streamer.put(torch.tensor([token], dtype=self.ids.dtype))
        ends = [self._ends(criterion, token) for criterion in self._criteria]  # each is asked, for it may keep state
        return any(ends)

    @cached_property
    def _criteria(self) -> Sequence[Callable[[Tensor, Any], Tensor]]:
        """One by one, where there are several."""
        return self.criteria if isinstance(self.criteria, transformers.StoppingCriteriaList) else (self.criteria,)

    @cached_property
    def _end_tokens(self) -> frozenset[int]:
        """Of the criteria that go by the newest token alone."""
        known = (each.eos_token_id for each in self._criteria if type(each) is transformers.EosTokenCriteria)
        return frozenset(token for tokens in known for token in tokens.tolist())

    def _ends(self, criterion: Callable[[Tensor, Any], Tensor], token: int) -> bool:
        """Whether the text ends by a criterion; of the two that every call has, without an operation on tensors."""
        if type(criterion) is transformers.EosTokenCriteria:
            return token in self._end_tokens
        if type(criterion) is transformers.MaxLengthCriteria:
            most = criterion.max_position_embeddings
            if most is None or self.length <= most:  # of what is longer, it warns
                return self.length >= criterion.max_length
        return bool(criterion(self.text, tuple(self.scores) if self.keep_scores else None).all())

    def node_processors(self) -> Callable[[Sequence[Sequence[int]], Tensor], Tensor] | None:
        """The processors that a drafter may ask of any node (see `NodeProcessors`); None where there are none."""
        own = [p for p in self.processors if type(p).__name__ in _ROWWISE and _theirs(p)]
        if not own:
            return None
        if all(isinstance(p, logits_process.TemperatureLogitsWarper) for p in own):
            return lambda paths, logits: _through(own, self.text, logits)

        def process(paths: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
            scores = torch.empty_like(logits)
            for length in {len(path) for path in paths}:
                rows = [row for row, path in enumerate(paths) if len(path) == length]
                tails = torch.tensor([paths[row] for row in rows], dtype=torch.long, device=self.ids.device)
                ids = torch.cat([self.text.expand(len(rows), -1), tails.view(len(rows), length)], dim=1)
                scores[rows] = _through(own, ids, logits[rows])
            return scores

        return process


def _theirs(processor: object) -> bool:
    return type(processor).__module__ == logits_process.__name__


def _through(processors: Sequence[Any], ids: Tensor, logits: Tensor) -> Tensor:
    for processor in processors:
        logits = processor(ids, logits)
    return logits
