"""Times every drafter against plain decoding of the same model, turn about.

Plain decoding is transformers' own loop without a drafter. It runs before, between and after what it is compared with,
since a machine's speed changes within minutes. Every text follows a prompt of its own, and every row's drafter is new:
one that met a text before would guess it too well. Speeds are of the tokens after the first.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from profiler.processor import processor_name
from tiercache import __version__
from tiercache.bench.drafters_options import Options
from tiercache.bench.drafters_rows import DrafterRow, Judge, Turn
from tiercache.bench.drafting_prompts import Prompts
from tiercache.bench.timed_generation import NONE, PLAIN, Cell, Entry, ModelSetting, Sample, TimedModel, open_timed
from tiercache.engine.source import default_store
from tiercache.errors import DoesNotFitError
from tiercache.progress import note
from tiercache.store.checkpoint import Checkpoint, resolve
from tiercache.store.convert import convert
from tiercache.store.format import CATALOG_FILE

SCHEMA = "tiercache.drafters/1"


def bench(options: Options, comparisons: Sequence["Comparison"] | None = None) -> dict[str, Any]:
    """Measure every model.

    Args:
        options: what to measure.
        comparisons: how; by default a `Comparison` of each of the models.

    Raises:
        TiercacheError: a drafted text is not what it should be.
        UsageError, StoreError, DoesNotFitError: as `offload` has them.
    """
    if comparisons is None:
        comparisons = [Comparison(options, model) for model in options.models]
    for comparison in comparisons:
        comparison.run()
    rows = [row for comparison in comparisons for row in comparison.rows]
    return {
        "schema": SCHEMA,
        "rows": [row.summary() for row in rows],
        "details": [row.details() for row in rows],
        "auto": [],  # filled by benchmarks.drafters
        "left_out": [each for comparison in comparisons for each in comparison.left_out],
        "models": [comparison.describe() for comparison in comparisons],
        "tiercache": __version__,
        "torch": torch.__version__,
        "hardware": {
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        },
        "seeds": list(options.seeds),
        "prompts": options.prompts,
        "prompt_tokens": options.prompt_tokens,
        "tokens": options.tokens,
        "plain_tokens": options.plain_tokens or options.tokens,
        "repeats": options.repeats,
    }


class Comparison:
    """All rows of one model.

    Args:
        options: what to measure.
        model: a checkpoint or plane store. A checkpoint is converted now if its planes are not there.

    Attributes:
        setting: where the model runs.
        judge: compares all texts with one another.
        rows: what was measured.
        left_out: drafters that do not fit the budgets, and why.

    Raises:
        UsageError, StoreError: the model or the prompts cannot be had.
    """

    def __init__(self, options: Options, model: Path) -> None:
        self.options, self.model, self.judge = options, model, Judge()
        self.rows: list[DrafterRow] = []
        self.left_out: list[dict[str, Any]] = []
        folder = resolve(model).absolute()
        store = _planes(folder, options.show_progress)
        count = len(options.seeds) * options.prompts + 1  # one to warm up
        self._prompts = Prompts.read(store, options.text, count, options.prompt_tokens)
        self.setting = ModelSetting(
            name="/".join(folder.parts[-2:]),
            store=str(store),
            precision=options.precision,
            hbm=options.hbm,
            dram=options.dram,
            link_gbps=options.link_gbps,
            context=options.context or len(self._prompts.ids[0]) + options.tokens,
        )

    def run(self) -> None:
        """Measure all rows."""
        self.say(f"{self.setting.text()}: {len(self.options.entries())} ways, {self.options.temperatures}")
        for temperature in self.options.temperatures:
            self.measure(temperature)

    def describe(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "model": str(self.model),
            "store": self.setting.store,
            "setting": self.setting.text(),
            "prompts": self._prompts.source,
            "widened": None,  # filled by benchmarks.drafters, as is the next
            "exact": self.judge.exact,
            "group_peak_bytes": None,
        }

    def measure(self, temperature: float) -> None:
        """Rows of one temperature, plain decoding turn about with each seed's texts."""
        with open_timed(self.setting, Entry(drafter=PLAIN)) as plain:
            self.judge.exact, self.judge.gap = plain.exact, plain.gap
            for entry in (Entry(drafter=NONE), *self.options.entries()):
                row = DrafterRow(self.setting, entry, temperature)
                try:
                    for _ in range(self.options.repeats):
                        with open_timed(self.setting, entry) as own:
                            row.turns.append(self._turn(plain, own, row))
                            row.drafting = own.drafting
                except DoesNotFitError as error:  # what it reserves for its trees; the others may go on
                    self._leave_out(row, error)
                else:
                    self.keep(row)

    def keep(self, row: DrafterRow) -> None:
        """Add a row, and tell of it."""
        self.rows.append(row)
        told = row.summary()
        self.say(
            f"  {told['drafter']} ({told['grower']}), {told['nodes']} nodes at {told['temperature']:g}: "
            f"{told['tokens_per_pass']:.2f} tokens a pass, {told['tokens_per_s']:.2f} tokens/s, "
            f"plain {told['plain_tokens_per_s']:.2f}"
        )

    def groups(self, temperature: float) -> list[list[Cell]]:
        """The texts to write, by seed."""
        each, found = self.options.prompts, []
        for place, seed in enumerate(self.options.seeds):
            ids = self._prompts.ids[place * each : (place + 1) * each]
            found.append([Cell(prompt=prompt, temperature=temperature, seed=seed) for prompt in ids])
        return found

    def warm_cell(self, temperature: float) -> Cell:
        """A text that nobody times."""
        return Cell(prompt=self._prompts.ids[-1], temperature=temperature, seed=0)

    def tokens_of(self, entry: Entry) -> int:
        """How many tokens each of its texts has at most."""
        return (self.options.plain_tokens if entry.drafter == PLAIN else None) or self.options.tokens

    def say(self, text: str) -> None:
        """A line for people."""
        note(text, show=self.options.show_progress)

    def _turn(self, plain: TimedModel, own: TimedModel, row: DrafterRow) -> Turn:
        groups = self.groups(row.temperature)
        for each in (plain, own):
            each.warm(self.warm_cell(row.temperature), self.options.tokens)
        turn = Turn()
        for group in groups:
            turn.plain.append(self._write(plain, group[0], row))
            turn.drafted.extend(self._write(own, cell, row) for cell in group)
        turn.plain.append(self._write(plain, groups[-1][-1], row))
        return turn

    def _write(self, model: TimedModel, cell: Cell, row: DrafterRow) -> Sample:
        tokens = self.tokens_of(model.entry)
        sample = model.run(cell, tokens)
        self.judge.judge(row, model.entry, cell, sample, tokens)
        return sample

    def _leave_out(self, row: DrafterRow, error: DoesNotFitError) -> None:
        entry = row.entry
        what = {"setting": self.setting.text(), "drafter": entry.drafter, "grower": entry.grower, "nodes": entry.nodes}
        self.left_out.append({**what, "temperature": row.temperature, "reason": str(error)})
        self.say(f"  {entry.drafter} with {entry.nodes or 'auto'} nodes is left out: {error}")


def _planes(model: Path, show_progress: bool | None) -> Path:
    """The plane store of what was named; made now if it is not there."""
    if (model / CATALOG_FILE).is_file():
        return model
    store = default_store(Checkpoint.open(model))
    if not (store / CATALOG_FILE).is_file():
        convert(model, store, show_progress=show_progress)
    return store
