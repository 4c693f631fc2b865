"""Where the weights of a model go, before anything is allocated: what exact and mixed runs have in common.

Knows plans, requirements and tiers; decides nothing.
"""

from dataclasses import dataclass

from policies.plan import Plan
from tiercache.config.options import OffloadConfig
from tiercache.engine.machine import Machine
from tiercache.engine.memory import MemoryRequirements
from tiercache.engine.on_cpu import OnCpu
from tiercache.engine.source import Opened
from tiercache.quant.planes import PRECISIONS
from tiercache.tiers.breakeven import measure_breakeven


@dataclass(frozen=True)
class Placement:
    """See the module.

    Attributes:
        config: the options that it was made for.
        machine: where the model runs.
        opened: the model, its units cut as the options say.
        asked: what was asked of memory.
        plan: what lies where.
        on_cpu: whether the CPU multiplies, in DRAM, by what does not stay in HBM.
    """

    config: OffloadConfig
    machine: Machine
    opened: Opened
    asked: MemoryRequirements
    plan: Plan
    on_cpu: OnCpu

    def measure_cpu_tokens(self, precision: str) -> int:
        """Up to how many tokens a pass lets the CPU multiply by planes of a precision; call it before tiers fill."""
        machine = self.machine
        return self.on_cpu.tokens(
            lambda: measure_breakeven(machine.kernels["cpu"], PRECISIONS[precision], machine.device)
        )
