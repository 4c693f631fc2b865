"""The machine that a run is on, as the cost model sees it: as it was measured, or by data sheets.

Knows the probe's cache and the table of hardware; measures nothing.
"""

from dataclasses import replace

from profiler.figure import Figure
from profiler.hardware import Gpu, Hardware, catalogue
from profiler.host_memory import host_memory
from tiercache.config.options import OffloadConfig
from tiercache.engine.machine import Machine
from tiercache.engine.probe_cache import measured_machine
from tiercache.tiers.device import device_of

_LIKELY_GPU = "3090"  # of whose machine the rest is assumed: only proportions matter to a choice


def this_hardware(machine: Machine, config: OffloadConfig, *, cpu_multiplies: bool) -> Hardware:
    """The machine of a run.

    Args:
        machine: its device.
        config: the options; a throttled link is that slow.
        cpu_multiplies: where the CPU stands in for a card it multiplies in DRAM what does not stay in the HBM tier, so
            that a pass of one token waits for no link, throttled or not.
    """
    free_bytes = host_memory().free_bytes
    if machine.is_gpu:
        if (probed := measured_machine(machine.device)) is not None and probed.gpu is not None:
            return replace(
                probed, gpu=_throttled(probed.gpu, config), dram=replace(probed.dram, capacity_bytes=free_bytes)
            )
        return replace(catalogue().machine(_LIKELY_GPU, dram_bytes=free_bytes), gpu=_gpu(machine, config))
    found = measured_machine() or catalogue().machine(None, dram_bytes=free_bytes)
    if config.link_gbps is None or cpu_multiplies:
        return found
    return replace(found, throttle_gbps=Figure(config.link_gbps, "spec", "throttled"))


def _gpu(machine: Machine, config: OffloadConfig) -> Gpu:
    return _throttled(catalogue().gpu_or_likely(device_of(machine.device).name), config)


def _throttled(card: Gpu, config: OffloadConfig) -> Gpu:
    return card if config.link_gbps is None else replace(card, link_gbps=Figure(config.link_gbps, "spec", "throttled"))
