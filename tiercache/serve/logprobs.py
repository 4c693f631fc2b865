"""Log-probabilities as OpenAI's API writes them. Knows no model; the numbers are the generator's own."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

from tiercache.generation.answer import TokenLogprob

_LEAST = -9999.0  # JSON has no -Infinity; OpenAI's API writes this number
_PART_OF_A_CHARACTER = "\ufffd"


class LogprobWriter:
    """Writes tokens with their log-probabilities, from any thread.

    Args:
        tokenizer: the model's. The text of a token is what it decodes to alone, and is asked for once.
    """

    def __init__(self, tokenizer: Any) -> None:
        @cache  # it holds the vocabulary at most
        def text(token: int) -> str:
            return str(tokenizer.decode([token]))

        self._text: Callable[[int], str] = text

    def chat(self, found: Sequence[TokenLogprob]) -> dict[str, Any]:
        """`choices[].logprobs` of a chat: an entry a token, with its bytes where they are whole characters."""
        return {"content": [self._entry(one) for one in found], "refusal": None}

    def completion(self, found: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
        """`choices[].logprobs` of a completion: lists of one length.

        Args:
            found: the tokens.
            offset: where the first of them begins in the choice's text.

        Returns:
            `tokens`; `token_logprobs`, None for the first of a text; `top_logprobs`, by the token's text and with the
            token itself; `text_offset`. Of tokens that look alike the likeliest is named.
        """
        tokens = [self._text(one.token) for one in found]
        ends = list(accumulate(map(len, tokens), initial=offset))
        return {
            "tokens": tokens,
            "token_logprobs": [None if one.logprob is None else _number(one.logprob) for one in found],
            "top_logprobs": [self._top(one) for one in found],
            "text_offset": ends[:-1],
        }

    def _entry(self, one: TokenLogprob) -> dict[str, Any]:
        own = self._named(one.token, one.logprob or 0.0)
        return own | {"top_logprobs": [self._named(token, value) for token, value in one.top]}

    def _named(self, token: int, value: float) -> dict[str, Any]:
        text = self._text(token)
        whole = None if _PART_OF_A_CHARACTER in text else list(text.encode())
        return {"token": text, "logprob": _number(value), "bytes": whole}

    def _top(self, one: TokenLogprob) -> dict[str, float] | None:
        if one.logprob is None:
            return None
        best: dict[str, float] = {}
        for token, value in (*one.top, (one.token, one.logprob)):
            text = self._text(token)
            best[text] = max(_number(value), best.get(text, _LEAST))
        return best


def _number(value: float) -> float:
    return max(value, _LEAST)
