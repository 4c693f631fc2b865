"""A generator with the interface of `tiercache.generation` and no model: text follows from the prompt by arithmetic.

For tests of the server alone, which want thousands of answers, or one that lasts.
"""

import math
import time
from collections.abc import Callable
from typing import Any

from tiercache.generation.answer import Answer, FinishReason, PassProgress, Piece, TokenLogprob
from tiercache.generation.layer_watch import PassCancelledError
from tiercache.generation.request import GenerationRequest

LAYERS = 4
END = 1
ENDS_EVERY = 97  # a text's sum that this divides ends it


class FakeGenerator:
    """Letters that depend on all tokens before them.

    Args:
        tokenizer: one token a byte; token 1 ends a text.
        layer_s: seconds of each layer of each pass.
    """

    def __init__(self, tokenizer: Any, context: int = 512, layer_s: float = 0.0) -> None:
        self.context, self._tokenizer, self._layer_s = context, tokenizer, layer_s
        self.letters = tokenizer("abcdefghijklmnopqrstuvwxyz \n")["input_ids"]
        self.passes = 0
        self.last: tuple[int, ...] = ()

    def next(self, ids: list[int], temperature: float = 0.0, seed: int | None = None) -> int:
        """What follows a text."""
        place = sum((number + 1) * token for number, token in enumerate(ids[-8:])) + len(ids)
        if temperature:
            place += 31 * (seed or 0)
        return END if place % ENDS_EVERY == 0 else self.letters[place % len(self.letters)]

    def logprob(self, ids: list[int], token: int, top: int) -> TokenLogprob:
        """Three quarters for what follows, the rest for a neighbour."""
        best = self.next(ids)
        likeliest = ((best, math.log(0.75)), (best + 1, math.log(0.2)), (best + 2, math.log(0.01)))
        return TokenLogprob(token, dict(likeliest).get(token, -12.0), likeliest[:top])

    def generate(
        self,
        request: GenerationRequest,
        *,
        emit: Callable[[Piece], None],
        cancelled: Callable[[], bool],
        progress: Callable[[PassProgress], None],
    ) -> Answer:
        assert len(request.ids) + request.max_new_tokens <= self.context
        began, first, new, logprobs = time.monotonic(), None, [], []
        reused = sum(1 for _ in self._shared(request.ids))
        finish: FinishReason = "length"
        sent = ""
        for _ in range(request.max_new_tokens):
            try:
                self._pass("decode" if new else "prefill", len(new) or len(request.ids) - reused, cancelled, progress)
            except PassCancelledError:
                finish = "cancelled"
                break
            ids = [*request.ids, *new]
            new.append(self.next(ids, request.temperature, request.seed))
            first = first if first is not None else time.monotonic() - began
            found = () if request.logprobs is None else (self.logprob(ids, new[-1], request.logprobs),)
            logprobs += found
            text = self._tokenizer.decode(new, skip_special_tokens=True)
            ends = [text.index(stop) for stop in request.stop if stop in text]
            text = text[: min(ends, default=None)]
            held = 0 if ends else max((len(stop) - 1 for stop in request.stop), default=0)
            certain = text if new[-1] == END or ends else text[: max(0, len(text) - held)]
            if len(certain) > len(sent):
                emit(Piece(certain[len(sent) :], (new[-1],), found))
                sent = certain
            elif found:
                emit(Piece("", (new[-1],), found))
            if ends or new[-1] == END:
                finish = "stop"
                break
        else:
            text = self._tokenizer.decode(new, skip_special_tokens=True)
            emit(Piece(text[len(sent) :], ()))
            sent = text
        self.last = (*request.ids, *new)
        took = time.monotonic() - began
        return Answer(sent, tuple(new), finish, len(request.ids), reused, first, took, tuple(logprobs))

    def score(
        self,
        ids: tuple[int, ...],
        top: int,
        *,
        cancelled: Callable[[], bool],
        progress: Callable[[PassProgress], None],
    ) -> tuple[TokenLogprob, ...]:
        self._pass("prefill", len(ids), cancelled, progress)
        rest = [self.logprob(list(ids[:place]), ids[place], top) for place in range(1, len(ids))]
        return (TokenLogprob(ids[0], None, ()), *rest)

    def statistics(self) -> dict[str, Any]:
        """As `stats().to_dict()` has them."""
        tier = {"capacity_bytes": 1000, "dropped_bytes": 0, "stall_s": {"ssd": 0.5}}
        counters = dict.fromkeys(
            ("hits", "misses", "hit_bytes", "miss_bytes", "needed_bytes", "loaded_bytes"), 10 * self.passes
        )
        numbers = ("ssd_bytes", "passes", "tokens", "decode_tokens", "decode_s", "cpu_passes", "tokens_per_s")
        peaks = {"first_pass_s": 0.1, "peak_rss_bytes": 5, "peak_device_bytes": 0}
        drafting = dict.fromkeys(("rounds", "tokens", "nodes", "accepted", "draft_s", "verify_s"), 3 * self.passes)
        seconds = {"actual_pass_s": 0.2, "predicted_pass_s": None}
        counts: dict[str, Any] = dict.fromkeys(numbers, self.passes)
        return {
            **counts,
            **peaks,
            **seconds,
            "tiers": {"dram": tier | counters},
            "drafting": drafting,
            "neurons": None,
            "lossy": False,
        }

    def _pass(
        self, phase: Any, tokens: int, cancelled: Callable[[], bool], progress: Callable[[PassProgress], None]
    ) -> None:
        self.passes += 1
        for layer in range(LAYERS):
            if cancelled():
                raise PassCancelledError
            progress(PassProgress(phase, layer, LAYERS, tokens))
            if self._layer_s:
                time.sleep(self._layer_s)

    def _shared(self, ids: tuple[int, ...]) -> Any:
        for one, other in zip(ids[:-1], self.last, strict=False):
            if one != other:
                return
            yield one
