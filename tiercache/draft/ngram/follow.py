"""The base of drafters that read nothing but the text: it keeps up with the text."""

from collections.abc import Sequence

from tiercache.draft.base import Context, Drafter, Feedback


class Follower(Drafter):
    """A drafter that follows the context's tokens."""

    seen = 0

    def begin(self, context: Context) -> None:
        super().begin(context)
        self._enter(context.tokens)
        self.seen = len(context.tokens)

    def observe(self, feedback: Feedback) -> None:
        tokens = self.context.tokens
        self._append(tokens[self.seen :])
        self.seen = len(tokens)

    def _enter(self, tokens: Sequence[int]) -> None:
        """A new sequence begins with these."""
        raise NotImplementedError

    def _append(self, tokens: Sequence[int]) -> None:
        """These follow."""
        raise NotImplementedError
