"""What drafting counts: rounds, tokens, nodes and seconds."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from policies.tables import Shown, Table

_NEWEST = 64  # plain passes whose seconds are kept


@dataclass
class DraftStats(Shown):
    """The statistics of drafting.

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

    def add(self, drafter: int | None, depths: Sequence[int], accepted: Sequence[int], emitted: int) -> None:
        """A round: whose tree, the depth of each of its nodes and of the accepted ones, and the tokens it emitted."""
        self.rounds += 1
        self.tokens += emitted
        self.nodes += len(depths)
        self.accepted += len(accepted)
        if drafter is not None:
            self.arm_rounds[drafter] += 1
            self.arm_tokens[drafter] += emitted
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

    def tables(self) -> tuple[Table, ...]:
        """What drafting brought."""
        rates = {"tokens a pass": self.tokens_per_pass, "tokens/s": self.tokens_per_s, "x plain passes": self.speed_up}
        rows = [
            ("who", " or ".join(self.drafters) or "nobody"),
            ("passes of the target", f"{self.rounds}, {self.plain_rounds} of them without a tree"),
            *((name, f"{value:.2f}") for name, value in rates.items() if value is not None),
            ("nodes accepted", f"{self.accepted} of {self.nodes}"),
            ("accepted by depth", " ".join(f"{rate:.2f}" for rate in self.acceptance_by_depth)),
            ("drafting, verifying", f"{self.draft_s:.3f} s, {self.verify_s:.3f} s"),
        ]
        return (Table("Drafting", ("what", "value"), tuple(rows)),)

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
