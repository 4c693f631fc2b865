"""Where the weights of a model go, before anything is allocated: what exact and mixed runs have in common.

Knows plans, requirements and tiers; decides nothing.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

from policies.plan import Plan
from policies.run_plan import Decision
from profiler.planner import Ranked
from profiler.workload import Workload
from tiercache.config.options import OffloadConfig
from tiercache.engine.drafting import DrafterSpec, widened
from tiercache.engine.machine import Machine
from tiercache.engine.memory import MemoryRequirements
from tiercache.engine.on_cpu import OnCpu
from tiercache.engine.run import ExactRun, ResidentRun
from tiercache.engine.source import Opened
from tiercache.engine.workload import workload_of
from tiercache.quant.planes import PRECISIONS
from tiercache.tiers.breakeven import measure_breakeven
from tiercache.tiers.stack import TierStack


@dataclass(frozen=True, kw_only=True)
class Placement:
    """See the module.

    Attributes:
        config: the options that it was made for.
        machine: where the model runs.
        opened: the model, its units cut as the options say.
        asked: what was asked of memory.
        plan: what lies where.
        on_cpu: whether the CPU multiplies, in DRAM, by what does not stay in HBM.
        decisions: how it came about.
        ranked: it and the other ways that were looked at, with what they would do; empty where nothing was predicted.
    """

    config: OffloadConfig
    machine: Machine
    opened: Opened
    asked: MemoryRequirements
    plan: Plan
    on_cpu: OnCpu
    decisions: tuple[Decision, ...] = ()
    ranked: Sequence[Ranked] = ()

    @cached_property
    def workload(self) -> Workload:
        """The model as the cost model sees it."""
        return workload_of(self.opened, self.asked, widened(self.config))

    def measure_cpu_tokens(self, precision: str) -> int:
        """Up to how many tokens a pass lets the CPU multiply by planes of a precision; call it before tiers fill."""
        machine = self.machine
        return self.on_cpu.tokens(
            lambda: measure_breakeven(machine.kernels["cpu"], PRECISIONS[precision], machine.device)
        )


@dataclass(frozen=True, kw_only=True)
class ExactPlacement(Placement):
    """A placement of an exact run.

    Attributes:
        drafter_spec: which drafters; None where no drafter was asked for.
        drafts: who drafts, of "auto"; empty where it was not asked for.
        room_price: see `policies.room.price`; None where nothing was compared.
    """

    drafter_spec: DrafterSpec | None = None
    drafts: str = ""
    room_price: float | None = None

    def start(self, tiers: TierStack, stack: ExitStack, *, show_progress: bool | None) -> ExactRun:
        """Fill the tiers, and say how passes go."""
        tokens = self.measure_cpu_tokens(self.config.precision) if self.plan.copied else 0
        tiers.load(show_progress=show_progress)
        return ResidentRun(tokens, self.asked, self.plan) if self.config.resident else ExactRun(tokens)
