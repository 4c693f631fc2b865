"""Takes the tokens of one answer as `generate` finds them, and makes pieces of text of them. Knows no model."""

import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from tiercache.compat import BaseStreamer
from tiercache.generation.answer import Answer, FinishReason, Piece, TokenLogprob
from tiercache.generation.detokenizer import Detokenizer
from tiercache.generation.logprobs import LastLogits, logprob
from tiercache.generation.request import GenerationRequest


class AnswerWriter(BaseStreamer):
    """A streamer of transformers, which is given the prompt first and then each new token.

    Args:
        request: what is answered.
        detokenizer: of the answer.
        emit: is given each piece.

    Attributes:
        tokens: the new ones so far.
        last: keeps the logits of the next token; a processor for `generate` where log-probabilities are wanted.
        stopped: a stop string has come.
    """

    def __init__(self, request: GenerationRequest, detokenizer: Detokenizer, emit: Callable[[Piece], None]) -> None:
        self._request, self._detokenizer, self._emit = request, detokenizer, emit
        self._began = time.perf_counter()
        self._first_s: float | None = None
        self._prompt_is_over = False
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._told = 0  # tokens that have been part of a piece
        self.tokens: list[int] = []
        self.last = LastLogits()

    @property
    def stopped(self) -> bool:
        """Whether the answer ends here for its text."""
        return self._detokenizer.stopped

    def put(self, value: Tensor) -> None:
        """The prompt, or new tokens [n]."""
        if not self._prompt_is_over:
            self._prompt_is_over = True
            return
        for token in value.flatten().tolist():
            self._add(token)

    def end(self) -> None:
        """Nothing comes any more; `answer` tells what is left."""

    def criterion(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """A stopping criterion for `generate`: [sequences]."""
        return torch.full((input_ids.shape[0],), self.stopped, dtype=torch.bool, device=input_ids.device)

    def answer(self, end_tokens: Collection[int], *, cut_off: bool, reused: int) -> Answer:
        """The whole answer; a last piece is told with what was held back.

        Args:
            end_tokens: those that end a text.
            cut_off: it was cancelled.
            reused: prompt tokens whose keys and values were kept.
        """
        left = self._detokenizer.end()
        if left or self._told < len(self.tokens):
            self._tell(left)
        return Answer(
            text="".join(self._texts),
            tokens=tuple(self.tokens),
            finish_reason="cancelled" if cut_off else self._finish_reason(end_tokens),
            prompt_tokens=len(self._request.ids),
            reused_tokens=reused,
            first_token_s=self._first_s,
            seconds=time.perf_counter() - self._began,
            logprobs=tuple(self._logprobs),
        )

    def _finish_reason(self, end_tokens: Collection[int]) -> FinishReason:
        ended = self.stopped or self.tokens[-1] in end_tokens or len(self.tokens) < self._request.max_new_tokens
        return "stop" if ended else "length"

    def _add(self, token: int) -> None:
        if self._first_s is None:
            self._first_s = time.perf_counter() - self._began
        if self.stopped:  # a drafted tree may bring more in the same pass
            return
        self.tokens.append(token)
        if self._request.logprobs is not None:
            self._logprobs.append(logprob(self.last.row, token, self._request.logprobs))
        text = self._detokenizer.add(token)
        if text:
            self._tell(text)

    def _tell(self, text: str) -> None:
        some = slice(self._told, len(self.tokens))
        self._told = len(self.tokens)
        self._texts.append(text)
        self._emit(Piece(text, tuple(self.tokens[some]), tuple(self._logprobs[some])))
