"""What mixed mode counts: neurons and their bytes, asked for, found and copied."""

from dataclasses import asdict, dataclass
from typing import Any

from policies.rates import rate
from policies.tables import Shown, Table, human


@dataclass
class NeuronStats(Shown):
    """The statistics of neurons that are given planes one by one.

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
        return rate(self.hits, self.requests)

    @property
    def chance(self) -> float | None:
        """The hit rate of slots filled by chance."""
        return rate(self.chance_hits, self.requests)

    @property
    def lift(self) -> float | None:
        """The hit rate over chance."""
        return rate(self.hits, self.chance_hits)

    @property
    def belady(self) -> float | None:
        """The hit rate that nobody can beat, on the recorded trace."""
        return rate(self.belady_hits, self.belady_requests)

    def tables(self) -> tuple[Table, ...]:
        """What tokens read of the neurons, and how slots served them."""
        rates = {"hit rate": self.hit_rate, "by chance": self.chance, "Belady's bound": self.belady}
        rows = [
            ("tokens that chose", str(self.tokens)),
            ("read a token", human(self.read_bytes / max(1, self.tokens))),
            ("brought up a token", human(self.moved_bytes / max(1, self.tokens))),
            ("policy of the slots", self.policy),
            *((name, f"{value:.3f}") for name, value in rates.items() if value is not None),
        ]
        if self.calibrated_kl is not None:
            rows.append(("loss that calibration measured", f"{self.calibrated_kl:.4f} nats a token"))
        return (Table("Neurons", ("what", "value"), tuple(rows)),)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the rates."""
        return {**asdict(self), **{name: getattr(self, name) for name in ("hit_rate", "chance", "lift", "belady")}}
