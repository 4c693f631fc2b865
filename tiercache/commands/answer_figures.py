"""How fast one answer was, and how many bytes each of its tokens moved. Knows statistics; no model and no text."""

import time
from dataclasses import dataclass
from typing import Any

from tiercache.commands.summary import of_bytes
from tiercache.stats.run import Stats


@dataclass(frozen=True)
class _Counts:
    """Counters at one moment.

    Attributes:
        passes: of the whole model.
        bytes_by_tier: read from the SSD, copied over the link to HBM, and asked of main memory.
    """

    passes: int
    bytes_by_tier: dict[str, int]

    @classmethod
    def of(cls, stats: Stats) -> "_Counts":
        """Where the statistics stand."""
        found, neurons = {"ssd": stats.ssd_bytes}, stats.neurons
        if (hbm := stats.tiers.get("hbm")) is not None:
            moved = 0 if neurons is None else neurons.moved_bytes + neurons.dense_bytes
            found["link"] = hbm.loaded_bytes + moved
        if (dram := stats.tiers.get("dram")) is not None:
            found["dram"] = dram.needed_bytes
        return cls(stats.passes, found)


class AnswerMeter:
    """Counts one answer from its first token on: what the prompt took is no token's.

    Args:
        handle: the model's, whose `stats()` are read.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._first: _Counts | None = None
        self._drafts = handle.stats().drafting is not None
        self._began = 0.0

    def first_token(self) -> None:
        """The prompt's pass is over."""
        self._first, self._began = _Counts.of(self._handle.stats()), time.perf_counter()

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
        after_s = 0.0 if first_token_s is None else seconds - first_token_s
        return {"first_token_s": first_token_s, "seconds": seconds, **self._rates(tokens - 1, after_s)}

    def _rates(self, tokens: int, seconds: float) -> dict[str, Any]:
        """Of so many tokens after the first."""
        if self._first is None or tokens < 1 or not seconds:
            return dict.fromkeys(("tokens_per_s", "tokens_per_pass", "bytes_per_token"))
        now, first = _Counts.of(self._handle.stats()), self._first
        passes = now.passes - first.passes
        each = {name: (count - first.bytes_by_tier[name]) / tokens for name, count in now.bytes_by_tier.items()}
        per_pass = tokens / passes if self._drafts and passes else None
        return {"tokens_per_s": tokens / seconds, "tokens_per_pass": per_pass, "bytes_per_token": each}
