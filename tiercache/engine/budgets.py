"""Resolves the budgets against the machine's memory and divides them into a plan. Allocates nothing."""

from dataclasses import replace

import torch

from profiler import hardware
from tiercache.config import Budget, OffloadConfig, human
from tiercache.engine.memory import MemoryRequirements
from tiercache.engine.plan import Plan, fill_tiers
from tiercache.engine.source import Opened
from tiercache.errors import DoesNotFitError


def divide(opened: Opened, asked: MemoryRequirements, config: OffloadConfig, device: torch.device) -> Plan:
    """Resolve the budgets and divide them."""
    main = hardware.memory()
    hbm_bytes: int | None = None
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself is free to us
        torch.cuda.reset_peak_memory_stats(device)
        free, total = torch.cuda.mem_get_info(device)
        hbm_bytes = (config.hbm or Budget()).resolve(total_bytes=total, free_bytes=free)
    elif config.hbm is not None and config.hbm != Budget():
        hbm_bytes = config.hbm.resolve(total_bytes=main.total_bytes, free_bytes=main.free_bytes)
    taken = hbm_bytes if hbm_bytes is not None and device.type == "cpu" else 0
    dram_bytes = config.dram.resolve(total_bytes=main.total_bytes, free_bytes=max(1, main.free_bytes - taken))
    needs, own = asked.needs, 0
    if opened.memory is not None:  # the weights are in main memory already, are the caller's, and stay
        own = sum(needs.sizes[key] for key in needs.order)
        needs = replace(needs, always=frozenset(needs.order) if hbm_bytes is None else needs.always)
    made = fill_tiers(needs, hbm_bytes=hbm_bytes, dram_bytes=dram_bytes + own)
    _check_free(made, main.free_bytes + own, device)
    return made


def _check_free(made: Plan, free_bytes: int, device: torch.device) -> None:
    """Refuse a plan that the machine's free memory cannot hold, whatever the budget allows."""
    on_host = [made.dram] if made.hbm is None or device.type == "cuda" else [made.dram, made.hbm]
    total = sum(tier.slab_bytes + tier.neuron_bytes + sum(tier.reserved_bytes.values()) for tier in on_host)
    if total > free_bytes:
        raise DoesNotFitError(
            f"the plan takes {human(total)} of main memory, {human(free_bytes)} are free: {total - free_bytes} bytes "
            "are missing; lower dram=, or close other programs",
            missing_bytes=total - free_bytes,
        )
