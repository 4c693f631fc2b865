"""Resolves the budgets against the machine and divides them: one plan, and in mixed mode the recipe that goes with it.

Knows demands, budgets and free memory; allocates nothing.
"""

from dataclasses import replace

import torch

from profiler import hardware
from tiercache.config import Budget, OffloadConfig, human
from tiercache.engine import mixed_plan
from tiercache.engine.memory import MemoryRequirements, memory_requirements
from tiercache.engine.mixed_plan import MixedPlan
from tiercache.engine.plan import Plan, fill_tiers
from tiercache.engine.source import Opened
from tiercache.errors import DoesNotFitError
from tiercache.quant.planes import scale_row_bytes
from tiercache.store.calibration import Calibration
from tiercache.store.manifest import Manifest


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


def choose(
    opened: Opened, config: OffloadConfig, device: torch.device, calibration: Calibration | None
) -> tuple[MixedPlan, Opened, MemoryRequirements, Plan]:
    """Choose the recipe and plan for it: of several, the best whose ranking planes all stay in HBM."""
    mixed_plan.refuse_unfit(opened)
    assert opened.store is not None
    slotted = device.type == "cuda" or config.hbm not in (None, Budget())
    found, refused = None, None
    for plan in mixed_plan.choose(calibration or Calibration.load(opened.store), opened, config):
        try:
            found = _fit(plan, opened, config, device, slotted)
        except DoesNotFitError as error:  # another plan may need less
            refused = error if refused is None or error.missing_bytes < refused.missing_bytes else refused
            continue
        hbm = found[3].hbm
        if hbm is None or len(hbm.placement.pinned) == len(hbm.order):
            break
    if found is None:
        assert refused is not None
        raise refused
    return found


def _fit(
    plan: MixedPlan, opened: Opened, config: OffloadConfig, device: torch.device, slotted: bool
) -> tuple[MixedPlan, Opened, MemoryRequirements, Plan]:
    """The plan for one recipe; where planes above do not fit DRAM, the least missed stay on the SSD."""
    store = opened.store
    limit: int | None = None
    assert store is not None
    while True:
        opened = replace(opened, manifest=plan.manifest(store, config.precision, slotted=slotted))
        asked = memory_requirements(opened, config, device, kernels=True)
        if slotted:
            reserved = {**asked.needs.compute, "neurons in passing": plan.passing_bytes(opened.manifest)}
            on_host = {**asked.needs.dram, "scales of deltas": _delta_bytes(opened.manifest, config, device)}
            if device.type != "cpu":
                on_host["staging of neurons"] = plan.passing_bytes(opened.manifest)
            asked = replace(asked, needs=replace(asked.needs, compute=reserved, dram=on_host))
        held = sum(asked.payload[key] for block in opened.manifest.blocks for key in set(block.units))
        try:
            made = divide(opened, asked, config, device)
        except DoesNotFitError as error:
            if not slotted or error.tier != "dram":
                raise
            before, limit = plan.tops, held - max(error.missing_bytes, held // 64)
            while (plan := mixed_plan.capped(plan, store, limit, slotted=slotted)).tops == before:
                if limit <= 0:  # nothing is left to leave out
                    raise
                limit -= held // 64 + 1
        else:
            if slotted or limit is not None or not made.streamed:
                return plan, opened, asked, made
            limit = max(_room_for_neurons(asked, made, opened.manifest), plan.share_bytes(store))
            plan = mixed_plan.capped(plan, store, limit, slotted=slotted)


def _delta_bytes(manifest: Manifest, config: OffloadConfig, device: torch.device) -> int:
    """A second copy of the neurons' scales, where the CPU may multiply planes that have no slot."""
    if config.cpu_tokens == 0 or (config.cpu_tokens is None and device.type == "cpu"):
        return 0
    blocks = manifest.blocks
    return sum(block.neurons * block.parts * scale_row_bytes(block.columns, block.group) for block in blocks)


def _room_for_neurons(asked: MemoryRequirements, made: Plan, manifest: Manifest) -> int:
    """What of DRAM is left for neurons that stay, beside everything else."""
    neurons = {key for block in manifest.blocks for key in block.units}
    others = sum(size for key, size in asked.needs.sizes.items() if key in asked.needs.order and key not in neurons)
    return made.dram.capacity_bytes - sum(made.dram.reserved_bytes.values()) - others
