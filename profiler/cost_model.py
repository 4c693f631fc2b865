"""Seconds of a pass, from a workload, a plan and a machine; pure functions of numbers.

Each resource is busy for its bytes over its bandwidth, or its operations over its rate (Williams et al., the roofline
model; MoE-Lightning's hierarchical one, arXiv 2411.11217, for links). What runs at once overlaps by a measured share w:
a pass takes w max + (1 - w) sum of its resources' seconds. Without overhead and with w = 1 it is the bound that no pass
beats.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from policies.plan import Plan
from policies.tables import Shown, Table
from policies.types import Key
from profiler import read_rates
from profiler.figure import ERROR, Basis
from profiler.hardware import Hardware
from profiler.matmul_rates import MatmulRates, nearest
from profiler.workload import Matmul, Workload

_GIGA, _TERA = 1e9, 1e12
_ROW_BYTES = 4096  # a row of the token embedding is read in whole blocks, most often one


@dataclass(frozen=True)
class PassTime(Shown):
    """Where the seconds of a pass go.

    Attributes:
        busy_s: of each resource: "compute" (the device that multiplies, its memory included), "cpu" (products in main
            memory beside a card), "link", "dram" (all traffic of main memory), "ssd".
        overhead_s: what layers cost beside bytes and operations.
        total_s: of the pass.
        bound_s: the least it could take.
    """

    busy_s: Mapping[str, float]
    overhead_s: float
    total_s: float
    bound_s: float

    @property
    def waits_s(self) -> float:
        """Of the pass, what it waits for slower tiers."""
        return max(0.0, self.total_s - self.busy_s["compute"] - self.busy_s["cpu"] - self.overhead_s)

    @property
    def binding(self) -> str:
        """The resource that is busy longest; "overhead" where that is what takes longest.

        "dram" where the CPU waits for it: both are then busy equally long, but for rounding.
        """
        longest = max(self.busy_s, key=lambda name: (round(self.busy_s[name], 9), name == "dram"))
        return "overhead" if self.overhead_s > self.busy_s[longest] else longest

    def tables(self) -> tuple[Table, ...]:
        """For how long each resource is busy."""
        busy = {**self.busy_s, "overhead": self.overhead_s, "the pass": self.total_s, "at least": self.bound_s}
        rows = tuple((name, f"{1e3 * seconds:.1f}") for name, seconds in busy.items() if seconds)
        return (Table(f"A pass, bound by {self.binding}", ("busy", "ms"), rows),)


@dataclass(frozen=True)
class Prediction(Shown):
    """Tokens a second, with their band.

    Attributes:
        tokens_per_s: the best guess.
        low, high: the band; never above the bound.
        bound: tokens a second that nothing beats on this machine with this plan.
        pass_time: of one pass.
        basis: what the machine's figures rest on.
    """

    tokens_per_s: float
    low: float
    high: float
    bound: float
    pass_time: PassTime
    basis: Basis

    def tables(self) -> tuple[Table, ...]:
        """The speed with its band, and where the time of a pass goes."""
        row = (f"{self.tokens_per_s:.2f}", f"{self.low:.2f} to {self.high:.2f}", f"{self.bound:.2f}", self.basis)
        return (Table("Predicted", ("tokens/s", "between", "at most", "basis"), (row,)), *self.pass_time.tables())


@dataclass(frozen=True)
class Drafting:
    """Drafting, as far as time is concerned.

    Attributes:
        nodes: of the tree that one pass verifies.
        tokens_per_pass: emitted on average, the target's own token included.
        draft_s: what making the tree takes.
    """

    nodes: int
    tokens_per_pass: float
    draft_s: float


def pass_time(
    workload: Workload, plan: Plan, hardware: Hardware, *, tokens: int = 1, past: int = 0, cpu_tokens: int = 0
) -> PassTime:
    """Seconds of one pass.

    Args:
        workload: the model.
        plan: where its units lie.
        hardware: the machine.
        tokens: that the pass carries.
        past: tokens in the KV cache before it.
        cpu_tokens: up to how many tokens the CPU multiplies, in main memory, what does not stay on the card.
    """
    staying, moved = set(plan.fastest.placement.pinned), plan.copied
    beside = plan.has_hbm and tokens <= cpu_tokens
    on_cpu: list[Matmul] = []
    on_device: list[Matmul] = []
    for matmul in workload.matmuls:
        (on_cpu if beside and not staying.issuperset(matmul.units) else on_device).append(matmul)
    up_bytes = 0 if beside else sum(workload.payload[key] for key in moved)
    ssd_bytes = sum(workload.payload[key] for key in plan.streamed)
    cpu_bytes = sum(workload.payload[key] for matmul in on_cpu for key in matmul.units)
    fitted = {name: figure.value for name, figure in hardware.fitted.items()}
    now = replace(hardware, cpu_gflops=hardware.cpu_gflops.scaled(1 / hardware.pace))
    busy = {
        "compute": _computed_s(workload, on_device, hardware, tokens, past) * fitted.get("compute", 1.0),
        "cpu": sum(_matmul_s(workload, m, tokens, now.dram.gbps.value, now.cpu_gflops.value) for m in on_cpu),
        "link": _link_s(hardware, up_bytes, 0 if beside else len(moved)),
        "ssd": _ssd_s(workload, plan, hardware) * fitted.get("ssd", 1.0),
    }
    busy["dram"] = (up_bytes + ssd_bytes + cpu_bytes) / (hardware.dram.gbps.value * _GIGA)
    brought = len(plan.streamed) + (0 if beside else len(moved))
    here = staying if beside else None
    overhead = _overhead_s(workload, plan, hardware, tokens, (brought, here)) * hardware.pace
    overhead *= fitted.get("overhead", 1.0)
    roofs = _device_s(workload, on_device, now, tokens, past) + busy["cpu"]
    ssd_gbps = max(hardware.ssd_gbps.value, *(rate.gbps.value for rate in hardware.reads), 0.0)
    bound = max(roofs, busy["link"], ssd_bytes / (ssd_gbps * _GIGA), busy["dram"])
    return PassTime(busy, overhead, max(combined_s(busy, overhead, hardware.overlap.value), bound), bound)


def combined_s(busy_s: Mapping[str, float], overhead_s: float, overlap: float) -> float:
    """Seconds of a pass from those of its resources, of which the share `overlap` of what could run at once does."""
    serial = busy_s["compute"] + busy_s["cpu"] + overhead_s  # layers follow one another, wherever they are multiplied
    most = max(serial, busy_s["link"], busy_s["ssd"], busy_s["dram"])
    return max(overlap * most + (1 - overlap) * (serial + busy_s["link"] + busy_s["ssd"]), most)


def predict(
    workload: Workload,
    plan: Plan,
    hardware: Hardware,
    *,
    past: int = 0,
    cpu_tokens: int = 0,
    drafting: Drafting | None = None,
) -> Prediction:
    """Tokens a second of decoding behind `past` tokens; arguments as of `pass_time`."""
    tokens = 1 if drafting is None else 1 + drafting.nodes
    made = pass_time(workload, plan, hardware, tokens=tokens, past=past, cpu_tokens=cpu_tokens)
    emitted, draft_s = (1.0, 0.0) if drafting is None else (drafting.tokens_per_pass, drafting.draft_s)
    speed, bound = emitted / (made.total_s + draft_s), emitted / (made.bound_s + draft_s)
    error = ERROR[hardware.basis]
    return Prediction(speed, speed / (1 + error), min(bound, speed * (1 + error)), bound, made, hardware.basis)


def upgrades(hardware: Hardware, times: float = 2.0) -> dict[str, Hardware]:
    """The machine with one thing made so many times as fast, each in turn, by its name."""
    attention = None if hardware.attention_gflops is None else hardware.attention_gflops.scaled(times)
    found = {
        "cpu and main memory": replace(
            hardware,
            dram=replace(hardware.dram, gbps=hardware.dram.gbps.scaled(times)),
            cpu_gflops=hardware.cpu_gflops.scaled(times),
            matmuls=hardware.matmuls if hardware.gpu else tuple(rates.scaled(times) for rates in hardware.matmuls),
            attention_gflops=attention if hardware.gpu is None else hardware.attention_gflops,
        ),
        "ssd": replace(
            hardware,
            ssd_gbps=hardware.ssd_gbps.scaled(times),
            reads=tuple(rate.scaled(times) for rate in hardware.reads),
        ),
        "overhead a layer": replace(
            hardware,
            layer_s=hardware.layer_s.scaled(1 / times),
            fused_layer_s=hardware.fused_layer_s and hardware.fused_layer_s.scaled(1 / times),
            matmuls=tuple(rates.with_layers(1 / times) for rates in hardware.matmuls),
        ),
    }
    if (card := hardware.gpu) is not None:
        memory = replace(card.memory, gbps=card.memory.gbps.scaled(times))
        found["link"] = replace(hardware, gpu=replace(card, link_gbps=card.link_gbps.scaled(times)))
        faster = tuple(rates.scaled(times) for rates in hardware.matmuls)
        found["gpu"] = replace(
            hardware,
            gpu=replace(card, memory=memory, tflops=card.tflops.scaled(times)),
            matmuls=faster,
            attention_gflops=attention,
        )
    return found


def _computed_s(workload: Workload, matmuls: list[Matmul], hardware: Hardware, tokens: int, past: int) -> float:
    """Seconds of products and attention as they are now; without a card at the pace of the CPU."""
    found = _device_s(workload, matmuls, hardware, tokens, past, hardware.matmuls)
    if hardware.gpu is not None:
        return found
    nbytes = sum(workload.payload[key] for matmul in matmuls for key in matmul.units)
    read_s = min(found, nbytes / (hardware.dram.gbps.value * _GIGA))
    return read_s + (found - read_s) * hardware.pace


def _device_s(
    workload: Workload,
    matmuls: list[Matmul],
    hardware: Hardware,
    tokens: int,
    past: int,
    measured: Sequence[MatmulRates] = (),
) -> float:
    """Seconds of products and attention where the model computes; by roofs where nothing was `measured`."""
    card = hardware.gpu
    gbps = hardware.dram.gbps.value if card is None else card.memory.gbps.value
    gflops = hardware.cpu_gflops.value if card is None else card.tflops.value * _TERA / _GIGA
    pairs = tokens * (past + (tokens + 1) / 2)
    kept_bytes = workload.kv_bytes * min(1.0, (past + tokens) / workload.context)
    attended = gflops if not measured or hardware.attention_gflops is None else hardware.attention_gflops.value
    attention = max(kept_bytes / gbps, 4 * workload.attention_width * pairs / attended) / _GIGA
    if not measured:
        return attention + sum(_matmul_s(workload, matmul, tokens, gbps, gflops) for matmul in matmuls)
    nbytes, widths = dict.fromkeys(range(len(measured)), 0), dict.fromkeys(range(len(measured)), 0)
    for matmul in matmuls:
        own = sum(workload.payload[key] for key in matmul.units)
        kind = nearest(measured, own / matmul.weights)
        nbytes[kind] += own
        widths[kind] += matmul.width
    return attention + sum(
        rates.product_s(nbytes[kind], tokens) + rates.activation_s(widths[kind], tokens)
        for kind, rates in enumerate(measured)
    )


def _matmul_s(workload: Workload, matmul: Matmul, tokens: int, gbps: float, gflops: float) -> float:
    nbytes = sum(workload.payload[key] for key in matmul.units)
    return max(nbytes / gbps, 2 * matmul.weights * tokens / gflops) / _GIGA


def _overhead_s(
    workload: Workload, plan: Plan, hardware: Hardware, tokens: int, units: tuple[int, set[Key] | None]
) -> float:
    """Seconds of layers, of units that are brought and of rows of the token embedding, beside bytes and operations.

    `units`: how many are brought, and those that lie where the model computes; None for all, sooner or later.
    """
    (brought, here), unit_s = units, hardware.unit_s.value
    fused_s, layer_s = (hardware.fused_layer_s or hardware.layer_s).value, hardware.layer_s.value
    shares = [_fused_share(halves, here) for halves in workload.fused]
    found = hardware.pass_s.value + (workload.layers - sum(shares)) * layer_s + sum(shares) * fused_s
    if hardware.matmuls:
        measured = hardware.matmuls[nearest(hardware.matmuls, workload.bytes_per_weight)]
        beside_s = measured.beside_s(workload.layers, tokens)
        found = found if beside_s is None else beside_s
        unit_s = unit_s if measured.unit_s is None else measured.unit_s.value
    found += brought * unit_s
    held = {key for tier in (plan.hbm, plan.dram) if tier is not None for key in tier.placement.pinned}
    if workload.table is not None and workload.table not in held:  # one after the other, before the first layer
        found += read_rates.seconds(hardware.reads, 1, [_ROW_BYTES] * tokens) or 0.0
    return found


def _fused_share(halves: tuple[tuple[Key, ...], ...], here: set[Key] | None) -> float:
    """Of a layer, what runs as one piece: its halves up to the first of which some weight is multiplied elsewhere."""
    if here is None:
        return len(halves) / 2
    whole = [here.issuperset(half) for half in halves]
    return (whole.index(False) if False in whole else len(halves)) / 2


def _ssd_s(workload: Workload, plan: Plan, hardware: Hardware) -> float:
    """Seconds of reads, by their sizes where these were measured."""
    sizes = [nbytes for key in plan.streamed for nbytes in workload.reads.get(key, ())]
    taken = read_rates.seconds(hardware.reads, workload.readers, sizes) if workload.reads else None
    nbytes = sum(workload.payload[key] for key in plan.streamed)
    return nbytes / (hardware.ssd_gbps.value * _GIGA) if taken is None else taken


def _link_s(hardware: Hardware, nbytes: int, copies: int) -> float:
    """Seconds of copies to the card."""
    return nbytes / (hardware.copy_gbps * _GIGA) + copies * hardware.link_latency_s
