"""Generates answers with one offloaded model, one at a time.

Knows requests, the model's `generate` and its KV cache; it does not know weights, tiers, or who asks.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import transformers

from tiercache.compat import cache_kwargs
from tiercache.errors import ContextExceededError, UsageError
from tiercache.generation.answer import Answer, FinishReason, PassProgress, Piece, TokenLogprob
from tiercache.generation.detokenizer import Detokenizer
from tiercache.generation.kept_cache import KeptCache, empty_cache
from tiercache.generation.layer_watch import PassCancelledError, watched_layers
from tiercache.generation.logprobs import logprobs
from tiercache.generation.request import GenerationRequest
from tiercache.generation.writer import AnswerWriter

Emit = Callable[[Piece], None]
Cancelled = Callable[[], bool]
Progress = Callable[[PassProgress], None]


def _never() -> bool:
    return False


def _nobody(_: object) -> None:
    return None


class TextGenerator:
    """Answers requests in the calling thread. The KV cache of the last text is kept for the chat's next turn.

    Args:
        model: opened by `tiercache.offload`.
        tokenizer: its own.

    Attributes:
        context: tokens of prompt and answer at most.

    Raises:
        UsageError: the model is not offloaded.
    """

    def __init__(self, model: transformers.PreTrainedModel, tokenizer: Any) -> None:
        handle = getattr(model, "tiercache", None)
        if handle is None:
            raise UsageError("this model is not offloaded; open it with tiercache.offload(...)")
        self._model, self._tokenizer, self._handle = model, tokenizer, handle
        self.context: int = handle.limits.context
        self._rows: int = handle.limits.logits
        self._drafts = handle.limits.tree_slots is not None
        self._kept = KeptCache(lambda: empty_cache(model, handle.limits.tree_slots))
        self._end_tokens = _end_tokens(model, tokenizer)

    def generate(
        self,
        request: GenerationRequest,
        *,
        emit: Emit = _nobody,
        cancelled: Cancelled = _never,
        progress: Progress = _nobody,
    ) -> Answer:
        """Write the answer.

        After an exception, Ctrl-C among them, the generator answers the next request as ever.

        Args:
            request: what is asked.
            emit: is given each piece of text.
            cancelled: whether to end the answer where it is; asked at each layer of each pass.
            progress: is told of each layer of each pass.

        Raises:
            ContextExceededError: prompt and answer are more tokens than the context that was reserved.
        """
        prompt = len(request.ids)
        needed = prompt + request.max_new_tokens
        if needed > self.context:
            raise ContextExceededError(
                f"a prompt of {prompt} tokens and {request.max_new_tokens} new ones need a context of {needed}, "
                f"{self.context} were reserved; ask for fewer, or open the model with context={needed} or more"
            )
        self._handle.begin_text()
        cache, reused = self._kept.take(request.ids)
        writer = AnswerWriter(request, Detokenizer(self._tokenizer, request.ids, request.stop), emit)
        finish: FinishReason | None = None

        def reached(layer: int, layers: int) -> None:
            done = len(writer.tokens)
            phase, tokens = ("decode", done) if done else ("prefill", prompt - reused)
            progress(PassProgress(cast(Any, phase), layer, layers, tokens))

        try:
            with watched_layers(self._model, reached, cancelled):
                self._run(request, writer, cache)
            held = prompt + len(writer.tokens) - 1  # the last token has been through no pass
        except PassCancelledError:
            held, finish = self._whole(prompt, reused, writer), "cancelled"
        except BaseException:
            held = self._whole(prompt, reused, writer)
            raise
        finally:
            self._kept.keep(cache, [*request.ids, *writer.tokens][:held], prompt)
        return writer.answer(finish or self._finish_reason(writer), reused)

    def score(
        self, ids: tuple[int, ...], top: int, *, cancelled: Cancelled = _never, progress: Progress = _nobody
    ) -> tuple[TokenLogprob, ...]:
        """How likely each token of a text is behind those before it.

        The text goes through in passes of as many tokens as rows of logits were reserved. Its KV cache is kept, so
        that an answer to the same text needs one token more.

        Args:
            ids: the text.
            top: likeliest tokens to name beside each.
            cancelled, progress: as of `generate`.

        Raises:
            UsageError: an empty text.
            ContextExceededError: it is longer than the context.
            PassCancelledError: it was cancelled.
        """
        if not ids:
            raise UsageError("an empty text has no tokens to score; give some")
        if len(ids) > self.context:
            raise ContextExceededError(
                f"a text of {len(ids)} tokens needs a context of as many, {self.context} were reserved; open the model "
                f"with context={len(ids)} or more"
            )
        self._handle.begin_text()
        self.forget()
        cache = empty_cache(self._model, self._handle.limits.tree_slots)
        found = [TokenLogprob(ids[0], None)]
        tokens = torch.tensor([ids], device=self._model.device)

        def reached(layer: int, layers: int) -> None:
            progress(PassProgress("prefill", layer, layers, len(ids)))

        with torch.no_grad(), watched_layers(self._model, reached, cancelled):
            for first in range(0, len(ids) - 1, self._rows):
                part = tokens[:, first : min(first + self._rows, len(ids) - 1)]
                logits = self._model(input_ids=part, use_cache=True, **cache_kwargs(self._model, cache)).logits[0]
                found += logprobs(logits, ids[first + 1 : first + 1 + len(logits)], top)
        self._kept.keep(cache, ids[:-1], len(ids) - 2)
        return tuple(found)

    def forget(self) -> None:
        """Give the kept KV cache back."""
        self._kept.forget()

    def _run(self, request: GenerationRequest, writer: AnswerWriter, cache: transformers.Cache) -> None:
        """transformers' `generate`, or the drafted one; the writer is given every token."""
        if request.seed is not None:
            torch.manual_seed(request.seed)
        ids = torch.tensor([request.ids], device=self._model.device)
        padding = self._tokenizer.pad_token_id
        self._model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=writer,
            stopping_criteria=transformers.StoppingCriteriaList([writer.criterion]),
            logits_processor=transformers.LogitsProcessorList([writer.last] if request.logprobs is not None else []),
            max_new_tokens=request.max_new_tokens,
            eos_token_id=self._end_tokens or None,
            pad_token_id=padding if padding is not None else next(iter(self._end_tokens), 0),
            **request.sampling,
            **cache_kwargs(self._model, cache),
        )

    def _whole(self, prompt: int, reused: int, writer: AnswerWriter) -> int:
        """Tokens whose keys and values every layer has, after a pass that was broken off."""
        if not writer.tokens:
            return reused
        return prompt if self._drafts else prompt + len(writer.tokens) - 1

    def _finish_reason(self, writer: AnswerWriter) -> FinishReason:
        ended = writer.stopped or writer.tokens[-1] in self._end_tokens
        return "stop" if ended else "length"


def _end_tokens(model: transformers.PreTrainedModel, tokenizer: Any) -> list[int]:
    """Tokens that end a text: those of the checkpoint's generation defaults, and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    tokens = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*tokens, tokenizer.eos_token_id) if token is not None})
