"""How fast the rounds of a drafter are whose trees end by themselves, beside what was promised of them."""

from __future__ import annotations

from dataclasses import dataclass

from policies.drafting import RoundPlan

_KEEP = 0.98  # weight of a round after another one
_PULL, _FADE = 4.0, 8.0  # rounds that a promise counts for at first, and rounds that halve this


@dataclass(frozen=True)
class RoundOutcome:
    """What came of a drafted round.

    Attributes:
        emitted: tokens.
        seconds: that it took, a disturbance cut off.
        nodes: verified.
        passes, draft_s: of a model, and seconds, that drafting took.
        charged_s: the seconds that drafting took, a disturbance cut off.
    """

    emitted: int
    seconds: float
    nodes: int
    passes: int
    draft_s: float
    charged_s: float


class ThroughputEstimator:
    """Means over the newest rounds, leaning on a promise while they are few.

    Attributes:
        drafted: rounds that took passes of a model.
    """

    def __init__(self) -> None:
        self._rounds, self._drafting = [0.0] * 4, [0.0] * 3  # how many, and sums
        self._pull = _PULL
        self.drafted = 0

    def observe(self, outcome: RoundOutcome, *, whole: bool = False) -> None:
        """What came of a round.

        `whole`: passes were to draft wherever they pay, and not only where cheaper guesses did not promise enough. Only
        such rounds tell what passes bring, for where cheap guesses promise little a model is unsure too.
        """
        self._rounds = _faded(self._rounds, (1, outcome.emitted, outcome.seconds, outcome.nodes))
        self._pull *= 0.5 ** (1 / _FADE)
        self.drafted += outcome.passes > 0
        if whole:
            self._drafting = _faded(self._drafting, (1, outcome.emitted - 1, outcome.charged_s))

    @property
    def nodes(self) -> float:
        """Of a tree; 0 before any."""
        return self._rounds[3] / max(self._rounds[0], 1.0)

    def round(self, tokens: float, seconds: float) -> tuple[float, float]:
        """Tokens and seconds of a round; given those that were promised."""
        count, emitted, taken, _ = self._rounds
        weight = count + self._pull
        return (emitted + self._pull * tokens) / weight, (taken + self._pull * seconds) / weight

    def tokens_per_s(self, plan: RoundPlan) -> float:
        """Of a round; given its plan with what was promised."""
        tokens, seconds = self.round(1 + plan.gain, plan.seconds)
        return tokens / seconds

    def enough(self, tokens_per_s: float, gain: float, draft_s: float) -> float:
        """Tokens beyond the target's own that drafting by passes brings, less those that its seconds cost elsewhere.

        Args:
            tokens_per_s: that a second brings elsewhere.
            gain, draft_s: of a round that takes passes, as promised.
        """
        count, brought, spent = self._drafting
        pull = max(self._pull, 1e-9)
        brought, spent = (brought + pull * gain) / (count + pull), (spent + pull * draft_s) / (count + pull)
        return max(0.0, brought - tokens_per_s * spent)


def _faded(sums: list[float], more: tuple[float, ...]) -> list[float]:
    """What was added up, and what came now."""
    return [_KEEP * before + now for before, now in zip(sums, more, strict=True)]
