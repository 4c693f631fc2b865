"""Who drafts for an exact run of `drafter="auto"`: compares placements before any of their memory is reserved.

Knows placements and predicted passes; whether drafting pays for its room is `policies.room`'s to say.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from policies import room
from policies.run_plan import Decision
from profiler.cost_model import PassTime, pass_time
from profiler.hardware import Hardware
from tiercache.config.drafting import DraftConfig
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import human
from tiercache.engine import drafting
from tiercache.engine.budgets import fitted
from tiercache.engine.placement import ExactPlacement
from tiercache.errors import DoesNotFitError
from tiercache.kv.cache import support
from tiercache.progress import note

OWN_PLANES, NGRAMS, NOBODY = "own planes and n-grams", "n-grams", "nobody"


@dataclass(frozen=True)
class DraftingChoice:
    """The choice of one run.

    Attributes:
        config, draft: the options.
        planned: the placement that options lead to; raises DoesNotFitError where there is none.
        hardware: the machine.
        show: notes may be printed.
    """

    config: OffloadConfig
    draft: DraftConfig
    planned: Callable[[OffloadConfig], ExactPlacement]
    hardware: Hardware
    show: bool

    def made(self) -> ExactPlacement:
        """The first of three that is likely to pay: with the model's own planes and n-grams, these alone, or nobody.

        Raises:
            DoesNotFitError: a budget is too small even for plain decoding.
        """
        plain = self._placed(resident=False, drafts=False)
        reason, price = "", None
        if isinstance(plain, ExactPlacement):
            takes = support(plain.opened.meta_model)
            reason = takes.reason
            if takes.takes == "nothing":
                return self._nobody(plain, reason, None)
        for own in [True, False] if self.config.resident else [False]:
            found = self._placed(resident=own, drafts=True)
            if isinstance(found, DoesNotFitError):
                who = "by its own planes" if own else "at all"
                reason = f"to draft {who} takes {human(found.missing_bytes)} more of {found.tier or 'memory'}"
                continue
            refusal, compared = self._refusal(plain, found, own)
            price = price if compared is None else compared
            if refusal:
                reason = refusal
                continue
            if reason:
                note(f"drafting by n-grams alone: {reason}", show=self.show)
            return self._with(found, OWN_PLANES if own else NGRAMS, reason, price)
        if isinstance(plain, DoesNotFitError):
            raise plain
        return self._nobody(plain, reason, price)

    def again(self, who: str) -> ExactPlacement:
        """What an earlier run chose.

        Raises:
            DoesNotFitError: it does not fit any more.
        """
        found = self.planned(self._options(resident=who == OWN_PLANES, drafts=who != NOBODY))
        if who == NOBODY:
            return self._nobody(found, "the plan that was given drafts nothing", None)
        return self._with(found, who, "the plan that was given says so", None)

    def _placed(self, *, resident: bool, drafts: bool) -> ExactPlacement | DoesNotFitError:
        return fitted(partial(self.planned, self._options(resident=resident, drafts=drafts)))

    def _options(self, *, resident: bool, drafts: bool) -> OffloadConfig:
        return replace(self.config, resident=resident, draft=self.draft if drafts else None)

    def _refusal(
        self, plain: ExactPlacement | DoesNotFitError, found: ExactPlacement, own: bool
    ) -> tuple[str, float | None]:
        """Why drafting does not pay for its room, empty where it may; and its price, where two were compared."""
        wanted = self.draft.fixed or self.draft.speckv is not None  # a drafter, at any price
        if isinstance(plain, DoesNotFitError) or wanted:
            return "", None
        before, after = self._pass(plain), self._pass(found)
        price = room.price(before.total_s, after.total_s)
        if not room.pays(before.total_s, after.total_s, after.waits_s):
            return f"its room would make a pass take {price:.2f} times as long, more than it is likely to win", price
        if own and found.plan.still:
            return "no pass waits for a slower tier, so passes of its own planes would save nothing", price
        return "", price

    def _pass(self, placed: ExactPlacement) -> PassTime:
        """Of one token, all that does not stay copied up: passes that verify a tree do so wherever one token's are."""
        return pass_time(placed.workload, placed.plan, self.hardware)

    def _with(self, found: ExactPlacement, who: str, reason: str, price: float | None) -> ExactPlacement:
        others = {OWN_PLANES: NGRAMS, NGRAMS: NOBODY}
        decision = Decision("drafting", who, others[who], None, reason or "its room is likely to pay")
        return replace(found, room_price=price, drafts=who, decisions=(decision,))

    def _nobody(self, plain: ExactPlacement, reason: str, price: float | None) -> ExactPlacement:
        note(f"decoding without drafting, for {reason}", show=self.show)
        drafters = drafting.no_drafters(plain.opened, self.draft, reason)
        decision = Decision("drafting", NOBODY, NGRAMS, None, reason)
        return replace(plain, drafter_spec=drafters, room_price=price, drafts=NOBODY, decisions=(decision,))
