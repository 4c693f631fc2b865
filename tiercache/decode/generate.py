"""Lets `model.generate` draft by itself, for as long as the model is attached.

transformers looks a decoding method up on the model's class, so the model is given a subclass of its own class, of the
same name, whose `_sample` is ours; everything around it (options, processors, stop strings, streamers) stays theirs.

Knows the arguments of `generate`; it does not know weights or tiers.
"""

import copy
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers

from tiercache import compat
from tiercache.decode.loop import DecodeLoop
from tiercache.decode.request import Request
from tiercache.decode.scheduler import DrafterScheduler
from tiercache.decode.verify import Rule
from tiercache.draft.noise import GumbelNoise
from tiercache.errors import UsageError
from tiercache.kv.cache import TreeCache, support
from tiercache.kv.tree_pass import TreeRun
from tiercache.progress import note

# Arguments of a forward that the decode loop sets itself, or that change nothing.
_OURS = (
    *compat.CACHE_NAMES,
    *("cache_position", "attention_mask", "position_ids"),
    *("use_cache", "logits_to_keep"),
    "tokenizer",  # of stop strings, which are among the criteria already
)

# The KV cache that the call of `generate` under way was given: `_sample` gets one either way, and only newer
# transformers note whose it is.
_given_cache: ContextVar[Any] = ContextVar("given_cache", default=None)

# Makes the rule of one request from its noise, which is None in greedy decoding.
RuleMaker = Callable[[GumbelNoise | None], Rule]


@dataclass(frozen=True)
class DraftingLimits:
    """How large the KV cache of a request may become.

    Attributes:
        tokens: that a sequence may have.
        tree_slots: slots of the KV cache that a draft tree may take beside the sequence.
        kept_prompt: tokens of a prompt whose keys and values are kept (SpecKV); None for all.
    """

    tokens: int
    tree_slots: int
    kept_prompt: int | None = None


