"""Answers as OpenAI's objects, whole or in chunks: what chats and completions have in common."""

import time
import uuid
from abc import ABC, abstractmethod
from typing import Any

from tiercache.generation.answer import Answer, Piece, TokenLogprob
from tiercache.serve.logprobs import LogprobWriter
from tiercache.serve.question import Part
from tiercache.serve.statistics import block
from tiercache.serve.worker import Event, Outcome, Scored


class Choice:
    """One answer as it grows.

    Attributes:
        text: so far, an echoed prompt included.
        logprobs: of its tokens so far, those of a scored prompt included.
        finish: why it ended.
    """

    def __init__(self, echo: str = "") -> None:
        self.text, self.finish = echo, "length"
        self.logprobs: list[TokenLogprob] = []
        self._scored = 0

    def take(self, what: Scored | Piece | Answer) -> tuple[str, list[TokenLogprob]]:
        """What came: the text and the log-probabilities that are new with it."""
        text, found = "", list(what.logprobs)
        if isinstance(what, Scored):
            self._scored = len(found)
        elif isinstance(what, Piece):
            text = what.text
        else:  # the last tokens may have brought no piece
            found = found[len(self.logprobs) - self._scored :]
            self.finish = what.finish_reason
        self.text += text
        self.logprobs += found
        return text, found


class Reply(ABC):
    """One request's answer.

    Args:
        model: its name.
        parts: the prompts.
        writer: of log-probabilities; None where none are wanted.
        with_usage: whether a stream ends with its usage.
    """

    kind: str  # of the object, and of a chunk
    chunk_kind: str
    prefix: str  # of its id

    def __init__(self, model: str, parts: tuple[Part, ...], writer: LogprobWriter | None, *, with_usage: bool) -> None:
        self._parts, self._writer, self._with_usage = parts, writer, with_usage
        self._choices = [Choice(part.text or "") for part in parts]
        self._about = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    @abstractmethod
    def opening(self) -> list[dict[str, Any]]:
        """The chunks that a stream begins with."""

    def take(self, event: Event) -> tuple[str, list[TokenLogprob]]:
        """What came, for `whole`: the text and the log-probabilities that are new with it."""
        return self._choices[event.part].take(event.what)

    @abstractmethod
    def chunk(self, event: Event) -> dict[str, Any] | None:
        """What came, as a chunk; None where it brings nothing to tell."""

    @abstractmethod
    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """The whole answer, after all of its events went through `take`."""

    def is_last(self, event: Event) -> bool:
        """Whether the answers end with it."""
        return isinstance(event.what, Answer) and event.part == len(self._parts) - 1

    def closing(self, last: dict[str, Any] | None, outcome: Outcome) -> list[dict[str, Any]]:
        """The chunks that a stream ends with: `last`, and the usage if it is wanted. The last has the statistics."""
        chunks = [] if last is None else [last]
        if self._with_usage:
            chunks.append(self._chunk([]) | {"usage": self._usage(outcome)})
        chunks[-1]["tiercache"] = block(outcome)
        return chunks

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        usage = {"usage": None} if self._with_usage else {}
        return {**self._about, "object": self.chunk_kind, "choices": choices, **usage}

    def _object(self, choices: list[dict[str, Any]], outcome: Outcome) -> dict[str, Any]:
        about = {**self._about, "object": self.kind, "choices": choices}
        return about | {"usage": self._usage(outcome), "tiercache": block(outcome)}

    def _usage(self, outcome: Outcome) -> dict[str, Any]:
        """Tokens; the one that ended a text counts as any other."""
        prompt = sum(len(part.ids) for part in self._parts)
        new = sum(len(answer.tokens) for answer in outcome.answers)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": sum(answer.reused_tokens for answer in outcome.answers)},
        }
