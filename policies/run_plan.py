"""The plan of a run as people keep it: versioned JSON, with what was decided, why, and what would have come next.

Knows numbers and names; makes no decision and opens no model.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from policies.plan import Plan, table_of
from policies.settings import Settings
from policies.tables import Shown, Table

SCHEMA = "tiercache.plan/2"
_PARTS = ("schema", "machine", "model", "options", "settings", "placement", "decisions", "predicted", "runner_up")


class PlanError(ValueError):
    """Something is no plan, or not of this version; says what is wrong with it."""


@dataclass(frozen=True)
class Decision:
    """One thing that was decided.

    Attributes:
        what: is decided.
        choice: that was made.
        alternative: the best of the others; None where there was none.
        gain: by which share the choice is faster, as predicted; None where the alternative cannot be run.
        reason: for people.
    """

    what: str
    choice: str
    alternative: str | None
    gain: float | None
    reason: str


@dataclass(frozen=True)
class RunPlan(Shown):
    """See the module.

    Attributes:
        machine: what identifies it: processor, cores, memory, card.
        model: what identifies its units: a hash of their names and sizes, and the precision.
        options: of `offload` that the placement depends on, budgets in bytes.
        settings: how the run reads and prefetches.
        placement: `Plan.to_dict` of what lies where.
        decisions: what was decided.
        predicted: tokens_per_s with low and high, binding tier, basis; empty where nothing was predicted.
        runner_up: choices and tokens_per_s of the second best; None where there is one way only.
    """

    machine: Mapping[str, Any]
    model: Mapping[str, Any]
    options: Mapping[str, Any]
    settings: Settings
    placement: Mapping[str, Any]
    decisions: tuple[Decision, ...] = ()
    predicted: Mapping[str, Any] | None = None
    runner_up: Mapping[str, Any] | None = None

    @property
    def hash(self) -> str:
        """Of what the run does, sixteen hex digits; reasons and predictions do not count."""
        plain = self.to_dict()
        done = {name: plain[name] for name in ("model", "options", "settings", "placement")}
        import hashlib  # who only reads plans need not wait for it

        return hashlib.sha256(json.dumps(done, sort_keys=True).encode()).hexdigest()[:16]

    def places_as(self, plan: Plan) -> bool:
        """Whether a placement is this plan's."""
        return bool(_plain(self.placement) == _plain(plan.to_dict()))

    def tables(self) -> tuple[Table, ...]:
        """What was decided and why, what lies where, and what is predicted."""
        rows = [
            (each.what, each.choice, each.alternative or "", _percent(each.gain), each.reason)
            for each in self.decisions
        ] or [("nothing", "the rules of thumb", "", "", "there was one way only, or nobody measured this machine")]
        decided = Table(f"Plan {self.hash}", ("what", "choice", "instead of", "faster by", "why"), tuple(rows))
        found = (decided, table_of(self.placement))
        if not (made := self.predicted):
            return found
        band = f"{made['low']:.2f} to {made['high']:.2f}"
        row = (f"{made['tokens_per_s']:.2f}", band, made["binding_tier"], made["basis"])
        return (*found, Table("Predicted", ("tokens/s", "between", "bound by", "basis"), (row,)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as JSON holds it."""
        return {"schema": SCHEMA, **_plain(asdict(self))}

    @classmethod
    def from_dict(cls, found: object) -> "RunPlan":
        """A plan from `to_dict`'s data; its hash is held against it where that is given as well.

        Raises:
            PlanError: it is something else.
        """
        if not isinstance(found, dict) or found.get("schema") != SCHEMA:
            schema = found.get("schema") if isinstance(found, dict) else None
            raise PlanError(f"its schema is {schema!r}, not {SCHEMA!r}")
        if missing := sorted(set(_PARTS) - set(found)):
            raise PlanError(f"it has no {missing[0]!r}")
        try:
            if any(isinstance(value, bool) or not isinstance(value, int) for value in found["settings"].values()):
                raise ValueError("not all of them are whole numbers")
            settings = Settings(**found["settings"])
            decisions = tuple(Decision(**each) for each in found["decisions"])
        except (AttributeError, TypeError, ValueError) as error:
            raise PlanError(f"its settings or decisions have another form ({error})") from error
        for name in ("machine", "model", "options", "placement"):
            if not isinstance(found[name], dict):
                raise PlanError(f"its {name!r} is no object")
        kept = {name: found[name] for name in ("machine", "model", "options", "placement", "predicted", "runner_up")}
        plan = cls(settings=settings, decisions=decisions, **kept)
        if found.get("hash", plan.hash) != plan.hash:
            raise PlanError(
                f"it was changed: its hash is {found['hash']!r}, and what it says has {plan.hash!r}; take the hash out "
                "if that was meant"
            )
        return plan


def _percent(gain: float | None) -> str:
    return "" if gain is None else f"{gain:+.0%}"


def _plain(value: Any) -> Any:
    """What JSON makes of a value: lists of tuples, text of keys."""
    return json.loads(json.dumps(value))