class DraftingGenerate:
    """Replaces the model's sampling loop until `close`.

    Args:
        model: the attached model.
        scheduler: chooses the drafter and the size of each tree.
        rule: makes the verification rule of a request.
        limits: of a request.
        required: a call that cannot be drafted for is refused. Otherwise it is decoded plainly, counted and told once.
        reason: why no call is drafted for; empty where some are.
        show: whether notes may be printed.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        scheduler: DrafterScheduler,
        rule: RuleMaker,
        limits: DraftingLimits,
        *,
        required: bool = False,
        reason: str = "",
        show: bool = True,
    ) -> None:
        self._model, self._scheduler, self._rule, self._limits = model, scheduler, rule, limits
        self._required, self._reason, self._show = required, reason, show
        self._support = support(model)
        self.transformers_class = cast(Any, model.__class__)
        self._methods = self._replacements() | {name: _undrafted(self, name) for name in compat.other_loops(model)}
        self.subclass = cast(Any, compat.sampling_class(model, self._methods))
        self.plain = self.transformers_class._sample
        model.__class__ = self.subclass

    def _replacements(self) -> dict[str, Callable[..., Any]]:
        """The methods of the subclass that draft, by name."""
        drafting = self

        def _sample(
            self: Any,
            input_ids: torch.Tensor,
            logits_processor: Any,
            stopping_criteria: Any,
            generation_config: transformers.GenerationConfig,
            synced_gpus: bool = False,
            streamer: Any = None,
            **model_kwargs: Any,
        ) -> Any:
            given = (input_ids, logits_processor, stopping_criteria, generation_config)
            reason = drafting.refusal(input_ids, generation_config, synced_gpus, model_kwargs)
            if reason is not None:
                drafting.do_without(reason)
                if reason == drafting._reason and generation_config.do_sample:
                    return drafting.sampled(self, *given, streamer, model_kwargs)
                return drafting.plain(self, *given, synced_gpus, streamer, **model_kwargs)
            return drafting.run(*given, streamer, model_kwargs)

        def generate(self: Any, *arguments: Any, **named: Any) -> Any:
            if named.get("custom_generate") is not None:  # a decoding loop of the caller's, which asks none of ours
                drafting.do_without("custom_generate=")
            given = [named[name] for name in compat.CACHE_NAMES if named.get(name) is not None]
            token = _given_cache.set(given[0] if given else None)
            try:
                return drafting.transformers_class.generate(self, *arguments, **named)
            finally:
                _given_cache.reset(token)

        return {"generate": generate, "_sample": _sample}

    def close(self) -> None:
        """The model has its own class again; harmless when done twice."""
        if self._model.__class__ is self.subclass:
            self._model.__class__ = self.transformers_class
            for name in self._methods:
                delattr(self.subclass, name)  # a class dies with the next collection of garbage alone, a drafter now
            self._methods.clear()

    def refusal(
        self,
        input_ids: torch.Tensor,
        config: transformers.GenerationConfig,
        synced_gpus: bool,
        model_kwargs: dict[str, Any],
    ) -> str | None:
        """Why this call has to be decoded plainly, or None."""
        if self._reason:
            return self._reason
        if input_ids.shape[0] != 1:
            return f"a batch of {input_ids.shape[0]} sequences"
        if self._support.takes == "nothing":
            return self._support.reason
        if not model_kwargs.get("use_cache", True):
            return "use_cache=False"
        if config.output_attentions or config.output_hidden_states:
            return "output_attentions and output_hidden_states"
        if _given_cache.get() is not None and not self._goes_on_from(_given_cache.get(), model_kwargs):
            return "a KV cache of the caller's own"
        if config.cache_implementation not in (None, "dynamic"):
            return f"cache_implementation={config.cache_implementation!r}"
        others = sorted(name for name, value in model_kwargs.items() if name not in _OURS and value is not None)
        if others or synced_gpus:
            return f"the argument {others[0]!r}" if others else "synced_gpus"
        mask, kept = model_kwargs.get("attention_mask"), self._limits.kept_prompt
        if mask is not None and not bool((mask[0].diff() >= 0).all()):
            return "an attention mask that is no left padding"
        if mask is not None and kept is not None and kept < input_ids.shape[1] and not bool(mask.all()):
            return "a padded prompt with speckv="
        return None

    def _goes_on_from(self, cache: object, model_kwargs: dict[str, Any]) -> bool:
        """Whether trees can be run behind what a KV cache holds: an unpadded beginning of the prompt, all of it."""
        mask = model_kwargs.get("attention_mask")
        whole = self._limits.kept_prompt is None and (mask is None or bool(mask.all()))
        return isinstance(cache, TreeCache) and whole and not self._support.recurrent

    def do_without(self, reason: str) -> None:
        """Count a call that cannot be drafted for, and say so once for each reason.

        Raises:
            UsageError: the drafter was asked for by name.
        """
        if self._required:
            raise UsageError(
                f"this call cannot be drafted for, because of {reason}; leave that out, or open the model with "
                "drafter='auto', which then decodes plainly, or without a drafter"
            )
        reasons = self._scheduler.stats.plain_reasons
        if reason not in reasons:
            note(f"decoding without drafting, which this call does not take: {reason}", show=self._show)
        reasons[reason] = reasons.get(reason, 0) + 1

    def sampled(
        self,
        model: Any,
        input_ids: torch.Tensor,
        processors: Any,
        criteria: Any,
        config: transformers.GenerationConfig,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> Any:
        """What plain sampling returns, with the noise of drafted sampling: whether there was room changes no text."""
        mask = model_kwargs.get("attention_mask")
        kept: list[torch.Tensor] | None = [] if config.return_dict_in_generate and config.output_scores else None
        noisy = _Noisy(self._noise(input_ids), 0 if mask is None else int((mask[0] == 0).sum()), kept)
        shaped, likeliest = type(processors)([*processors, noisy]), copy.copy(config)
        likeliest.do_sample = False
        out = self.plain(model, input_ids, shaped, criteria, likeliest, False, streamer, **model_kwargs)
        if kept is not None:
            out.scores = tuple(kept[: len(out.scores)])
        return out

    def _noise(self, input_ids: torch.Tensor) -> GumbelNoise:
        """Of one request; torch.manual_seed decides what is sampled."""
        vocabulary = self._model.config.get_text_config(decoder=True).vocab_size
        return GumbelNoise(int(torch.randint(1 << 62, ())), vocabulary, input_ids.device)

    def run(
        self,
        input_ids: torch.Tensor,
        processors: Any,
        criteria: Any,
        config: transformers.GenerationConfig,
        streamer: Any,
        model_kwargs: dict[str, Any],
    ) -> Any:
        """What `_sample` returns, drafted."""
        mask = model_kwargs.get("attention_mask")
        length = input_ids.shape[1]
        limit = min(criteria.max_length or config.max_length, self._limits.tokens)
        ids = torch.cat([input_ids, input_ids.new_empty(1, max(limit - length, 1))], dim=1)
        padding = 0 if mask is None else int((mask[0] == 0).sum())
        request = Request(ids, length, padding, processors, criteria, streamer, limit)
        if config.return_dict_in_generate:
            request.keep_scores, request.keep_logits = bool(config.output_scores), bool(config.output_logits)
        vocabulary = self._model.config.get_text_config(decoder=True).vocab_size
        noise = self._noise(input_ids) if config.do_sample else None
        slots = limit - 1 + self._limits.tree_slots  # the last token needs no slot
        run = TreeRun(self._model, None if mask is None else mask[0], slots, _given_cache.get())
        kept = self._limits.kept_prompt
        loop = DecodeLoop(run, request, self._scheduler, self._rule(noise), noise, vocabulary, kept)
        loop.write(config.prefill_chunk_size)
        if streamer is not None:
            streamer.end()
        if not config.return_dict_in_generate:
            return request.text.clone()
        parts: dict[str, Any] = {"sequences": request.text.clone()}
        parts |= {"scores": tuple(request.scores)} if request.keep_scores else {}
        parts |= {"logits": tuple(request.logits)} if request.keep_logits else {}
        return compat.generation_output(None if run.evicted else run.cache, **parts)


class _Noisy(transformers.LogitsProcessor):
    """Adds noise to scores, so that the likeliest token is a sampled one; `kept` gets the scores as they were."""

    def __init__(self, noise: GumbelNoise, padding: int, kept: list[torch.Tensor] | None) -> None:
        self._noise, self._padding, self._kept = noise, padding, kept

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [1, vocabulary] of the token after `input_ids` [1, length]."""
        if self._kept is not None:
            self._kept.append(scores)
        return self._noise.added(scores[0], input_ids.shape[1] - self._padding)[None]


def _undrafted(drafting: DraftingGenerate, name: str) -> Callable[..., Any]:
    """A decoding loop of transformers without drafting: beam search, an assistant model of the caller's."""

    def loop(self: Any, *arguments: Any, **named: Any) -> Any:
        drafting.do_without(name.strip("_").replace("_", " "))
        return getattr(drafting.transformers_class, name)(self, *arguments, **named)

    return loop
