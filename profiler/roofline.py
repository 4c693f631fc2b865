"""The hierarchical roofline of a machine, and a model's operations on it.

MoE-Lightning (arXiv 2411.11217, section 4.1): a processor at level i does at most min(peak_i, B_i I_i, B_ji I_j)
operations a second. B_i is the bandwidth of its own memory, B_ji that of the link from level j. I_i is operations for
each byte that is read from memory i, and I_j for each that crosses the link. Knows numbers; draws nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from policies.plan import Plan
from profiler.cost_model import pass_time
from profiler.explanation import KV_CACHE, busy_by_kind, kind_of
from profiler.hardware import Hardware
from profiler.workload import Workload

_GIGA = 1e9
WHOLE = "whole pass"


@dataclass(frozen=True)
class Roof:
    """A limit of operations a second.

    Attributes:
        name: of the level.
        gbps: bandwidth, 1e9 bytes a second.
        peak_gflops: of the processor that works on what comes through, 1e9 operations a second.
        processor: its name.
    """

    name: str
    gbps: float
    peak_gflops: float
    processor: str

    def gflops(self, intensity: float) -> float:
        """The most operations a second, in 1e9, at so many operations a byte."""
        return min(self.peak_gflops, self.gbps * intensity)

    @property
    def ridge(self) -> float:
        """Operations a byte from which on the processor binds and no longer the bytes."""
        return self.peak_gflops / self.gbps


@dataclass(frozen=True)
class Phase:
    """A pass: so many tokens behind so many."""

    tokens: int
    past: int


@dataclass(frozen=True)
class Operation:
    """A kind of layer in a phase, where it is bound.

    Attributes:
        phase: its name.
        kind: of layer; "whole pass" for all of it, overhead and overlap included.
        resource: that is busy longest for it, as the cost model calls it; "all" for the whole pass.
        intensity: operations for each byte that comes through that resource.
        gflops: 1e9 operations a second while that resource is busy.
    """

    phase: str
    kind: str
    resource: str
    intensity: float
    gflops: float


def roofs(hardware: Hardware) -> dict[str, Roof]:
    """A roof for each resource, by the cost model's name of it."""
    card, cpu = hardware.gpu, hardware.cpu_gflops.value
    dram, ssd = hardware.dram.gbps.value, hardware.ssd_gbps.value
    if card is None:
        return {"compute": Roof("main memory", dram, cpu, "CPU"), "ssd": Roof("SSD", ssd, cpu, "CPU")}
    peak, name = 1e3 * card.tflops.value, f"{card.name}, {card.compute_type}"
    return {
        "compute": Roof("card memory", card.memory.gbps.value, peak, name),
        "cpu": Roof("main memory", dram, cpu, "CPU"),
        "link": Roof("link", card.link_gbps.value, peak, name),
        "ssd": Roof("SSD", ssd, peak, name),
    }


def operations(workload: Workload, plan: Plan, hardware: Hardware, phases: Mapping[str, Phase]) -> list[Operation]:
    """The operations of some passes, each treated the faster way: weights copied up, or multiplied by the CPU."""
    return [
        each
        for name, phase in phases.items()
        for each in _of_phase(workload, plan, hardware, name, phase)
        if each.gflops
    ]


def _of_phase(workload: Workload, plan: Plan, hardware: Hardware, name: str, phase: Phase) -> list[Operation]:
    def time(cpu_tokens: int) -> float:
        given = {"tokens": phase.tokens, "past": phase.past, "cpu_tokens": cpu_tokens}
        return pass_time(workload, plan, hardware, **given).total_s

    beside = plan.has_hbm and time(phase.tokens) < time(0)
    cpu_tokens = phase.tokens if beside else 0
    busy = busy_by_kind(workload, plan, hardware, tokens=phase.tokens, past=phase.past, cpu_tokens=cpu_tokens)
    traffic = _traffic(workload, plan, phase, beside=beside)
    found = []
    for kind, seconds in busy.items():
        limits = {resource: each for resource, each in seconds.items() if resource != "dram"}
        resource = max(limits, key=lambda each: limits[each])
        flops, nbytes = traffic.get(kind, {}).get(resource, (0.0, 0.0))
        if flops:  # a unit that nothing multiplies by has no place on a roof
            found.append(Operation(name, kind, resource, flops / nbytes, flops / limits[resource] / _GIGA))
    flops = sum(of_kind["all"][0] for of_kind in traffic.values())
    nbytes = sum(of_kind["all"][1] for of_kind in traffic.values())
    return [*found, Operation(name, WHOLE, "all", flops / nbytes, flops / time(cpu_tokens) / _GIGA)]


def _traffic(
    workload: Workload, plan: Plan, phase: Phase, *, beside: bool
) -> dict[str, dict[str, tuple[float, float]]]:
    """Of each kind of layer the operations and the bytes that come through each resource.

    What comes over the link or from the SSD is multiplied by together with what stays, so that all operations of the
    kind count for these bytes.
    """
    staying, streamed, moved = set(plan.fastest.placement.pinned), set(plan.streamed), set(plan.copied)
    names = workload.needs.names
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for matmul in workload.matmuls:
        on_cpu = beside and not staying.issuperset(matmul.units)
        flops = 2.0 * matmul.weights * phase.tokens
        nbytes = float(sum(workload.payload[key] for key in matmul.units))
        up = 0.0 if beside else float(sum(workload.payload[key] for key in matmul.units if key in moved))
        read = float(sum(workload.payload[key] for key in matmul.units if key in streamed))
        sums = found.setdefault(kind_of(names[matmul.units[0]]), {})
        for resource, done, through in (
            ("cpu" if on_cpu else "compute", flops, nbytes),
            ("link", 0.0 if on_cpu else flops, up),
            ("ssd", flops, read),
            ("all", flops, nbytes),
        ):
            before = sums.get(resource, (0.0, 0.0))
            sums[resource] = (before[0] + done, before[1] + through)
    pairs = phase.tokens * (phase.past + (phase.tokens + 1) / 2)
    kept = workload.kv_bytes * min(1.0, (phase.past + phase.tokens) / workload.context)
    attention = (4.0 * workload.attention_width * pairs, kept)
    return found | {KV_CACHE: {"compute": attention, "all": attention}}
