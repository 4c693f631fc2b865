"""Whether the CPU multiplies, in DRAM, by weights that do not stay in the HBM tier: decided once, before planning.

On a GPU the CPU's sums differ from the GPU's in the last bits (fixed point against fp32), so an exact run does it only
where it was asked to. In mixed mode, which is lossy, it does so where it is faster.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tiercache.engine.machine import Machine
from tiercache.errors import UsageError


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
    def of_exact(cls, asked: int | None, machine: Machine, *, resident: bool) -> "OnCpu":
        """For an exact run.

        Args:
            asked: the option `cpu_tokens`.
            machine: where the model runs.
            resident: resident passes multiply by some planes of a matrix alone, so all planes must lie on one device.

        Raises:
            UsageError: it was asked for, but resident passes rule it out.
        """
        if resident and asked and machine.is_gpu:
            raise UsageError(
                f"cpu_tokens={asked} would multiply some planes of a matrix on {machine.device} and others on the CPU, "
                "which resident passes rule out; leave cpu_tokens= out, or choose drafter='ngram'"
            )
        wanted = not machine.is_gpu if asked is None else asked > 0
        return cls("cpu" in machine.kernels and wanted, asked)

    @classmethod
    def of_mixed(cls, asked: int | None, machine: Machine) -> "OnCpu":
        """For mixed mode, where `asked` is the option `cpu_tokens`."""
        wanted = machine.is_gpu if asked is None else asked > 0
        return cls("cpu" in machine.kernels and wanted, asked)

    def tokens(self, measure: Callable[[], int]) -> int:
        """Up to how many tokens a pass lets the CPU multiply; `measure` is called where the option leaves it open."""
        if not self.allowed:
            return 0
        return measure() if self.asked is None else self.asked
