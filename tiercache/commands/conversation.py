"""A conversation: its messages, and the tokens that a chat template makes of them. Knows no model and no terminal."""

from typing import Any

from tiercache.errors import UsageError
from tiercache.generation.chat_template import templated

Message = dict[str, str]


class Conversation:
    """Messages so far.

    Args:
        tokenizer: carries the chat template.
        system: what the model is told before everything else; None where nothing is.

    Attributes:
        messages: them, as chat templates take them.

    Raises:
        UsageError: the tokenizer has no template, or its template takes no such text.
    """

    def __init__(self, tokenizer: Any, system: str | None = None) -> None:
        self._tokenizer, self._system = tokenizer, system
        self.messages: list[Message] = []
        self.reset()
        if tokenizer.chat_template is None:
            raise UsageError("this model's tokenizer has no chat template; write with it by: tiercache run")
        self.ids_with("hello")  # what the template refuses is known before the first message

    def reset(self) -> None:
        """Begin anew, with the system's text."""
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def ids_with(self, text: str) -> tuple[int, ...]:
        """Tokens of the conversation with one more message of the user's, up to where the answer begins."""
        return templated(self._tokenizer, [*self.messages, {"role": "user", "content": text}])

    def add(self, text: str, answer: str) -> None:
        """A turn is over."""
        self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
