"""Watches the model's own forward: refuses passes that would outgrow what was reserved, and times the others.

Knows the arguments of a transformers forward; nothing of weights or tiers.
"""

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch.utils.hooks import RemovableHandle

from tiercache.compat import cache_in
from tiercache.errors import ClosedError, ContextExceededError, UsageError
from tiercache.stats.run import Stats
from tiercache.tiers.device import device_of


class NextPass:
    """Which kind the next pass is.

    Attributes:
        resident: it multiplies by the planes that stay in the fastest tier, and by no others.
        begins_text: what passed before it was no decoding, but waiting for somebody to ask.
    """

    def __init__(self) -> None:
        self.resident = self.begins_text = False


class PassHooks:
    """The hooks of the whole model.

    Args:
        model: the model.
        stats: where passes are counted.
        context: tokens, over the batch, that a KV cache may hold.
        logits: rows of logits that a pass may return.
        passes: says of each pass, when it begins, whether it is resident; such passes are counted apart.
        start: called before each pass with the tokens it carries, and whether it is resident.
        finish: called after each pass, also after one that failed.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        stats: Stats,
        *,
        context: int,
        logits: int,
        passes: NextPass,
        start: Callable[[int, bool], None],
        finish: Callable[[], None],
    ) -> None:
        self._stats, self._context, self._logits = stats, context, logits
        self._passes, self._start, self._finish = passes, start, finish
        self._resident = False  # the pass at hand
        self._runner: threading.Thread | None = None
        self._choosing = threading.Lock()
        self._began_at = 0.0
        self._verifies = False  # a drafted tree
        self._alone = False  # the inner model was called without the whole
        self._past: int | None = None  # tokens before the pass at hand, if it is one of one token
        self._decoding_since: float | None = None
        self._hooks: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
            *self._inner_hooks(model),
            model.register_state_dict_pre_hook(_refuse_state_dict),
        ]

    def _inner_hooks(self, model: transformers.PreTrainedModel) -> list[RemovableHandle]:
        """The same limits for calls of the inner model alone, which returns hidden states and no logits."""
        inner = model.base_model
        if inner is model:
            return []
        return [
            inner.register_forward_pre_hook(self._begin_inner, with_kwargs=True),
            inner.register_forward_hook(self._end_inner, always_call=True),
        ]

    def _begin_inner(self, inner: torch.nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        if self._runner is not threading.current_thread():
            self._alone = True
            self._begin(inner, arguments, {**named, "logits_to_keep": 1})

    def _end_inner(self, inner: torch.nn.Module, arguments: object, output: object) -> None:
        if self._alone:
            self._end(inner, arguments, output)

    def close(self) -> None:
        """Remove the hooks."""
        while self._hooks:
            self._hooks.pop().remove()

    def _begin(self, model: torch.nn.Module, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        sequences, new, past = _shape(arguments, named)
        self._refuse(sequences, new, past, named)
        self._enter()
        self._resident = self._passes.resident
        self._start(sequences * new, self._resident)
        if self._resident:  # the clock of the steps around it runs on
            self._stats.draft_passes += 1
            self._stats.draft_tokens += sequences * new
            return
        now = time.perf_counter()
        begins_text, self._passes.begins_text = self._passes.begins_text, False
        if begins_text:
            self._decoding_since = None
        if self._decoding_since is not None and new == 1 and past > 0:
            self._stats.decode_s += now - self._decoding_since
            self._stats.decode_tokens += sequences
        self._decoding_since = now if new == 1 and past > 0 else None
        self._began_at = now
        self._past = past if sequences == 1 and new == 1 else None
        self._verifies = past > 0 and not begins_text and self._stats.drafting is not None
        self._stats.passes += 1
        self._stats.tokens += sequences * new
        if past == 0:
            self._stats.prefill_tokens += sequences * new

    def _end(self, model: torch.nn.Module, arguments: object, output: object) -> None:
        if self._runner is not threading.current_thread():
            return  # refused before it began
        if self._decoding_since is None and not self._resident and not self._verifies:
            device_of(torch.device(self._stats.device)).synchronize()
            self._stats.add_prefill(time.perf_counter() - self._began_at)
        done = output is not None  # nothing came of a pass that raised
        if done and self._past is not None and not self._resident and not self._verifies:
            self._stats.add_token_pass(time.perf_counter() - self._began_at, self._past)
        self._finish()
        self._runner, self._alone = None, False

    def _enter(self) -> None:
        """Make this thread the one that runs. A pass of its own that never ended was cut off by Ctrl-C."""
        with self._choosing:
            runner, this = self._runner, threading.current_thread()
            if runner is not None and runner is not this and runner.is_alive():
                raise UsageError(
                    "this model is running in another thread; its weights pass through one buffer: let that call end"
                )
            self._runner = this
        if runner is not None:
            self._finish()

    def _refuse(self, sequences: int, new: int, past: int, named: Mapping[str, Any]) -> None:
        embeds = named.get("inputs_embeds")
        if isinstance(embeds, torch.Tensor) and embeds.requires_grad and torch.is_grad_enabled():
            raise UsageError("gradients cannot flow through weights that pass on; call the model under torch.no_grad()")
        held = sequences * (past + new)
        if held > self._context:
            raise ContextExceededError(
                f"this pass needs a KV cache of {held} tokens ({sequences} x {past + new}), context={self._context} "
                f"was reserved; open the model with context={held} or more"
            )
        keep = named.get("logits_to_keep", 0)
        rows = sequences * (min(keep, new) if isinstance(keep, int) and keep else new)
        if rows > self._logits:
            raise ContextExceededError(
                f"this pass returns {rows} rows of logits, logits={self._logits} was reserved; pass logits_to_keep=1, "
                f"or open the model with logits={rows}"
            )


def _shape(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[int, int, int]:
    """Sequences, new tokens of each, and tokens of each already in the KV cache."""
    ids = arguments[0] if arguments else named.get("input_ids")
    if ids is None:
        ids = named.get("inputs_embeds")
    if not isinstance(ids, torch.Tensor):
        return 0, 0, 0  # the model will say what it lacks
    cache = cache_in(arguments, named)
    past = 0 if cache is None else int(cache.get_seq_length())
    return ids.shape[0], ids.shape[1], past


def _refuse_state_dict(module: torch.nn.Module, *_: object) -> None:
    raise UsageError(
        "an offloaded model has no weights of its own to save; leave the offload context first, or copy the checkpoint"
    )


def refuse_closed(module: torch.nn.Module, *_: object) -> None:
    """A forward pre-hook for a model whose tiers are gone."""
    raise ClosedError("this model's weights were given back when its offload context ended; open it again")
