"""What drafters share that read nothing but the text: keeping up with it."""

from collections.abc import Sequence

from tiercache.draft.base import BaseDrafter, Context, Feedback


class Follower(BaseDrafter):
    """A drafter that follows the context's tokens.

    A snapshot is how many of them were read, so it costs nothing to take; going back costs a second reading of what
    is kept of the sequence.
    """

    seen = 0

    def begin(self, context: Context) -> None:
        """See `Drafter`."""
        super().begin(context)
        self._enter(context.tokens)
        self.seen = len(context.tokens)

    def observe(self, feedback: Feedback) -> None:
        """See `Drafter`."""
        tokens = self.context.tokens
        if len(tokens) < self.seen:  # cut short without a rollback
            self.rollback(len(tokens))
        self._append(tokens[self.seen :])
        self.seen = len(tokens)

    def snapshot(self) -> int:
        """See `Drafter`."""
        return self.seen

    def rollback(self, snapshot: int) -> None:
        """See `Drafter`."""
        if snapshot != self.seen:
            self._reenter(self.context.tokens[:snapshot], self.seen - snapshot)
            self.seen = snapshot

    def _enter(self, tokens: Sequence[int]) -> None:
        """A new sequence begins with these."""
        raise NotImplementedError

    def _append(self, tokens: Sequence[int]) -> None:
        """These follow."""
        raise NotImplementedError

    def _reenter(self, tokens: Sequence[int], dropped: int) -> None:
        """The sequence consists of these alone: so many at its end are taken back."""
        raise NotImplementedError
