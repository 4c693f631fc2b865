"""All rows of one model: every way to draft, turn about with plain decoding.

Plain decoding is transformers' own loop without a drafter, and runs before, between and after what it is compared
with, since a machine's speed changes within minutes. Every text is written after a prompt of its own, by a drafter
that was made for the row: what remembers must not meet a text twice.

Knows models, rows and where models come from; nothing of weights.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tiercache.bench.drafters_capped import Visit
from tiercache.bench.drafters_options import Options
from tiercache.bench.drafters_rows import Judge, Measured, Turn, Verdict, rate
from tiercache.bench.drafting_prompts import Prompts
from tiercache.bench.larger_model import widen
from tiercache.bench.timed_generation import NONE, PLAIN, Cell, Entry, Sample, Setting, TimedModel, open_timed
from tiercache.engine.source import default_store
from tiercache.errors import DoesNotFitError
from tiercache.progress import note
from tiercache.store.checkpoint import Checkpoint, resolve
from tiercache.store.convert import convert
from tiercache.store.format import CATALOG_FILE

# Measures one way of decoding in a process under a cap.
Visitor = Callable[[Setting, Entry, Sequence[Cell], Cell, int], Visit]


@dataclass
class Contest:
    """See the module.

    Attributes:
        options: what to measure.
        model: a checkpoint or plane store.
        visit: measures one way of decoding under a cap.
        measured: the rows.
        left_out: ways that do not fit the budgets, and why.
        duels: how `auto` does against the best of the others, by temperature.
        peak_bytes: the most that a process under the cap took.

    Raises:
        UsageError, StoreError: the model or the prompts cannot be had.
    """

    options: Options
    model: Path
    visit: Visitor
    measured: list[Measured] = field(default_factory=list)
    left_out: list[dict[str, Any]] = field(default_factory=list)
    duels: list[dict[str, Any]] = field(default_factory=list)
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        options = self.options
        model = resolve(self.model).absolute()
        self.name = "/".join(model.parts[-2:])
        store = _planes(model, options)
        count = len(options.seeds) * options.prompts + 1
        self.prompts = Prompts.read(store, options.text, count, options.prompt_tokens)
        needed = len(self.prompts.ids[0]) + options.tokens
        places: dict[str, Any] = {"hbm": options.hbm, "dram": options.dram, "context": options.context or needed}
        places |= {"precision": options.precision, "link_gbps": options.link_gbps, "cap_bytes": options.cap_bytes}
        wide = "" if options.widen is None else f" widened to {_shape(options)}"
        self.setting = Setting(name=self.name + wide, store=str(store), **places)
        self.judge = Judge()

    def run(self) -> None:
        """Measure all rows."""
        self._say(f"{self.setting.text()}: {len(self.options.entries())} ways, {self.options.temperatures}")
        for temperature in self.options.temperatures:
            before = len(self.measured)
            (self._run if self.options.cap_bytes is None else self._run_capped)(temperature)
            self._duel(self.measured[before:])

    def describe(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": str(self.model),
            "store": self.setting.store,
            "setting": self.setting.text(),
            "prompts": self.prompts.source,
            "widened": _shape(self.options),
            "exact": self.judge.exact,
            "group_peak_bytes": self.peak_bytes or None,
        }

    def _groups(self, temperature: float) -> list[list[Cell]]:
        """The cells by seed."""
        each, found = self.options.prompts, []
        for place, seed in enumerate(self.options.seeds):
            ids = self.prompts.ids[place * each : (place + 1) * each]
            found.append([Cell(prompt=prompt, temperature=temperature, seed=seed) for prompt in ids])
        return found

    def _warm(self, temperature: float) -> Cell:
        return Cell(prompt=self.prompts.ids[-1], temperature=temperature, seed=0)

    def _run(self, temperature: float) -> None:
        """Rows in this process, plain decoding turn about with each seed's texts."""
        entries = [Entry(drafter=NONE), *self.options.entries()]
        with open_timed(self.setting, Entry(drafter=PLAIN)) as plain:
            self.judge.exact, self.judge.gap = plain.dtype == torch.float32, plain.gap
            for entry in entries:
                turns, verdict, drafting = [], Verdict(), None
                try:
                    for _ in range(self.options.repeats):
                        with open_timed(self.setting, entry) as own:
                            turns.append(self._turn(plain, own, entry, temperature, verdict))
                            drafting = own.account()["drafting"]
                except DoesNotFitError as error:  # what it reserves for its trees; the others may go on
                    self._leave_out(entry, temperature, error)
                    continue
                self._keep(entry, temperature, turns, verdict, drafting)

    def _turn(self, plain: TimedModel, own: TimedModel, entry: Entry, temperature: float, verdict: Verdict) -> Turn:
        options, groups = self.options, self._groups(temperature)
        for each in (plain, own):
            each.warm(self._warm(temperature), options.tokens)
        asked = options.plain_tokens or options.tokens
        turn: tuple[list[Sample], list[Sample]] = ([], [])
        for group in (*groups, groups[-1][-1:]):
            turn[0].append(sample := plain.run(group[0], asked))
            self.judge.judge(verdict, Entry(drafter=PLAIN), group[0], sample, asked)
            for cell in group if len(turn[0]) <= len(groups) else ():
                turn[1].append(sample := own.run(cell, options.tokens))
                self.judge.judge(verdict, entry, cell, sample, options.tokens)
        return Turn(*turn)

    def _run_capped(self, temperature: float) -> None:
        """Rows in processes of their own, one of plain decoding before, between and after them."""
        groups = self._groups(temperature)
        firsts, cells = [group[0] for group in groups], [cell for group in groups for cell in group]
        turns: dict[Entry, list[Turn]] = {entry: [] for entry in self.options.entries()}
        verdicts = {entry: Verdict() for entry in turns}
        accounts: dict[Entry, dict[str, Any] | None] = {}
        before: Visit | None = None
        for _ in range(self.options.repeats):
            for entry, verdict in verdicts.items():
                before = before or self._visit(Entry(drafter=PLAIN), firsts, verdict)
                own = self._visit(entry, cells, verdict)
                after = self._visit(Entry(drafter=PLAIN), firsts, verdict)
                turns[entry].append(Turn((*before.samples, *after.samples), own.samples))
                accounts[entry], before = own.drafting, after
        for entry, verdict in verdicts.items():
            self._keep(entry, temperature, turns[entry], verdict, accounts[entry])

    def _visit(self, entry: Entry, cells: Sequence[Cell], verdict: Verdict) -> Visit:
        options = self.options
        tokens = (options.plain_tokens if entry.drafter == PLAIN else None) or options.tokens
        found = self.visit(self.setting, entry, cells, self._warm(cells[0].temperature), tokens)
        self.judge.exact = found.exact
        self.peak_bytes = max(self.peak_bytes, found.peak_bytes)
        for cell, sample in zip(cells, found.samples, strict=True):
            self.judge.judge(verdict, entry, cell, sample, tokens)
        self._say(f"  {entry.drafter}, a process under the cap: {rate(found.samples):.3f} tokens/s")
        return found

    def _leave_out(self, entry: Entry, temperature: float, error: DoesNotFitError) -> None:
        what = {"setting": self.setting.text(), "drafter": entry.drafter, "grower": entry.grower, "nodes": entry.nodes}
        self.left_out.append({**what, "temperature": temperature, "reason": str(error)})
        self._say(f"  {entry.drafter} with {entry.nodes or 'auto'} nodes is left out: {error}")

    def _keep(
        self, entry: Entry, temperature: float, turns: list[Turn], verdict: Verdict, drafting: dict[str, Any] | None
    ) -> None:
        kept: dict[str, Any] = {"temperature": temperature, "turns": turns, "verdict": verdict, "drafting": drafting}
        self.measured.append(found := Measured(setting=self.setting, entry=entry, **kept))
        row = found.row()
        self._say(
            f"  {row['drafter']} ({row['grower']}), {row['nodes']} nodes at {temperature:g}: "
            f"{row['tokens_per_pass']:.2f} tokens a pass, {row['tokens_per_s']:.2f} tokens/s, "
            f"plain {row['plain_tokens_per_s']:.2f}"
        )

    def _duel(self, measured: Sequence[Measured]) -> None:
        """`auto` against the best of the others: turn about where both can be open at once."""
        autos = [each for each in measured if each.entry.drafter == "auto"]
        others = [each for each in measured if each.entry.drafter not in ("auto", NONE)]
        if not autos or not others:
            return
        best = max(others, key=lambda each: each.speed_up)
        for auto in autos:
            apart = self.options.cap_bytes is not None
            ratio = auto.speed_up / best.speed_up if apart and best.speed_up else self._together(auto, best)
            self.duels.append(
                {
                    "setting": self.setting.text(),
                    "temperature": auto.temperature,
                    "grower": auto.entry.grower,
                    "drafters": auto.drafting["drafters"] if auto.drafting else [],
                    "best": {"drafter": best.entry.drafter, "grower": best.entry.grower, "nodes": best.nodes},
                    "ratio": ratio,
                    "measured": "each against plain decoding" if apart else "turn about",
                    "speed_up": auto.speed_up,
                    "best_speed_up": best.speed_up,
                }
            )

    def _together(self, auto: Measured, best: Measured) -> float:
        """Tokens per second of `auto` over those of the best, both open, turn about; median over the repeats."""
        ratios = []
        cells = [cell for group in self._groups(auto.temperature) for cell in group]
        for _ in range(self.options.repeats):
            with ExitStack() as stack:
                models = [stack.enter_context(open_timed(self.setting, each.entry)) for each in (auto, best)]
                for each in models:
                    each.warm(self._warm(auto.temperature), self.options.tokens)
                samples: tuple[list[Sample], list[Sample]] = ([], [])
                for turn, cell in enumerate(cells):
                    for place in (0, 1) if turn % 2 else (1, 0):
                        samples[place].append(models[place].run(cell, self.options.tokens))
            ratios.append(rate(samples[0]) / rate(samples[1]) if rate(samples[1]) else 0.0)
        return statistics.median(ratios)

    def _say(self, text: str) -> None:
        note(text, show=self.options.show_progress)


def _shape(options: Options) -> str | None:
    size = options.widen
    return None if size is None else f"{size.hidden}x{size.neurons}x{size.layers}"


def _planes(model: Path, options: Options) -> Path:
    """The plane store of what was named; made now if it is not there."""
    show = options.show_progress
    if options.widen is not None:
        wide = options.folder.absolute() / f"{model.parent.name}-{model.name}-{_shape(options)}"
        store = wide.with_name(f"{wide.name}-planes")
        if not (store / CATALOG_FILE).is_file():
            convert(widen(model, wide, options.widen, show_progress=show), store, show_progress=show)
        return store
    if (model / CATALOG_FILE).is_file():
        return model
    store = default_store(Checkpoint.open(model))
    if not (store / CATALOG_FILE).is_file():
        convert(model, store, show_progress=show)
    return store
