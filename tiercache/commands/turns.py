"""The turns of a conversation: each message with its answer, within the context that was reserved."""

from typing import Any

from tiercache.commands.answering import Speaker
from tiercache.commands.conversation import Conversation
from tiercache.commands.interrupts import Interrupts
from tiercache.errors import ContextExceededError
from tiercache.generation.request import GenerationRequest

SCHEMA = "tiercache.chat/1"


class Turns:
    """Takes one message after another.

    Args:
        speaker: answers.
        conversation: what was said.
        asked: of a `GenerationRequest`, all but its ids and seed.
        seed: of the first turn; later ones go on with the same numbers.
        positions: tokens that the model was made for; None where nothing bounds it.

    Attributes:
        tokens: written so far.
    """

    def __init__(
        self, speaker: Speaker, conversation: Conversation, asked: dict[str, Any], seed: int, positions: int | None
    ) -> None:
        self._speaker, self._conversation, self._asked = speaker, conversation, asked
        self._seed: int | None = seed
        reserved = speaker.generator.context
        self._context = reserved if positions is None else min(reserved, positions)
        self._may_grow = positions is None or reserved < positions
        self._count, self._held = 0, 0
        self.tokens = 0

    def take(self, text: str) -> tuple[dict[str, Any], list[str]]:
        """A message is answered: the turn as plain data, and what else there is to say of it.

        An answer that Ctrl-C stopped is kept as far as it came.

        Raises:
            ContextExceededError: there is no room for it; the conversation is as it was before.
            KeyboardInterrupt: by a second Ctrl-C.
        """
        ids = self._conversation.ids_with(text)
        room = self._context - len(ids)
        if room < 1:
            raise ContextExceededError(
                f"with this message the conversation holds {len(ids)} tokens, and the context of {self._context} "
                f"leaves no room for an answer; the message is left out: say less, or {self._way_out()}"
            )
        asked = {**self._asked, "max_new_tokens": min(room, self._asked["max_new_tokens"])}
        with Interrupts() as interrupts:
            told = self._speaker.answer(GenerationRequest(ids, seed=self._seed, **asked), interrupts)
        answer, self._seed = told.answer, None
        self._count += 1
        self.tokens += len(answer.tokens)
        if answer.text:
            self._conversation.add(text, answer.text)
            self._held = len(ids) + len(answer.tokens)
        turn = {"schema": SCHEMA, "turn": self._count, "text": answer.text, "finish_reason": answer.finish_reason}
        turn |= {"tokens": list(answer.tokens), "prompt_tokens": len(ids), "reused_tokens": answer.reused_tokens}
        remarks = self._remarks(answer.finish_reason, bool(answer.text), room)
        return turn | {"context": self._context, **told.figures}, remarks

    def reset(self) -> None:
        """Forget what was said, and the KV cache of it."""
        self._conversation.reset()
        self._speaker.generator.forget()
        self._held = 0

    def text(self) -> str:
        """Where the conversation stands."""
        return f"turns: {self._count}; {self._held} of {self._context} tokens of context are taken"

    def _remarks(self, finish_reason: str, spoke: bool, room: int) -> list[str]:
        if finish_reason == "cancelled":
            return ["stopped" if spoke else "stopped before the first word: the message is left out"]
        if finish_reason != "length":
            return []
        if room > self._asked["max_new_tokens"]:
            return [f"the answer was cut at --max-new-tokens {self._asked['max_new_tokens']}"]
        return [f"the answer was cut, for the context of {self._context} tokens is full: {self._way_out()}"]

    def _way_out(self) -> str:
        more = f"start with --context {2 * self._context}" if self._may_grow else "the model was made for no more"
        return f"/reset begins anew; {more}"
