"""What a lent model carries as `model.tiercache`: its plan, its account, and in mixed mode how its passes choose.

Knows plans, demands and statistics; opens and closes nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import get_args

from profiler.replay import Row
from profiler.trace import Trace
from tiercache.errors import UsageError
from tiercache.mixrun import MixedRun
from tiercache.model.mixed import Kind
from tiercache.needs import Demand
from tiercache.plan import Plan
from tiercache.stats import Stats


class Attached:
    """What `model.tiercache` is: the plan and the statistics of an offloaded model.

    Attributes:
        plan: what lies where.
        rehearsal: what a pass does and takes.
        mixed: in mixed mode, how neurons are run.
    """

    def __init__(
        self, made: Plan, asked: Demand, stats: Stats, refresh: Callable[[Stats], None], mixed: MixedRun | None
    ) -> None:
        self.plan, self.rehearsal, self.mixed = made, asked.rehearsal, mixed
        self._asked, self._stats, self._refresh = asked, stats, refresh

    def stats(self) -> Stats:
        """The account so far."""
        self._refresh(self._stats)
        return self._stats

    def pass_bytes(self) -> dict[str, int]:
        """Bytes of one whole pass of one token: the weights it reads, and what of them comes from the SSD."""
        payload = self._asked.payload
        neurons = set() if self.mixed is None else self.mixed.units
        needed = sum(payload[key] for key in self._asked.needs.order if key not in neurons)
        return {
            "needed": needed + (0 if self.mixed is None else self.mixed.read_bytes),
            "ssd": sum(payload[key] for key in self.plan.streamed),
        }

    def every_token(self) -> AbstractContextManager[None]:
        """In mixed mode: passes of any length within choose neurons for each token, as passes of one token do.

        Raises:
            UsageError: the model is run exactly.
        """
        return self._mixed().choosing.every_token()

    def passes(self, kind: Kind) -> AbstractContextManager[None]:
        """In mixed mode: passes within are "mixed", "exact" or "resident"; see `tiercache.model.mixed`.

        Raises:
            UsageError: the model is run exactly, an unknown kind, or exact passes where planes were left out.
        """
        if kind not in get_args(Kind):
            raise UsageError(f"unknown kind of pass {kind!r}; choose one of {', '.join(get_args(Kind))}")
        if kind == "exact" and not self._mixed().way.whole:
            raise UsageError(
                "planes of some layers did not fit and were left out, so no pass can be exact; raise dram=, or open "
                "the model with mode='exact'"
            )
        return self._mixed().choosing.passes(kind)

    def recording(self) -> AbstractContextManager[Trace]:
        """In mixed mode: what each token within wishes for, as a trace; afterwards the statistics know Belady's bound.

        Keep "resident" passes out of it: they wish as well, but no slot follows.

        Raises:
            UsageError: the model is run exactly.
        """
        return self._mixed().recording()

    def replay(self, trace: Trace) -> list[Row]:
        """In mixed mode with an HBM tier: a recorded trace under every policy, in this run's slots from its own start.

        The row of this run's policy is what the run did, if it was recorded from its first token. Each row has the hit
        rate, chance, lift, bytes missed, and Belady's bound.

        Raises:
            UsageError: the model is run exactly, or has no slots.
        """
        return self._mixed().replay(trace)

    def _mixed(self) -> MixedRun:
        if self.mixed is None:
            raise UsageError("this model is run exactly; open it with mode='mixed' to choose neurons")
        return self.mixed
