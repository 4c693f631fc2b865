"""The answer to `/v1/completions`."""

from typing import Any

from tiercache.generation.answer import Answer, TokenLogprob
from tiercache.serve.reply import Reply
from tiercache.serve.worker import Event, Outcome


class CompletionReply(Reply):
    """A choice for each prompt, with the prompt before it where that is to be repeated."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._offsets = [0] * len(self._parts)  # where the next token begins, in the text of all tokens

    def opening(self) -> list[dict[str, Any]]:
        echoes = [(number, part.text) for number, part in enumerate(self._parts) if part.text is not None]
        return [self._chunk([self._one(number, text, [])]) for number, text in echoes]

    def chunk(self, event: Event) -> dict[str, Any] | None:
        text, found = self.take(event)
        finish = event.what.finish_reason if isinstance(event.what, Answer) else None
        if not text and not found and finish is None:
            return None
        one = self._one(event.part, text, found, self._offsets[event.part])
        if one["logprobs"] is not None:
            self._offsets[event.part] = one["logprobs"]["text_offset"][-1] + len(one["logprobs"]["tokens"][-1])
        return self._chunk([one | {"finish_reason": finish}])

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        choices = [
            self._one(number, choice.text, choice.logprobs) | {"finish_reason": choice.finish}
            for number, choice in enumerate(self._choices)
        ]
        return self._object(choices, outcome)

    def _one(self, number: int, text: str, found: list[TokenLogprob], offset: int = 0) -> dict[str, Any]:
        logprobs = self._writer.completion(found, offset) if self._writer is not None and found else None
        return {"index": number, "text": text, "logprobs": logprobs, "finish_reason": None}
