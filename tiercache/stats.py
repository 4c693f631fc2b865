"""What happened, in numbers that add up: counters of each tier, of the passes and of the process.

Knows nothing of who counts; the counting is done where the bytes move.
"""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "tiercache.stats/1"
_NEWEST = 64  # plain passes whose seconds are kept


@dataclass
class TierStats:
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


@dataclass
class NeuronStats:
    """The account of neurons that are given planes one by one.

    Attributes:
        policy: who stays in the slots; "none" without an upper tier.
        tokens: tokens for which neurons were chosen one by one, "resident" passes left out.
        read_bytes: bytes of neurons that the recipe reads for them, ranking included; what had to do with a
            lower precision (`at_hand`) reads less.
        wanted_bytes, hit_bytes: asked of the slots, and found there.
        moved_bytes: copied up for tokens that chose.
        dense_bytes: copied up for passes that did not: prompts, and exact ones.
        requests, hits, uploads: neurons, by plane: asked of the slots, found there, copied up.
        at_hand: of them, those that had to do with a lower precision.
        below: of them, those whose missing planes the CPU multiplied in DRAM.
        policy_s: seconds that deciding about slots took.
        chance_hits: hits that slots filled by chance would have had.
        calibrated_kl: loss against int8 that calibration measured with the same recipe, in nats a token.
        belady_hits, belady_requests: of a recorded trace, with the same slots and perfect foresight.
    """

    policy: str = "none"
    tokens: int = 0
    read_bytes: int = 0
    wanted_bytes: int = 0
    hit_bytes: int = 0
    moved_bytes: int = 0
    dense_bytes: int = 0
    requests: int = 0
    hits: int = 0
    uploads: int = 0
    at_hand: int = 0
    below: int = 0
    policy_s: float = 0.0
    chance_hits: float = 0.0
    calibrated_kl: float | None = None
    belady_hits: int = 0
    belady_requests: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of the requests found in the slots; None without slots."""
        return self.hits / self.requests if self.requests else None

    @property
    def chance(self) -> float | None:
        """The hit rate of slots filled by chance."""
        return self.chance_hits / self.requests if self.requests else None

    @property
    def lift(self) -> float | None:
        """The hit rate over chance."""
        return self.hits / self.chance_hits if self.chance_hits else None

    @property
    def belady(self) -> float | None:
        """The hit rate that nobody can beat, on the recorded trace."""
        return self.belady_hits / self.belady_requests if self.belady_requests else None


@dataclass
class DraftStats:
    """The account of drafting.

    Attributes:
        drafters: who may draft, in the order of `arm_rounds`.
        rule: who decides what is emitted.
        grower: how trees grow.
        lossy: the name of what changes the output; empty where nothing does.
        rounds: passes of the target after the prompt's, and the tokens that they emitted.
        plain_rounds: of them, passes without a tree.
        plain_reasons: calls of `generate` that could not be drafted for, by the reason why.
        nodes: verified.
        accepted: nodes accepted.
        tried_by_depth, accepted_by_depth: how often a tree reached a depth below accepted nodes, and one was accepted.
        arm_rounds, arm_tokens: rounds of each drafter, and the tokens that they emitted.
        draft_s, verify_s: seconds of drafting and learning, and of the target's passes.
        plain_passes_s: seconds of the newest passes without a tree.
        room_price: with drafter="auto", what a pass was thought to take beside the room that drafting reserves, over
            one in plain decoding's own placement: so much must drafting win to pay for its room. None where the two
            were not compared.
    """

    drafters: tuple[str, ...] = ()
    rule: str = "walk"
    grower: str = ""
    lossy: str = ""
    rounds: int = 0
    tokens: int = 0
    plain_rounds: int = 0
    plain_reasons: dict[str, int] = field(default_factory=dict)
    nodes: int = 0
    accepted: int = 0
    tried_by_depth: list[int] = field(default_factory=list)
    accepted_by_depth: list[int] = field(default_factory=list)
    arm_rounds: list[int] = field(default_factory=list)
    arm_tokens: list[int] = field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0
    plain_passes_s: list[float] = field(default_factory=list)
    room_price: float | None = None

    def add(self, arm: int | None, depths: Sequence[int], accepted: Sequence[int], emitted: int) -> None:
        """A round: whose tree, the depth of each of its nodes and of the accepted ones, and the tokens it emitted."""
        self.rounds += 1
        self.tokens += emitted
        self.nodes += len(depths)
        self.accepted += len(accepted)
        if arm is not None:
            self.arm_rounds[arm] += 1
            self.arm_tokens[arm] += emitted
        if not depths:
            return
        deepest = max(depths)
        while len(self.tried_by_depth) < deepest:
            self.tried_by_depth.append(0)
            self.accepted_by_depth.append(0)
        for depth in range(1, min(len(accepted) + 1, deepest) + 1):
            self.tried_by_depth[depth - 1] += 1
        for depth in accepted:
            self.accepted_by_depth[depth - 1] += 1

    def spend(self, draft_s: float, verify_s: float, *, plain: bool) -> None:
        """Its seconds; `plain`: it had no tree."""
        self.draft_s += draft_s
        self.verify_s += verify_s
        if plain:
            self.plain_rounds += 1
            self.plain_passes_s.append(verify_s)
            if len(self.plain_passes_s) > 2 * _NEWEST:
                del self.plain_passes_s[:_NEWEST]

    @property
    def plain_calls(self) -> int:
        """Calls of `generate` that could not be drafted for."""
        return sum(self.plain_reasons.values())

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens emitted by a pass of the target, its own one included."""
        return self.tokens / self.rounds if self.rounds else None

    @property
    def acceptance_by_depth(self) -> list[float]:
        """How often some child of an accepted node is accepted, by the child's depth from 1."""
        pairs = zip(self.accepted_by_depth, self.tried_by_depth, strict=True)
        return [accepted / tried for accepted, tried in pairs if tried]

    @property
    def tokens_per_s(self) -> float | None:
        """Over drafting and verifying."""
        seconds = self.draft_s + self.verify_s
        return self.tokens / seconds if seconds else None

    @property
    def plain_tokens_per_s(self) -> float | None:
        """What passes without a tree gave; None before there was one."""
        return 1 / statistics.median(self.plain_passes_s) if self.plain_passes_s else None

    @property
    def speed_up(self) -> float | None:
        """Over plain decoding, in the placement that this would have had without a drafter's room."""
        plain, own = self.plain_tokens_per_s, self.tokens_per_s
        return own / (plain * (self.room_price or 1.0)) if own and plain else None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        rates = (
            "plain_calls",
            "tokens_per_pass",
            "acceptance_by_depth",
            "tokens_per_s",
            "plain_tokens_per_s",
            "speed_up",
        )
        kept = {name: value for name, value in asdict(self).items() if name != "plain_passes_s"}
        return kept | {name: getattr(self, name) for name in rates}


