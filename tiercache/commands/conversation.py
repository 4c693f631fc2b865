"""A conversation: its messages, and the tokens that a chat template makes of them. Knows no model and no terminal."""

from typing import Any

from tiercache.errors import UsageError

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


def templated(tokenizer: Any, messages: list[Message]) -> tuple[int, ...]:
    """Tokens of messages in the tokenizer's chat template, up to where the answer begins.

    Raises:
        UsageError: the template does not take them.
    """
    import jinja2  # comes with transformers' chat templates

    try:
        found = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except jinja2.TemplateError as error:  # as Gemma's does of a system's text
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise UsageError(f"this model's chat template refuses messages of {roles}: {error}; leave one out") from error
    return tuple(found["input_ids"])
