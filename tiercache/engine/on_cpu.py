"""Whether the CPU multiplies, in DRAM, by weights that do not stay in the HBM tier: decided once, before planning.

On a GPU the CPU's sums differ from the GPU's in the last bits (fixed point against fp32), so an exact run does it only
where it was asked to. In mixed mode, which is lossy, it does so where it is faster.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tiercache.engine.machine import Machine


@dataclass(frozen=True)
class OnCpu:
    """The decision.

    Attributes:
        allowed: the CPU may multiply in DRAM, so memory is reserved for it.
        asked: for passes of up to so many tokens; None to measure up to how many it is faster.
    """

    allowed: bool
    asked: int | None

    @classmethod
    def of(cls, asked: int | None, machine: Machine, *, lossy: bool) -> "OnCpu":
        """For a run that may be `lossy` or not; `asked` is the option `cpu_tokens`."""
        wanted = machine.is_gpu == lossy if asked is None else asked > 0
        return cls("cpu" in machine.kernels and wanted, asked)

    def tokens(self, measure: Callable[[], int]) -> int:
        """Up to how many tokens a pass lets the CPU multiply; `measure` is called where the option leaves it open."""
        if not self.allowed:
            return 0
        return measure() if self.asked is None else self.asked
