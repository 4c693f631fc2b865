"""What an offloaded model carries as `model.tiercache`: its plan, its statistics, and of which kind its passes are.

Knows plans, requirements, statistics and the run; opens and closes nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import get_args

from policies.plan import Plan
from policies.run_plan import RunPlan
from policies.types import Key
from profiler.replay import PolicyRow
from profiler.trace import Trace
from tiercache.decode.scheduler import DrafterScheduler
from tiercache.draft.base import Feedback
from tiercache.engine.explanation import Explanation, explanation_of_run
from tiercache.engine.memory import MemoryRequirements
from tiercache.engine.mixed import MixedRun
from tiercache.engine.run import ExactRun
from tiercache.errors import UsageError
from tiercache.model.choosing import Kind
from tiercache.stats.run import Stats

Run = ExactRun | MixedRun


@dataclass(frozen=True)
class TextLimits:
    """What was reserved for a text.

    Attributes:
        context: tokens that the KV cache may hold.
        logits: rows of logits that one pass may return.
        keeps_cache: a text can be gone on from its KV cache. Not so where it holds a state of all tokens, which no
            token can be taken out of, or where parts of it are evicted.
        cache_slots: of a KV cache that trees of drafts are run behind; None where transformers' own is used.
    """

    context: int
    logits: int
    keeps_cache: bool
    cache_slots: int | None = None


class OffloadHandle:
    """What `model.tiercache` is.

    Attributes:
        run_plan: the plan of the run, as `offload(plan=)` takes it again.
        plan: what lies where.
        mixed: in mixed mode, how neurons are run.
        run: how passes go.
        limits: of a text.
        scheduler: who schedules drafters; None where nobody drafts.
    """

    scheduler: DrafterScheduler | None = None

    def __init__(
        self,
        run_plan: RunPlan,
        made: Plan,
        asked: MemoryRequirements,
        stats: Stats,
        refresh: Callable[[Stats], None],
        run: Run,
        limits: TextLimits,
    ) -> None:
        self.limits = limits
        self.run_plan, self.plan, self.run = run_plan, made, run
        self.mixed = run if isinstance(run, MixedRun) else None
        self._asked, self._stats, self._refresh = asked, stats, refresh

    @property
    def payload(self) -> dict[Key, int]:
        """Bytes of each unit's weights, without padding."""
        return dict(self._asked.payload)

    def stats(self) -> Stats:
        """The statistics so far."""
        self._refresh(self._stats)
        return self._stats

    def explain(self) -> Explanation:
        """Where the milliseconds of a token went, what bound, and what would bind next: `tiercache.explanation/1`.

        Raises:
            UsageError: no pass was made yet.
        """
        return explanation_of_run(self.stats().to_dict())

    def drafts(self) -> AbstractContextManager[list[Feedback]]:
        """The rounds of drafting within, as they come: each tree, the nodes that were accepted, the tokens emitted.

        Raises:
            UsageError: nobody drafts.
        """
        if self.scheduler is None:
            raise UsageError("nobody drafts for this model; open it with drafter='auto', or another drafter")
        return self.scheduler.watching()

    def pass_bytes(self) -> dict[str, int]:
        """Bytes of one whole pass of one token: the weights it reads, and what of them comes from the SSD.

        Where there are resident passes of a model that is run exactly, also what one of them reads, as "resident".
        """
        payload, found = self.payload, self.run.pass_bytes()
        found["needed"] += sum(payload[key] for key in self._asked.needs.order if key not in self.run.part_units)
        found["ssd"] = sum(payload[key] for key in self.plan.streamed)
        return found

    def begin_text(self) -> None:
        """The next pass begins another text: the time until then is none of decoding."""
        self.run.next_pass.begins_text = True

    def every_token(self) -> AbstractContextManager[None]:
        """In mixed mode: passes of any length within choose neurons for each token, as passes of one token do.

        Raises:
            UsageError: the model is run exactly.
        """
        return self._neurons().choosing.every_token()

    def passes(self, kind: Kind) -> AbstractContextManager[None]:
        """Passes that begin within are "exact" or "resident", or in mixed mode "mixed".

        In mixed mode see `model.choosing`. A model that is run exactly has resident passes if it was opened for
        them: each matrix is multiplied by at its lowest planes alone, as many as stay in the fastest tier and always
        fewer than an exact pass takes. They move nothing, and what is on its way for the next exact pass goes on.

        Raises:
            UsageError: an unknown kind, one that this model was not opened for, or exact passes where planes were left
                out.
        """
        if kind not in get_args(Kind):
            raise UsageError(f"unknown kind of pass {kind!r}; choose one of {', '.join(get_args(Kind))}")
        return self.run.passes(kind)

    def recording(self) -> AbstractContextManager[Trace]:
        """In mixed mode: what each token within wishes for, as a trace; afterwards the statistics know Belady's bound.

        Keep "resident" passes out of it: they wish as well, but no slot follows.

        Raises:
            UsageError: the model is run exactly.
        """
        return self._neurons().recording()

    def replay(self, trace: Trace) -> list[PolicyRow]:
        """In mixed mode with an HBM tier: a recorded trace under every policy, in this run's slots from its own start.

        The row of this run's policy is what the run did, if it was recorded from its first token. Each row has the hit
        rate, chance, lift, bytes missed, and Belady's bound.

        Raises:
            UsageError: the model is run exactly, or has no slots.
        """
        return self._neurons().replay(trace)

    def _neurons(self) -> MixedRun:
        if self.mixed is None:
            raise UsageError("this model is run exactly; open it with mode='mixed' to choose neurons")
        return self.mixed
