"""Resolves the budgets against the machine's memory and divides them into a plan. Allocates nothing."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from policies import plan
from policies.plan import Plan, PlanInputs, TooSmallError
from policies.settings import DEFAULT
from profiler.host_memory import host_memory
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import Budget, human
from tiercache.engine.memory import MemoryRequirements
from tiercache.engine.source import Opened
from tiercache.errors import DoesNotFitError
from tiercache.tiers.device import device_of, on_gpu, on_host

T = TypeVar("T")


@dataclass(frozen=True)
class Budgets:
    """Bytes of each tier.

    Attributes:
        hbm_bytes: of the HBM tier; None where there is to be none.
        dram_bytes: of main memory.
        free_bytes: of main memory, whatever the budget allows.
        hbm_on_host: a region of main memory stands in for the HBM tier.
    """

    hbm_bytes: int | None
    dram_bytes: int
    free_bytes: int
    hbm_on_host: bool

    @property
    def has_hbm(self) -> bool:
        """Whether there is to be an HBM tier."""
        return self.hbm_bytes is not None

    @classmethod
    def of(cls, config: OffloadConfig, device: torch.device) -> "Budgets":
        """The options' budgets on this machine, now.

        Raises:
            DoesNotFitError: `hbm` is more than the GPU has free, or main memory that stands in for it.
        """
        main = host_memory()
        hbm_bytes: int | None = None
        own_memory = device_of(device)
        own_memory.release_cache()  # what torch keeps for itself is free to us
        own_memory.reset_peak()
        if (found := own_memory.free_bytes()) is not None:
            free, total = found
            hbm_bytes = (config.hbm or Budget()).resolve(total_bytes=total, free_bytes=free)
            _refuse_more_than_free(hbm_bytes, free, total, device)
        elif config.hbm is not None and config.hbm != Budget():
            hbm_bytes = config.hbm.resolve(total_bytes=main.total_bytes, free_bytes=main.free_bytes)
            _refuse_more_than_free(hbm_bytes, main.free_bytes, main.total_bytes, device)
        taken = hbm_bytes if hbm_bytes is not None and on_host(device) else 0
        dram_bytes = config.dram.resolve(total_bytes=main.total_bytes, free_bytes=max(1, main.free_bytes - taken))
        return cls(hbm_bytes, dram_bytes, main.free_bytes, not on_gpu(device))

    def divide(self, opened: Opened, asked: MemoryRequirements, prefetch_bytes: int = DEFAULT.prefetch_bytes) -> Plan:
        """Divide the budgets for a model; `prefetch_bytes` as of `Settings`.

        Raises:
            DoesNotFitError: a budget, or the free memory, is too small.
        """
        needs, own = asked.needs, 0
        if opened.memory is not None:  # the weights are in main memory already, are the caller's, and stay
            own = sum(needs.sizes[key] for key in needs.order)
            needs = replace(needs, always=frozenset(needs.order) if self.hbm_bytes is None else needs.always)
        made = fill_tiers(
            needs, hbm_bytes=self.hbm_bytes, dram_bytes=self.dram_bytes + own, prefetch_bytes=prefetch_bytes
        )
        in_host_memory = [made.dram, made.hbm] if self.hbm_on_host else [made.dram]
        total, free_bytes = sum(tier.allocated_bytes for tier in in_host_memory if tier), self.free_bytes + own
        if total > free_bytes:
            raise DoesNotFitError(
                f"the plan takes {human(total)} of main memory, {human(free_bytes)} are free: {total - free_bytes} "
                "bytes are missing; lower dram=, or close other programs",
                missing_bytes=total - free_bytes,
            )
        return made


def _refuse_more_than_free(hbm_bytes: int, free: int, total: int, device: torch.device) -> None:
    """Refuse what the driver would refuse later, when half of the weights are loaded."""
    if (missing := hbm_bytes - free) > 0:
        whose, without = str(device), "leave it out for nine tenths of what is free"
        if on_host(device):
            whose, without = "main memory, which stands in for a card,", "leave it out for none"
        raise DoesNotFitError(
            f"hbm={human(hbm_bytes)}, but {whose} has {human(free)} free of {human(total)}: {missing} bytes are "
            f"missing; lower hbm=, {without}, or close other programs",
            missing_bytes=missing,
            tier="hbm",
        )


def fitted(make: Callable[[], T]) -> T | DoesNotFitError:
    """What `make` returns, or why it does not fit: for a search that looks at several."""
    try:
        return make()
    except DoesNotFitError as error:
        return error


def fill_tiers(
    inputs: PlanInputs, *, hbm_bytes: int | None, dram_bytes: int, prefetch_bytes: int = DEFAULT.prefetch_bytes
) -> Plan:
    """`policies.plan.fill_tiers`, with an error for people.

    Raises:
        DoesNotFitError: the smallest working set does not fit; says of which tier how many bytes are missing.
    """
    try:
        return plan.fill_tiers(inputs, hbm_bytes=hbm_bytes, dram_bytes=dram_bytes, prefetch_bytes=prefetch_bytes)
    except TooSmallError as small:
        what, way_out = "matrix", f"raise {small.tier}=, or lower context= (in Python also logits=)"
        parts = [f"{human(nbytes)} {purpose}" for purpose, nbytes in small.reserved.items() if nbytes]
        if small.first_level_bytes is not None:
            first = human(small.first_level_bytes)
            parts.append(f"{first} of every matrix's first plane, which the resident drafter does with")
            what, way_out = "unit", f"{way_out}, or choose another drafter"
        parts.append(f"{human(small.largest_bytes)} for {small.largest}, the largest {what}")
        raise DoesNotFitError(
            f"{small.tier}={human(small.capacity_bytes)} is too small by {human(small.missing_bytes)} "
            f"({small.missing_bytes} bytes): it must hold {', '.join(parts)}; {way_out}",
            missing_bytes=small.missing_bytes,
            tier=small.tier,
        ) from None
