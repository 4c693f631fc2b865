"""The base of a drafter that is made of several drafters."""

from collections.abc import Sequence
from contextlib import ExitStack

from tiercache.draft.base import Context, Drafter, Feedback, joint_requirements
from tiercache.errors import UsageError


class CompositeDrafter(Drafter):
    """Tells each of several drafters everything; subclasses say how their trees become one.

    Args:
        drafters: at least one; they are closed with this one.

    Raises:
        UsageError: there is none, or they are for different vocabularies.
    """

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if not drafters:
            raise UsageError("a combination of no drafters; give one at least")
        self.drafters = tuple(drafters)
        self.requirements = joint_requirements(drafters)
        self.open_ended = all(drafter.open_ended for drafter in drafters)
        self.runs_model = any(drafter.runs_model for drafter in drafters)

    def begin(self, context: Context) -> None:
        super().begin(context)
        for drafter in self.drafters:
            drafter.begin(context)

    def observe(self, feedback: Feedback) -> None:
        """See `Drafter`; each sees the whole tree."""
        for drafter in self.drafters:
            drafter.observe(feedback)

    def close(self) -> None:
        """See `Drafter`; all are closed, whatever one raises."""
        with ExitStack() as stack:
            for drafter in self.drafters:
                stack.callback(drafter.close)