@dataclass
class Stats:
    """The account of one attached model.

    Attributes:
        tiers: counters by tier, fastest first.
        kernels: who multiplies: "torch" for original weights, "decode", or the backend of the plane kernels.
        passes: forward passes, and the tokens they carried.
        cpu_tokens: passes of up to so many tokens had what does not stay in HBM multiplied by the CPU, in DRAM.
        cpu_passes: how many passes did.
        first_pass_s: seconds of the newest prefill, which is the time to the first token.
        decode_tokens, decode_s: tokens of single-token steps, and the time from each step's start to the next's.
        draft_passes, draft_tokens: resident passes, which are no part of the numbers above, and the tokens they
            carried; their time is part of the step that they come after.
        resident_bytes: what they read of the planes that stay; no tier counts it, for nothing moved.
        embedding_bytes: token embedding rows read from the SSD.
        ssd_bytes: bytes that the SSD delivered, whole blocks and checks included.
        peak_rss_bytes, peak_device_bytes: the process's peak as the kernel counts it, and the GPU allocator's.
        neurons: in mixed mode, the account of the neurons.
        link: "measured", or the rate of a throttle that stands in for another link.
        drafting: with a drafter, the account of drafting.
    """

    precision: str
    device: str
    direct_io: bool
    tiers: dict[str, TierStats]
    lossy: bool = False
    kernels: str = "torch"
    cpu_tokens: int = 0
    cpu_passes: int = 0
    passes: int = 0
    tokens: int = 0
    prefill_tokens: int = 0
    first_pass_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    draft_passes: int = 0
    draft_tokens: int = 0
    resident_bytes: int = 0
    embedding_bytes: int = 0
    ssd_bytes: int = 0
    peak_rss_bytes: int = 0
    peak_device_bytes: int = 0
    neurons: NeuronStats | None = None
    link: str = "measured"
    drafting: DraftStats | None = None

    @property
    def tokens_per_s(self) -> float:
        """Decoding speed; 0 before two single-token steps were made."""
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the schema's version."""
        plain = asdict(self)
        for name, tier in self.tiers.items():
            plain["tiers"][name] |= {"needed_bytes": tier.needed_bytes, "stall_s": dict(tier.stall_s)}
        if self.neurons is not None:
            rates = {name: getattr(self.neurons, name) for name in ("hit_rate", "chance", "lift", "belady")}
            plain["neurons"] |= rates
        if self.drafting is not None:
            plain["drafting"] = self.drafting.to_dict()
        return {"schema": SCHEMA, **plain, "tokens_per_s": self.tokens_per_s}

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(self.to_dict())


def peak_rss_bytes() -> int:
    """The most memory that this process has held, as the kernel measured it."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:  # not Linux
        import resource  # absent on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
