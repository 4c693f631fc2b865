"""Turns tokens that come one by one into text that is certain. Knows a tokenizer's `decode` alone."""

from collections.abc import Sequence
from typing import Any

_BEFORE = 6  # prompt tokens that are decoded along: whether a word begins with a space depends on what stands before it
_WAITING = 16  # tokens without text that are decoded anew with each that comes; no character has as many
_UNFINISHED = "\ufffd"  # what half of a character decodes to


class Detokenizer:
    """Text of a growing text's tokens, special ones left out; decodes no more than the last few at a time.

    Tokens that bring no text wait for those behind them, for they may be the first bytes of a character.

    Args:
        tokenizer: of the model.
        prompt: the tokens before.
        stop: texts that end it.

    Attributes:
        stopped: a stop string has come; nothing behind it is text.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens = list(prompt[-_BEFORE:])  # those whose text is told, and behind `_told` those whose is not
        self._told = len(self._tokens)
        self._held = ""  # certain, but it may be the beginning of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that has become certain with one more token."""
        self._tokens.append(token)
        before, text = self._decode(self._tokens[: self._told]), self._decode(self._tokens)
        if (len(text) <= len(before) or text.endswith(_UNFINISHED)) and len(self._tokens) - self._told < _WAITING:
            return ""
        self._tokens, self._told = self._tokens[self._told :], len(self._tokens) - self._told
        return self._release(text[len(before) :])

    def end(self) -> str:
        """What is left: half a character, or the beginning of a stop string that never came whole."""
        if self.stopped:
            return ""
        before, text = self._decode(self._tokens[: self._told]), self._decode(self._tokens)
        left = self._release(text[len(before) :]) + self._held
        self._held = ""
        return left

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def _release(self, text: str) -> str:
        """`text` behind what is held, up to where a stop string begins, or may begin."""
        held = self._held + text
        found = min((place for stop in self._stop if (place := held.find(stop)) >= 0), default=-1)
        if found >= 0:
            self.stopped, self._held = True, ""
            return held[:found]
        kept = max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
