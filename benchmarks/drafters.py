"""`tiercache bench drafters` in places that a user has no need of, and `auto` against the best of the other drafters.

    python -m benchmarks.drafters [--cap 1434MiB] [--widen HIDDENxNEURONSxLAYERS] [options of that command]

`--cap` measures every way of decoding in a process of its own under a hard cap of RAM, page cache included; plain
decoding runs before, between and after the drafters. `--widen` makes the model larger first.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import command_line, drafters_capped
from benchmarks.drafters_capped import CappedSetting, Visit
from benchmarks.larger_model import Size, widen
from tiercache.bench import drafters, drafters_report
from tiercache.bench.drafters import Comparison
from tiercache.bench.drafters_options import Options
from tiercache.bench.drafters_rows import DrafterRow, Turn, rate
from tiercache.bench.timed_generation import NONE, PLAIN, Cell, Entry, Sample, open_timed
from tiercache.commands.base import tell
from tiercache.commands.bench import drafters_arguments
from tiercache.config.sizes import Budget, human
from tiercache.errors import UsageError
from tiercache.store.checkpoint import resolve
from tiercache.store.convert import convert
from tiercache.store.format import CATALOG_FILE

# Measures one way of decoding under a cap: the setting, the way, the texts, one to warm up, and tokens to write.
Visitor = Callable[[CappedSetting, Entry, Sequence[Cell], Cell, int], Visit]
_UNDER_A_CAP = {"drafters": ("ngram", "resident", "auto"), "nodes": (None,)}  # where the user names none


@dataclass(frozen=True, kw_only=True)
class Place:
    """What `tiercache bench drafters` does not offer.

    Attributes:
        cap_bytes: of RAM for each process, page cache included; None for no cap and one process.
        widen: size to make each model to, without changing what it says; None to leave it.
        folder: where widened models are made.
        visit: measures under the cap.
    """

    cap_bytes: int | None = None
    widen: Size | None = None
    folder: Path = Path("tiercache-bench")
    visit: Visitor = drafters_capped.visit


class Contest(Comparison):
    """All rows of one model at a `Place`, and how `auto` does against the best of them.

    Attributes:
        duels: `auto` against the best of the others, by temperature.
    """

    def __init__(self, options: Options, model: Path, place: Place) -> None:
        named = resolve(model).absolute()
        super().__init__(options, model if place.widen is None else _widened(named, place, options.show_progress))
        self._named, self._place = model, place
        self.duels: list[dict[str, Any]] = []
        self._peak_bytes = 0
        name = "/".join(named.parts[-2:]) + ("" if place.widen is None else f" widened to {place.widen}")
        self._capped = CappedSetting(**{**asdict(self.setting), "name": name}, cap_bytes=place.cap_bytes)
        self.setting = self._capped

    def describe(self) -> dict[str, Any]:
        """See `Comparison`."""
        wide = None if self._place.widen is None else str(self._place.widen)
        more = {"model": str(self._named), "widened": wide, "group_peak_bytes": self._peak_bytes or None}
        return super().describe() | more

    def measure(self, temperature: float) -> None:
        """See `Comparison`."""
        before = len(self.rows)
        if self._place.cap_bytes is None:
            super().measure(temperature)
        else:
            self._measure_capped(temperature)
        self._duel(self.rows[before:])

    def _measure_capped(self, temperature: float) -> None:
        """Rows in processes of their own, one of plain decoding before, between and after them."""
        groups = self.groups(temperature)
        firsts, cells = [group[0] for group in groups], [cell for group in groups for cell in group]
        rows = [DrafterRow(self.setting, entry, temperature) for entry in self.options.entries()]
        before: Visit | None = None
        for _ in range(self.options.repeats):
            for row in rows:
                before = before or self._visit(Entry(drafter=PLAIN), firsts, row)
                own = self._visit(row.entry, cells, row)
                after = self._visit(Entry(drafter=PLAIN), firsts, row)
                row.turns.append(Turn([*before.samples, *after.samples], list(own.samples)))
                row.drafting, before = own.drafting, after
        for row in rows:
            self.keep(row)

    def _visit(self, entry: Entry, cells: Sequence[Cell], row: DrafterRow) -> Visit:
        tokens = self.tokens_of(entry)
        found = self._place.visit(self._capped, entry, cells, self.warm_cell(row.temperature), tokens)
        self.judge.exact = found.exact
        self._peak_bytes = max(self._peak_bytes, found.peak_bytes)
        for cell, sample in zip(cells, found.samples, strict=True):
            self.judge.judge(row, entry, cell, sample, tokens)
        self.say(f"  {entry.drafter}, a process under the cap: {rate(found.samples):.3f} tokens/s")
        return found

    def _duel(self, rows: Sequence[DrafterRow]) -> None:
        """`auto` against the best of the others: turn about where both can be open at once."""
        autos = [each for each in rows if each.entry.drafter == "auto"]
        others = [each for each in rows if each.entry.drafter not in ("auto", NONE)]
        if not autos or not others:
            return
        best = max(others, key=lambda each: each.speed_up)
        for auto in autos:
            apart = self._place.cap_bytes is not None
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

    def _together(self, auto: DrafterRow, best: DrafterRow) -> float:
        """Tokens per second of `auto` over those of the best, both open, turn about; median over the repeats."""
        ratios = []
        cells = [cell for group in self.groups(auto.temperature) for cell in group]
        for _ in range(self.options.repeats):
            with ExitStack() as stack:
                models = [stack.enter_context(open_timed(self.setting, each.entry)) for each in (auto, best)]
                for each in models:
                    each.warm(self.warm_cell(auto.temperature), self.options.tokens)
                samples: tuple[list[Sample], list[Sample]] = ([], [])
                for turn, cell in enumerate(cells):
                    for place in (0, 1) if turn % 2 else (1, 0):
                        samples[place].append(models[place].run(cell, self.options.tokens))
            ratios.append(rate(samples[0]) / rate(samples[1]) if rate(samples[1]) else 0.0)
        return statistics.median(ratios)


def bench(options: Options, place: Place) -> dict[str, Any]:
    """As `tiercache.bench.drafters.bench`, at a `Place`.

    Raises:
        TiercacheError: also where a process under the cap failed.
    """
    contests = [Contest(options, model, place) for model in options.models]
    return drafters.bench(options, contests) | {"auto": [duel for contest in contests for duel in contest.duels]}


def report(result: dict[str, Any]) -> str:
    """As `tiercache.bench.drafters_report.report`, then what is said of the place, and of `auto`."""
    lines = [drafters_report.report(result)]
    for model in result["models"]:
        if model["widened"] is not None:
            lines.append(
                f"  widened to {model['widened']} (hidden x neurons x layers): what was added is read and multiplied "
                "like the rest, and changes nothing that the model says"
            )
        if model["group_peak_bytes"] is not None:
            lines.append(f"  the largest process, page cache included, took {human(model['group_peak_bytes'])}")
    return "\n".join([*lines, *map(_auto, result["auto"])])


def _auto(duel: dict[str, Any]) -> str:
    best = duel["best"]
    return (
        f"  {duel['setting']}: auto ({', '.join(duel['drafters'])}) at temperature {duel['temperature']:g}: "
        f"{duel['ratio']:.3f} of the best row, {best['drafter']} ({best['grower']}) with {best['nodes']} nodes, "
        f"measured {duel['measured']}; {duel['speed_up']:.2f} x plain, the best {duel['best_speed_up']:.2f} x"
    )


def _widened(model: Path, place: Place, show_progress: bool | None) -> Path:
    """The plane store of the model made larger; an equal one that is there is kept."""
    assert place.widen is not None
    wide = place.folder.absolute() / f"{model.parent.name}-{model.name}-{place.widen}"
    store = wide.with_name(f"{wide.name}-planes")
    if not (store / CATALOG_FILE).is_file():
        convert(widen(model, wide, place.widen, show_progress=show_progress), store, show_progress=show_progress)
    return store


def _cap_bytes(text: str) -> int:
    found = Budget.parse(text).size_bytes
    if found is None:
        raise UsageError(f"--cap {text} is no size; give one such as 1434MiB")
    return found


def run(args: list[str]) -> None:
    """Measure what the arguments say; a table for people, and a line of JSON."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.drafters", epilog="Also: options of tiercache bench drafters.", allow_abbrev=False
    )
    parser.add_argument("--cap", help="RAM of each process, page cache included, such as 1434MiB")
    parser.add_argument("--widen", help="make the model HIDDENxNEURONSxLAYERS in --folder first")
    parser.add_argument("--folder", type=Path, default=Place.folder, help="where widened models are made")
    own, others = parser.parse_known_args(args)
    place = Place(
        cap_bytes=None if own.cap is None else _cap_bytes(own.cap),
        widen=None if own.widen is None else Size.parse(own.widen),
        folder=own.folder.expanduser(),
    )
    given = command_line.parameters("drafters", others)
    few = {} if place.cap_bytes is None else _UNDER_A_CAP
    result = bench(Options(**few | drafters_arguments(given)), place)
    tell(report(result), result, as_json=True, quiet=given["quiet"])


if __name__ == "__main__":
    command_line.main(run)
