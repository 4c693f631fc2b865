"""What a model would do on a machine that need not be here: the engine's own plan, and its seconds.

Knows workloads, budgets and the cost model; prints nothing.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from policies.plan import Plan
from profiler.cost_model import Drafting, PassTime, Prediction, pass_time, predict, upgrades
from profiler.energy import Energy, EnergyInputs, energy_of_token
from profiler.explanation import busy_by_kind, exposed_s
from profiler.hardware import Hardware
from profiler.workload import Workload
from tiercache.config.sizes import Budget
from tiercache.engine.budgets import fill_tiers
from tiercache.engine.card_memory import CONTEXT_BYTES

DRAFTING = "drafting"
_PLENTY = 1 << 60  # bytes
_INFINITE = 1e9  # times as fast
# Which part of a machine a resource is; "compute" is the card's or, without one, the processor's.
_PARTS = {
    "cpu": "cpu and main memory",
    "dram": "cpu and main memory",
    "link": "link",
    "ssd": "ssd",
    "overhead": "overhead a layer",
}


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
        made = self.small_pass(machine)
        return self.drafting if made is None else replace(self.drafting, draft_s=self.depth * made.total_s)

    def small_pass(self, machine: Hardware) -> PassTime | None:
        """One pass of the small model; None where there is none."""
        if self.small is None:
            return None
        plan = fill_tiers(self.small.needs, hbm_bytes=None if machine.gpu is None else _PLENTY, dram_bytes=_PLENTY)
        return pass_time(self.small, plan, machine)


@dataclass(frozen=True)
class Choice:
    """The faster of the ways to treat weights that the card does not hold.

    Attributes:
        prediction: of it.
        how: "stream" copies them up, "cpu" multiplies by them in main memory; "stay" and "ssd" leave no choice.
        tokens: that a pass carries.
        cpu_tokens: passes of up to so many tokens are multiplied by the CPU.
        runner_up: the other way, where there is one.
    """

    prediction: Prediction
    how: str
    tokens: int
    cpu_tokens: int = 0
    runner_up: Prediction | None = None


@dataclass(frozen=True)
class Case:
    """A model that is placed in a machine.

    Attributes:
        workload: with what a small drafter takes reserved beside it.
        machine: that it is placed in.
        plan: where its units lie.
        past: tokens in the KV cache before the one that is decoded.
        drafts: None where nobody drafts.
    """

    workload: Workload
    machine: Hardware
    plan: Plan
    past: int
    drafts: PredictedDrafting | None

    @classmethod
    def of(cls, workload: Workload, machine: Hardware, past: int, drafts: PredictedDrafting | None) -> "Case":
        """Nine tenths of main memory, and of what a context leaves of the card, divided as a run divides them.

        Raises:
            DoesNotFitError: the model does not fit into the machine.
        """
        card, share = machine.gpu, Budget()  # "auto": nine tenths
        if drafts is not None:
            workload = drafts.beside(workload)
        hbm = (
            None
            if card is None
            else share.resolve(total_bytes=0, free_bytes=card.memory.capacity_bytes - CONTEXT_BYTES)
        )
        dram = share.resolve(total_bytes=0, free_bytes=machine.dram.capacity_bytes)
        plan = fill_tiers(workload.needs, hbm_bytes=hbm, dram_bytes=dram)
        return cls(workload, machine, plan, past, drafts)

    def best(self, machine: Hardware | None = None, drafting: Drafting | None = None) -> Choice:
        """The better way, placed as it is, on this machine or on another; with its drafting or with another."""
        on = machine or self.machine
        drafting = drafting or (None if self.drafts is None else self.drafts.on(on))
        tokens = 1 + (drafting.nodes if drafting else 0)

        def guess(cpu_tokens: int = 0) -> Prediction:
            return predict(self.workload, self.plan, on, past=self.past, drafting=drafting, cpu_tokens=cpu_tokens)

        streamed = guess()
        if self.plan.still or not self.plan.has_hbm:
            return Choice(streamed, "stay" if self.plan.still else "ssd", tokens)
        beside = guess(tokens)
        if beside.tokens_per_s > streamed.tokens_per_s:
            return Choice(beside, "cpu", tokens, tokens, streamed)
        return Choice(streamed, "stream", tokens, 0, beside)

    def energy(self, chosen: Choice, inputs: EnergyInputs) -> Energy:
        """Of a token; drafting that only its seconds are known of keeps the card and the processor busy."""
        drafting = None if self.drafts is None else self.drafts.on(self.machine)
        emitted, draft_s = (1.0, 0.0) if drafting is None else (drafting.tokens_per_pass, drafting.draft_s)
        card_s, cpu_s = self._busy_s(chosen.prediction.pass_time)
        small = None if self.drafts is None else self.drafts.small_pass(self.machine)
        if self.drafts is not None:
            by_card, by_cpu = (draft_s, draft_s) if small is None else self._busy_s(small, self.drafts.depth)
            card_s, cpu_s = card_s + by_card, cpu_s + by_cpu
        total_s = chosen.prediction.pass_time.total_s + draft_s
        return energy_of_token(card_s / emitted, cpu_s / emitted, total_s / emitted, inputs)

    def _busy_s(self, time: PassTime, passes: int = 1) -> tuple[float, float]:
        """Seconds that the card is busy, and the processor, which also launches what the card does."""
        compute, beside = time.busy_s["compute"], time.busy_s["cpu"] + time.overhead_s
        card_s, cpu_s = (0.0, compute + beside) if self.machine.gpu is None else (compute, beside)
        return passes * card_s, passes * cpu_s


def predicted(
    workload: Workload,
    machine: Hardware,
    past: int,
    drafts: PredictedDrafting | None,
    inputs: EnergyInputs | None = None,
) -> dict[str, Any]:
    """The faster of streaming and of products on the CPU, with what the other would do and what would help.

    Raises:
        DoesNotFitError: the model does not fit into the machine.
    """
    case = Case.of(workload, machine, past, drafts)
    inputs = inputs or EnergyInputs.of(machine)
    chosen = case.best()
    prediction, runner_up = chosen.prediction, chosen.runner_up
    time = prediction.pass_time
    return {
        "precision": workload.precision,
        "tokens_per_s": prediction.tokens_per_s,
        "low": prediction.low,
        "high": prediction.high,
        "bound": prediction.bound,
        "binding_tier": time.binding,
        "weights_beyond_hbm": chosen.how,
        "runner_up_tokens_per_s": None if runner_up is None else runner_up.tokens_per_s,
        "busy_s": dict(time.busy_s),
        "overhead_s": time.overhead_s,
        "pass_s": time.total_s,
        "exposed_s": exposed_s(time, machine.overlap.value),
        "by_kind_s": busy_by_kind(
            case.workload,
            case.plan,
            machine,
            tokens=chosen.tokens,
            past=past,
            cpu_tokens=chosen.cpu_tokens,
        ),
        "pass_bytes": workload.pass_bytes,
        "plan": _without_orders(case.plan.to_dict()),
        "twice_as_fast": {name: case.best(other).prediction.tokens_per_s for name, other in upgrades(machine).items()},
        "bottlenecks": bottlenecks(case),
        "energy": case.energy(chosen, inputs).to_dict()
        | {"assumptions": {name: asdict(figure) for name, figure in inputs.figures.items()}},
        "assumptions": {name: asdict(figure) for name, figure in machine.figures.items()},
        "basis": machine.basis,
        "drafting": None if drafts is None else asdict(drafts.on(machine)),
    }


def bottlenecks(case: Case, most: int = 3) -> list[dict[str, Any]]:
    """What binds, and what would bind next if that were twice or infinitely fast; then of that, and so on.

    "drafting" binds where making a tree takes longer than what binds the pass. "infinitely_fast" is None where nothing
    else would be left.
    """
    on, draft_share, found = case.machine, 1.0, list[dict[str, Any]]()

    def speed(machine: Hardware, share: float) -> dict[str, Any]:
        drafting = None if case.drafts is None else case.drafts.on(machine)
        if drafting is not None:
            drafting = replace(drafting, draft_s=share * drafting.draft_s)
        best = case.best(machine, drafting).prediction
        time, name = best.pass_time, best.pass_time.binding
        longest = max(time.overhead_s, *time.busy_s.values())
        if drafting is not None and drafting.draft_s > longest:
            name = DRAFTING
        return {"tokens_per_s": best.tokens_per_s, "binding_tier": name}

    for _ in range(most):
        now = speed(on, draft_share)
        name = now["binding_tier"]
        if any(name == before["binding_tier"] for before in found):
            break  # what cannot be made faster, such as what a pass costs beside its layers
        twice = speed(*_faster(on, draft_share, name, 2.0))
        on, draft_share = _faster(on, draft_share, name, _INFINITE)
        after = speed(on, draft_share)
        nothing_left = any(after["binding_tier"] == before["binding_tier"] for before in [*found, now])
        found.append(now | {"twice_as_fast": twice, "infinitely_fast": None if nothing_left else after})
    return found


def _faster(machine: Hardware, draft_share: float, name: str, times: float) -> tuple[Hardware, float]:
    """A machine on which what binds is so many times as fast."""
    if name == DRAFTING:
        return machine, draft_share / times
    part = _PARTS.get(name, "gpu" if machine.gpu else "cpu and main memory")
    return upgrades(machine, times)[part], draft_share


def _without_orders(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan's bytes, without the lists of units."""
    return {
        name: {key: value for key, value in tier.items() if key not in ("order", "placement")}
        | {"pinned_bytes": tier["placement"]["pinned_bytes"], "ring_bytes": tier["placement"]["ring_bytes"]}
        for name, tier in plan.items()
        if isinstance(tier, dict)
    }
