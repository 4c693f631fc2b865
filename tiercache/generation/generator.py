"""Generates answers with one offloaded model, one at a time.

Knows requests, the model's `generate` and its KV cache; it does not know weights, tiers, or who asks.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers

from tiercache.compat import cache_kwargs
from tiercache.errors import ContextExceededError, UsageError
from tiercache.generation.answer import Answer, PassProgress, Piece, TokenLogprob
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
        self._limits = handle.limits
        self._kept = KeptCache(self._empty_cache)
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
        self._check_room(request)
        prompt = len(request.ids)
        self._handle.begin_text()
        prompt_before = self._kept.prompt
        cache, reused = self._kept.take(request.ids)
        writer = AnswerWriter(request, Detokenizer(self._tokenizer, request.ids, request.stop), emit)
        cut_off, held = False, 0

        def reached(layer: int, layers: int) -> None:
            if writer.tokens:
                progress(PassProgress("decode", layer, layers, len(writer.tokens)))
            else:
                progress(PassProgress("prefill", layer, layers, prompt - reused))

        try:
            with watched_layers(self._model, reached, cancelled):
                self._run(request, writer, cache)
            held = prompt + len(writer.tokens) - 1  # the last token has been through no pass
        except PassCancelledError:
            cut_off, held = True, self._whole(prompt, reused, writer)
        except BaseException:
            held = self._whole(prompt, reused, writer)
            raise
        finally:
            asked = prompt if writer.tokens else prompt_before  # a broken-off prefill leaves the turns before it
            self._kept.keep(cache, [*request.ids, *writer.tokens][:held], asked)
        return writer.answer(self._end_tokens, cut_off=cut_off, reused=reused)

    def score(
        self, ids: tuple[int, ...], top: int, *, cancelled: Cancelled = _never, progress: Progress = _nobody
    ) -> tuple[TokenLogprob, ...]:
        """How likely each token of a text is behind those before it.

        The text goes through in passes of as many tokens as rows of logits were reserved. Its KV cache is kept, so
        that an answer to the same text needs one token more. A model with a state of all tokens takes the text in one
        pass.

        Args:
            ids: the text.
            top: likeliest tokens to name beside each.
            cancelled, progress: as of `generate`.

        Raises:
            UsageError: an empty text.
            ContextExceededError: it is longer than the context, or than the one pass that it has to go through.
            PassCancelledError: it was cancelled.
        """
        if not ids:
            raise UsageError("an empty text has no tokens to score; give some")
        if len(ids) > self.context:
            raise ContextExceededError(
                f"a text of {len(ids)} tokens needs a context of as many, {self.context} were reserved; open the model "
                f"with context={len(ids)} or more"
            )
        rows = self._limits.logits
        if not self._limits.keeps_cache and len(ids) - 1 > rows:
            raise ContextExceededError(
                f"this model takes a text in one pass, which for {len(ids)} tokens returns {len(ids) - 1} rows of "
                f"logits, {rows} were reserved; open it with logits={len(ids) - 1} or more"
            )
        self._handle.begin_text()
        self.forget()
        cache = self._empty_cache()
        found = [TokenLogprob(ids[0], None)]
        tokens = torch.tensor([ids], device=self._model.device)

        def reached(layer: int, layers: int) -> None:
            progress(PassProgress("prefill", layer, layers, len(ids)))

        with torch.no_grad(), watched_layers(self._model, reached, cancelled):
            for first in range(0, len(ids) - 1, rows):
                part = tokens[:, first : min(first + rows, len(ids) - 1)]
                logits = self._model(input_ids=part, use_cache=cache is not None, **self._given(cache)).logits[0]
                found += logprobs(logits, ids[first + 1 : first + 1 + len(logits)], top)
        self._kept.keep(cache, ids[:-1], len(ids) - 1)
        return tuple(found)

    def forget(self) -> None:
        """Give the kept KV cache back."""
        self._kept.forget()

    def _check_room(self, request: GenerationRequest) -> None:
        needed = len(request.ids) + request.max_new_tokens
        if needed > self.context:
            raise ContextExceededError(
                f"a prompt of {len(request.ids)} tokens and {request.max_new_tokens} new ones need a context of "
                f"{needed}, {self.context} were reserved; ask for fewer, or open the model with context={needed}"
            )

    def _empty_cache(self) -> transformers.Cache | None:
        return empty_cache(self._model, self._limits.cache_slots) if self._limits.keeps_cache else None

    def _given(self, cache: transformers.Cache | None) -> dict[str, Any]:
        return {} if cache is None else cache_kwargs(self._model, cache)

    def _run(self, request: GenerationRequest, writer: AnswerWriter, cache: transformers.Cache | None) -> None:
        """transformers' `generate`, or the drafted one; the writer is given every token.

        What the checkpoint's generation defaults say holds, but for beams, of which there is one.
        """
        if request.seed is not None:
            torch.manual_seed(request.seed)
        ids = torch.tensor([request.ids], device=self._model.device)
        padding = self._tokenizer.pad_token_id
        self._model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            streamer=writer,
            stopping_criteria=transformers.StoppingCriteriaList([writer.criterion]),
            tokenizer=self._tokenizer,  # of stop strings among the defaults
            num_beams=1,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=self._end_tokens or None,
            pad_token_id=padding if padding is not None else next(iter(self._end_tokens), 0),
            **request.sampling,
            **self._watched_logits(request, writer),
            **self._given(cache),
        )

    def _watched_logits(self, request: GenerationRequest, writer: AnswerWriter) -> dict[str, Any]:
        """Arguments of `generate` that let the writer see the model's own logits: penalties come behind it."""
        if request.logprobs is None:
            return {}
        processors: list[transformers.LogitsProcessor] = [writer.last]
        penalty = self._model.generation_config.repetition_penalty or 1.0
        if penalty != 1:
            processors.append(transformers.RepetitionPenaltyLogitsProcessor(penalty))
        return {"logits_processor": transformers.LogitsProcessorList(processors), "repetition_penalty": 1.0}

    def _whole(self, prompt: int, reused: int, writer: AnswerWriter) -> int:
        """Tokens whose keys and values every layer has, after a pass that was broken off."""
        if not writer.tokens:
            return reused
        return prompt + len(writer.tokens) - 1 if self._limits.cache_slots is None else prompt


def _end_tokens(model: transformers.PreTrainedModel, tokenizer: Any) -> list[int]:
    """Tokens that end a text: those of the checkpoint's generation defaults, and the tokenizer's."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    tokens = configured if isinstance(configured, list) else [configured]
    return sorted({token for token in (*tokens, tokenizer.eos_token_id) if token is not None})
