"""How fast one answer was, and how many bytes each of its tokens moved. Knows statistics; no model and no text."""

import time
from typing import Any

from tiercache.commands.summary import of_bytes
from tiercache.stats.difference import behind_first, difference, moved_bytes, tokens_per_s


class AnswerMeter:
    """Counts one answer from its first token on: what the prompt took is no token's.

    Args:
        handle: the model's, whose `stats()` are read.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._first: dict[str, Any] | None = None
        self._began = 0.0

    def first_token(self) -> None:
        """The prompt's pass is over."""
        self._first, self._began = self._handle.stats().to_dict(), time.perf_counter()

    def text(self, tokens: int) -> str:
        """A line about an answer of so many tokens so far."""
        rates = self._rates(tokens - 1, time.perf_counter() - self._began)
        if rates["tokens_per_s"] is None:
            return f"{tokens} tokens"
        per_pass = rates["tokens_per_pass"]
        drafted = "" if per_pass is None else f", {per_pass:.2f} tokens a pass"
        return "; ".join([f"{tokens} tokens, {rates['tokens_per_s']:.2f} tokens/s{drafted}", *of_bytes(rates)])

    def figures(self, tokens: int, first_token_s: float | None, seconds: float) -> dict[str, Any]:
        """Plain data about an answer that is whole; None stands for what too few tokens cannot tell."""
        rates = self._rates(*behind_first([(tokens, first_token_s, seconds)]))
        return {"first_token_s": first_token_s, "seconds": seconds, **rates}

    def _rates(self, tokens: int, seconds: float) -> dict[str, Any]:
        """Of so many tokens after the first."""
        speed = tokens_per_s(tokens, seconds)
        if self._first is None or speed is None:
            return dict.fromkeys(("tokens_per_s", "tokens_per_pass", "bytes_per_token"))
        found = difference(self._first, self._handle.stats().to_dict())
        each = {name: count / tokens for name, count in moved_bytes(found).items()}
        per_pass = None if found["drafting"] is None else found["drafting"]["tokens_per_pass"]
        return {"tokens_per_s": speed, "tokens_per_pass": per_pass, "bytes_per_token": each}
