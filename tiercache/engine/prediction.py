"""What a model would do on a machine that need not be here: the engine's own plan, and its seconds.

Knows workloads, budgets and the cost model; prints nothing.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from profiler.cost_model import Drafting, Prediction, pass_time, predict, upgrades
from profiler.hardware import Hardware
from profiler.workload import Workload
from tiercache.config.sizes import Budget
from tiercache.engine.budgets import fill_tiers

_PLENTY = 1 << 60  # bytes


@dataclass(frozen=True)
class PredictedDrafting:
    """How a prediction drafts.

    Attributes:
        drafting: the tree, what it brings, and what making it takes where no small model makes it.
        small: a small model that makes it, in the fastest tier; None where there is none.
        depth: passes of it for a tree.
    """

    drafting: Drafting
    small: Workload | None
    depth: int

    def beside(self, workload: Workload) -> Workload:
        """The target with what the small model and its KV cache take reserved beside it."""
        if self.small is None:
            return workload
        nbytes = sum(self.small.needs.sizes.values()) + sum(self.small.needs.compute.values())
        return replace(workload, needs=replace(workload.needs, compute={**workload.needs.compute, "drafter": nbytes}))

    def on(self, machine: Hardware) -> Drafting:
        """The same with the seconds that the small model takes on a machine."""
        if self.small is None:
            return self.drafting
        plan = fill_tiers(self.small.needs, hbm_bytes=None if machine.gpu is None else _PLENTY, dram_bytes=_PLENTY)
        return replace(self.drafting, draft_s=self.depth * pass_time(self.small, plan, machine).total_s)


def predicted(workload: Workload, machine: Hardware, past: int, drafts: PredictedDrafting | None) -> dict[str, Any]:
    """The faster of streaming and of products on the CPU, with what the other would do and what would help.

    Raises:
        DoesNotFitError: the model does not fit into the machine.
    """
    card, share = machine.gpu, Budget()  # "auto": nine tenths
    if drafts is not None:
        workload = drafts.beside(workload)
    hbm = None if card is None else share.resolve(total_bytes=0, free_bytes=card.memory.capacity_bytes)
    dram = share.resolve(total_bytes=0, free_bytes=machine.dram.capacity_bytes)
    plan = fill_tiers(workload.needs, hbm_bytes=hbm, dram_bytes=dram)

    def best(on: Hardware) -> tuple[Prediction, str, Prediction | None]:
        """The better of the two, and the runner-up; a machine without a card has one way only."""
        drafting = None if drafts is None else drafts.on(on)
        streamed = predict(workload, plan, on, past=past, drafting=drafting)
        if plan.still:
            return streamed, "stay", None
        if not plan.has_hbm:
            return streamed, "ssd", None
        tokens = 1 + (drafting.nodes if drafting else 0)
        beside = predict(workload, plan, on, past=past, drafting=drafting, cpu_tokens=tokens)
        found = [(streamed, "stream"), (beside, "cpu")]
        (first, name), (second, _) = sorted(found, key=lambda pair: -pair[0].tokens_per_s)
        return first, name, second

    prediction, how, runner_up = best(machine)
    return {
        "precision": workload.precision,
        "tokens_per_s": prediction.tokens_per_s,
        "low": prediction.low,
        "high": prediction.high,
        "bound": prediction.bound,
        "binding_tier": prediction.pass_time.binding,
        "weights_beyond_hbm": how,
        "runner_up_tokens_per_s": None if runner_up is None else runner_up.tokens_per_s,
        "busy_s": dict(prediction.pass_time.busy_s),
        "overhead_s": prediction.pass_time.overhead_s,
        "pass_s": prediction.pass_time.total_s,
        "pass_bytes": workload.pass_bytes,
        "plan": _without_orders(plan.to_dict()),
        "twice_as_fast": {name: best(other)[0].tokens_per_s for name, other in upgrades(machine).items()},
        "assumptions": {name: asdict(figure) for name, figure in machine.figures.items()},
        "basis": machine.basis,
        "drafting": None if drafts is None else asdict(drafts.on(machine)),
    }


def _without_orders(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan's bytes, without the lists of units."""
    return {
        name: {key: value for key, value in tier.items() if key not in ("order", "placement")}
        | {"pinned_bytes": tier["placement"]["pinned_bytes"], "ring_bytes": tier["placement"]["ring_bytes"]}
        for name, tier in plan.items()
        if isinstance(tier, dict)
    }
