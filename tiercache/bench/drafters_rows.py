"""From texts that were written under a clock to rows of a table, and whether they are the texts that they should be.

Knows samples; opens and times nothing.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tiercache.bench.timed_generation import NONE, PLAIN, Cell, Entry, ModelSetting, Sample
from tiercache.errors import TiercacheError

NEAR_TIE = 2.0**-7  # of the logits' size: one step of bf16, within which another order of sums may change the likeliest


@dataclass(frozen=True)
class Turn:
    """One repeat: what a drafter wrote, and what plain decoding did before, between and after."""

    plain: list[Sample] = field(default_factory=list)
    drafted: list[Sample] = field(default_factory=list)

    @property
    def speed_up(self) -> float:
        """Of drafting over plain decoding; 0 where nothing was timed."""
        plain = rate(self.plain)
        return rate(self.drafted) / plain if plain else 0.0


@dataclass
class DrafterRow:
    """One way to draft, at one temperature.

    Attributes:
        setting, entry, temperature: what is measured.
        turns: the repeats.
        drafting: the statistics of the newest repeat.
        checked: texts that were compared with another one.
        differ: of them, those that differ from it somewhere.
        near_ties: of those, greedy ones that part where the two likeliest tokens are within `NEAR_TIE`.
        no_ties: likewise, where they are further apart.
    """

    setting: ModelSetting
    entry: Entry
    temperature: float
    turns: list[Turn] = field(default_factory=list)
    drafting: dict[str, Any] | None = None
    checked: int = 0
    differ: int = 0
    near_ties: int = 0
    no_ties: int = 0

    @property
    def speed_up(self) -> float:
        """Median over the repeats."""
        return statistics.median(turn.speed_up for turn in self.turns)

    @property
    def nodes(self) -> int | str:
        """What was asked for; "auto" for the budgeter's choice."""
        if self.entry.drafter == NONE:
            return 0
        return "auto" if self.entry.nodes is None else self.entry.nodes

    def summary(self) -> dict[str, Any]:
        """Of the schema's `rows`."""
        drafted = [sample for turn in self.turns for sample in turn.drafted]
        passes = sum(sample.passes for sample in drafted)
        return {
            "drafter": self.entry.drafter,
            "grower": self.entry.grower,
            "temperature": self.temperature,
            "nodes": self.nodes,
            "tokens_per_pass": sum(sample.tokens for sample in drafted) / passes if passes else 0.0,
            "tokens_per_s": statistics.median(rate(turn.drafted) for turn in self.turns),
            "plain_tokens_per_s": statistics.median(rate(turn.plain) for turn in self.turns),
            "setting": self.setting.text(),
        }

    def details(self) -> dict[str, Any]:
        """Of the schema's `details`: what stands beside the summary of the same place."""
        drafted = [sample for turn in self.turns for sample in turn.drafted]
        plain = [sample for turn in self.turns for sample in turn.plain]
        return {
            "drafter": self.entry.drafter,
            "speed_up": self.speed_up,
            "turns": [
                {"tokens_per_s": rate(turn.drafted), "plain_tokens_per_s": rate(turn.plain), "speed_up": turn.speed_up}
                for turn in self.turns
            ],
            "tokens": sum(sample.tokens for sample in drafted),
            "seconds": sum(sample.seconds for sample in drafted),
            "plain_tokens": sum(sample.tokens for sample in plain),
            "plain_seconds": sum(sample.seconds for sample in plain),
            "nodes_per_pass": sum(sample.nodes for sample in drafted) / max(1, sum(s.passes for s in drafted)),
            "first_token_s": statistics.median(sample.first_s for sample in drafted),
            "plain_first_token_s": statistics.median(sample.first_s for sample in plain),
            "texts_checked": self.checked,
            "texts_that_differ": self.differ,
            "near_ties": self.near_ties,
            "no_ties": self.no_ties,
            "drafting": self.drafting,
        }


@dataclass
class Judge:
    """Compares every text with the first one that was written of the same cell.

    Greedy texts are the same whoever decodes; sampled ones whoever drafts, but not in transformers' own loop, which
    draws otherwise, and not with trees that are drawn.

    Attributes:
        exact: the model computes in fp32, where a text that differs is an error.
        gap: of the two likeliest tokens after a prompt and some text; None where nobody can be asked.
    """

    exact: bool = False
    gap: Callable[[Cell, tuple[int, ...]], float] | None = None
    _known: dict[Cell, tuple[tuple[int, ...], int]] = field(default_factory=dict)  # a text, and the tokens asked for

    def judge(self, row: DrafterRow, entry: Entry, cell: Cell, sample: Sample, tokens: int) -> None:
        """Count a text of a row that `entry` wrote when asked for `tokens` tokens.

        Raises:
            TiercacheError: the text differs, and the model is exact.
        """
        if cell.temperature > 0 and (entry.drafter == PLAIN or entry.draws):
            return
        known, asked = self._known.setdefault(cell, (sample.text, tokens))
        if tokens > asked:  # of a longer one more can be said
            self._known[cell] = sample.text, tokens
        if known is sample.text:
            return
        row.checked += 1
        ours, theirs = (text[: min(tokens, asked)] for text in (sample.text, known))
        if ours == theirs:
            return
        pairs = enumerate(zip(ours, theirs, strict=False))
        place = next((at for at, (own, other) in pairs if own != other), min(len(ours), len(theirs)))
        if self.exact:
            raise TiercacheError(
                f"{entry.drafter} at temperature {cell.temperature:g}, seed {cell.seed}, wrote another text than "
                f"decoding without it, from token {place} on, in fp32: that is a bug; please report it"
            )
        row.differ += 1
        if cell.temperature == 0 and self.gap is not None:
            near = self.gap(cell, theirs[:place]) <= NEAR_TIE
            row.near_ties += near
            row.no_ties += not near


def rate(samples: Sequence[Sample]) -> float:
    """All tokens over all seconds; 0 where there were none."""
    tokens, seconds = sum(sample.tokens for sample in samples), sum(sample.seconds for sample in samples)
    return tokens / seconds if tokens else 0.0
