"""The answer to `/v1/chat/completions`."""

from typing import Any

from tiercache.generation.answer import Answer, TokenLogprob
from tiercache.serve.reply import Reply
from tiercache.serve.worker import Event, Outcome


class ChatReply(Reply):
    """One choice, a message of the assistant."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self) -> list[dict[str, Any]]:
        return [self._one({"role": "assistant", "content": ""}, [])]

    def chunk(self, event: Event) -> dict[str, Any] | None:
        text, found = self.take(event)
        if isinstance(event.what, Answer):
            return self._one({}, found, event.what.finish_reason)
        return self._one({"content": text}, found) if text or found else None

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        (choice,) = self._choices
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        about = {"index": 0, "message": message, "finish_reason": choice.finish}
        return self._object([about | {"logprobs": self._written(choice.logprobs)}], outcome)

    def _one(self, delta: dict[str, Any], found: list[TokenLogprob], finish: str | None = None) -> dict[str, Any]:
        logprobs = self._written(found) if found else None
        return self._chunk([{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}])

    def _written(self, found: list[TokenLogprob]) -> dict[str, Any] | None:
        return None if self._writer is None else self._writer.chat(found)
