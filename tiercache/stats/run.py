"""What happened, in numbers that add up: counters of each tier, of the passes and of the process.

Knows nothing of who counts; the counting is done where the bytes move.
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from policies.tables import Shown, Table, human
from tiercache.stats.drafting import DraftStats
from tiercache.stats.neurons import NeuronStats

SCHEMA = "tiercache.stats/1"
_NEWEST = 64  # passes whose seconds are kept


@dataclass
class TierStats(Shown):
    """Counters of one tier.

    `needed_bytes = hit_bytes + miss_bytes`, and what a tier misses is what the tier below it was asked for; loaded
    bytes that no pass used (`dropped_bytes`) come on top. Bytes are the weights' own, without padding.

    Attributes:
        capacity_bytes: the tier's budget.
        reserved_bytes: what of it is spoken for, by purpose.
        peak_bytes: the most that was in use.
        hits, misses: requests for a unit that stayed here, and that had to be brought.
        loaded_bytes: brought here, the first filling of the pinned units included.
        stall_s: seconds that the consumer of this tier waited, by cause.
    """

    capacity_bytes: int = 0
    reserved_bytes: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    hits: int = 0
    misses: int = 0
    hit_bytes: int = 0
    miss_bytes: int = 0
    loaded_bytes: int = 0
    dropped_bytes: int = 0
    stall_s: Counter[str] = field(default_factory=Counter)

    @property
    def needed_bytes(self) -> int:
        """What was asked of this tier."""
        return self.hit_bytes + self.miss_bytes

    def tables(self) -> tuple[Table, ...]:
        """Its bytes and waits."""
        return (_tiers_table("A tier", {"": self}),)


@dataclass
class Stats(Shown):
    """The statistics of one attached model.

    Attributes:
        tiers: counters by tier, fastest first.
        compute_dtype: what the model computes in: "fp32", "fp16" or "bf16".
        kernels: who multiplies: "torch" for original weights, "decode", or the backend of the plane kernels.
        fused_layers, unfused_layers: calls of decoder layers that the kernels ran as one piece, and of others of the
            same kind, which ran module by module. Layers that are never fused count nowhere.
        passes: forward passes, and the tokens they carried.
        cpu_tokens: passes of up to so many tokens had what does not stay in HBM multiplied by the CPU, in DRAM.
        cpu_passes: how many passes did.
        first_pass_s: seconds of the newest prefill, which is the time to the first token.
        prefills, prefill_s: how many there were, and their seconds.
        decode_tokens, decode_s: tokens of single-token steps, and the time from each step's start to the next's.
        token_passes_s: seconds of the newest exact passes of one token of one sequence, which no tree was verified in.
        token_past: tokens in the KV cache before the newest of them.
        actual_pass_s, predicted_pass_s: their median, and what the cost model says of them; None where they were few,
            or where this machine was not probed.
        draft_passes, draft_tokens: resident passes, which are no part of the numbers above, and the tokens they
            carried; their time is part of the step that they come after.
        resident_bytes: what they read of the planes that stay; no tier counts it, for nothing moved.
        embedding_bytes: token embedding rows read from the SSD.
        ssd_bytes: bytes that the SSD delivered, whole blocks and checks included.
        peak_rss_bytes, peak_device_bytes: the process's peak as the kernel counts it, and the GPU allocator's.
        neurons: in mixed mode, the statistics of the neurons.
        plan: the hash of the run's plan.
        link: "measured", or the rate of a throttle that stands in for another link.
        drafting: with a drafter, the statistics of drafting.
    """

    precision: str
    device: str
    direct_io: bool
    tiers: dict[str, TierStats]
    lossy: bool = False
    compute_dtype: str = ""
    kernels: str = "torch"
    fused_layers: int = 0
    unfused_layers: int = 0
    cpu_tokens: int = 0
    cpu_passes: int = 0
    passes: int = 0
    tokens: int = 0
    prefill_tokens: int = 0
    first_pass_s: float = 0.0
    prefills: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    token_passes_s: list[float] = field(default_factory=list)
    token_past: int = 0
    actual_pass_s: float | None = None
    predicted_pass_s: float | None = None
    draft_passes: int = 0
    draft_tokens: int = 0
    resident_bytes: int = 0
    embedding_bytes: int = 0
    ssd_bytes: int = 0
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0
    neurons: NeuronStats | None = None
    plan: str = ""
    link: str = "measured"
    drafting: DraftStats | None = None

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed, with a drafter over its rounds; 0 before there were two steps to tell it by."""
        drafted = self.drafting.tokens_per_s if self.drafting is not None and self.drafting.rounds else None
        if drafted is not None:
            return drafted
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0

    def count_layer(self, fused: bool) -> None:
        """A call of a decoder layer."""
        if fused:
            self.fused_layers += 1
        else:
            self.unfused_layers += 1

    def add_prefill(self, seconds: float) -> None:
        """A pass that begins a text."""
        self.first_pass_s = seconds
        self.prefills += 1
        self.prefill_s += seconds

    def add_token_pass(self, seconds: float, past: int) -> None:
        """An exact pass of one token."""
        self.token_past = past
        self.token_passes_s.append(seconds)
        if len(self.token_passes_s) > 2 * _NEWEST:
            del self.token_passes_s[:_NEWEST]

    def tables(self) -> tuple[Table, ...]:
        """The passes, the tiers, and what neurons and drafting did."""
        predicted = self.predicted_pass_s and f"{1e3 * self.predicted_pass_s:.1f} ms predicted"
        rows = {
            "run": f"{self.precision} on {self.device}, kernels {self.kernels}{', lossy' if self.lossy else ''}",
            "computed in": self.compute_dtype,
            "passes, tokens": f"{self.passes}, {self.tokens}",
            "first token after": f"{self.first_pass_s:.3f} s",
            "decoding": f"{self.tokens_per_s:.2f} tokens/s" if self.tokens_per_s else "",
            "a pass of one token": f"{1e3 * self.actual_pass_s:.1f} ms" if self.actual_pass_s else "",
            "as predicted": predicted or "",
            "read from the SSD": human(self.ssd_bytes),
            "peak of the process": human(self.peak_rss_bytes),
            "peak of the GPU": human(self.peak_device_bytes) if self.peak_device_bytes else "",
            "link": "" if self.link == "measured" else self.link,
        }
        whole = Table("What the run did", ("what", "value"), tuple((name, cell) for name, cell in rows.items() if cell))
        parts = [part for part in (self.neurons, self.drafting) if part is not None]
        return (whole, _tiers_table("Tiers", self.tiers), *(table for part in parts for table in part.tables()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the schema's version."""
        plain = asdict(self)
        del plain["token_passes_s"], plain["token_past"]
        for name, tier in self.tiers.items():
            plain["tiers"][name] |= {"needed_bytes": tier.needed_bytes, "stall_s": dict(tier.stall_s)}
        if self.neurons is not None:
            plain["neurons"] = self.neurons.to_dict()
        if self.drafting is not None:
            plain["drafting"] = self.drafting.to_dict()
        return {"schema": SCHEMA, **plain, "tokens_per_s": self.tokens_per_s}

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())


def _tiers_table(title: str, tiers: Mapping[str, TierStats]) -> Table:
    """A column for each tier."""

    def column(tier: TierStats) -> dict[str, str]:
        return {
            "budget": human(tier.capacity_bytes),
            "peak": human(tier.peak_bytes),
            "asked for": human(tier.needed_bytes),
            "found here": human(tier.hit_bytes),
            "brought here": human(tier.loaded_bytes),
            **{f"waited for {cause}": f"{seconds:.3f} s" for cause, seconds in tier.stall_s.items()},
        }

    columns = [column(tier) for tier in tiers.values()]
    names = dict.fromkeys(name for each in columns for name in each)
    rows = tuple((name, *(each.get(name, "") for each in columns)) for name in names)
    return Table(title, ("bytes and waits", *tiers), rows)


def peak_rss_bytes() -> int:
    """The most memory that this process has held, as the kernel measured it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:  # not Linux
        import resource  # absent on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
