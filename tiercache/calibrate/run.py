"""The steps of a calibration: statistics of the exact model, then measured settings, each step kept in the journal.

The model is opened through the engine, within budgets like any other run, so one that is larger than memory streams. A
step that the journal has is not taken again, and what is left over is the finished calibration.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from policies.precision import PRECISION_NAMES, TOP, Recipe
from tiercache.calibrate import halving, predictors, replays
from tiercache.calibrate import sums as summing
from tiercache.calibrate.collect import Collector
from tiercache.calibrate.journal import Journal, clear_errors
from tiercache.calibrate.measure import Measured, Measurer, room
from tiercache.calibrate.settings import Forecast, Recipes, Try, described, plain, uniform
from tiercache.config import Budget, OffloadConfig, human
from tiercache.engine import mixed_plan
from tiercache.engine.offload import open_offloaded
from tiercache.errors import StoreError, UsageError
from tiercache.progress import bar, note
from tiercache.quality.measure import KeptLogits
from tiercache.store.calibration import FILE, SCHEMA, Calibration, Setting
from tiercache.store.planestore import PlaneStore
from tiercache.text import Text

REPORT_SCHEMA = "tiercache.calibration/1"
Objective = Literal["loss", "entropy"]
Rest = Literal["int8", "int4"]
_TRACED = 64
_TRACE_BYTES, _TRACES_BYTES = 16 << 20, 256 << 20  # of one setting, of all together
_PREDICTOR_BYTES = 384 << 20
_UNIFORM = {PRECISION_NAMES[precision]: precision for precision in range(TOP, 0, -1)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a calibration was asked for; see `tiercache.calibrate.command`."""

    tokens: int
    window: int
    measure_tokens: int
    precision: Rest
    objective: Objective
    predictor_rank: int | None
    hbm: Budget | None
    dram: Budget
    context: int
    device: str
    show_progress: bool | None


class Run:
    """One calibration, from whatever its journal has.

    Args:
        store: to calibrate.
        text: to learn from.
        options: how.
        journal: of what is done.
    """

    def __init__(self, store: PlaneStore, text: Text, options: Options, journal: Journal) -> None:
        self._store, self._text, self._options, self._journal = store, text, options, journal
        self._windows = text.windows(options.window)
        self._measured = halving.spread(text.windows(min(halving.PIECE, options.window)), options.measure_tokens)
        records = store.blocks()
        self._inward = records[0].parts - 1 if records else 1
        self._layers, self._neurons = len(records), records[0].rows if records else 0
        self._check_predictors(records[0].columns if records else 0)

    def _check_predictors(self, features: int) -> None:
        """Refuse predictors that are too large to be kept beside a catalogue."""
        rank = self._options.predictor_rank
        if rank is None:
            return
        each = 2 * 4 * self._layers * (features + self._neurons)
        most = (_PREDICTOR_BYTES - 2 * 4 * self._layers * self._neurons) // max(1, each)
        if rank > most:
            raise UsageError(f"--predictor-rank {rank} takes {human(rank * each)} of weights; give {most} or less")

    def whole(self) -> dict[str, Any]:
        """All steps that are left, and the finished calibration."""
        self._collect()
        sums = self._sums()
        forecast = Forecast(sums, mixed_plan.sizes_of(self._store.blocks()[0], self._store))
        settings = self._settings(forecast)
        seconds = self._journal.seconds
        text = {"name": self._text.file.name, "sha256": self._text.sha256, "tokens": len(self._text.ids)}
        meta = {
            "schema": SCHEMA,
            "identity": self._store.contents.meta["identity"],
            "store": self._store.digest,
            "model": self._store.contents.meta["model_type"],
            "precision": self._options.precision,
            "objective": self._options.objective,
            "text": text,
            "seconds": seconds,
            "uniform": self._journal.plain("uniform"),
        }
        made = Calibration(
            meta,
            sums["norms"].astype(np.float32),
            (sums["frequency"] / sums["tokens"][:, None]).astype(np.float32),
            sums["losses"] / sums["tokens"][:, None],
            tuple(settings),
            self._arrays(sums, len(settings)),
        )
        with clear_errors(self._store.folder / FILE):
            made.save(self._store.folder / FILE)
        return {**self._report(meta, sums, settings), "policies": replays.policies(made, self._store)}

    # ---------------------------------------------------------------- statistics

    def _sums(self) -> summing.Sums:
        return self._journal.arrays("sums") or summing.empty(self._layers, self._neurons, self._inward)

    def _collect(self) -> None:
        """Every window that is not in the sums yet, and the predictors."""
        done = self._journal.plain("chunks") or 0
        rank = self._options.predictor_rank
        if done == len(self._windows) and (rank is None or self._predicted() is not None):
            return
        with self._open("int8", None) as model:
            attached: Any = model.tiercache
            blocks = attached.mixed.blocks
            sums = self._sums()
            collector = Collector(model, blocks, mixed_plan.activation_of(model), sums)
            with self._bar("exact passes over the text", attached, len(self._windows), done) as after:
                for place in range(done, len(self._windows)):
                    collector.run(self._windows[place])
                    self._journal.put(plain={"chunks": place + 1}, arrays={"sums": sums})
                    after()
            if rank is not None:
                norms, windows = sums["norms"], self._windows
                with self._bar(f"samples for predictors of rank {rank}", attached, len(windows), 0) as after:
                    predictors.train(model, blocks, norms, windows, rank=rank, journal=self._journal, after=after)

    def _predicted(self) -> list[dict[str, Any]] | None:
        found = [self._journal.plain(f"predicted/{place}") for place in range(self._layers)]
        return None if None in found else found

    # ---------------------------------------------------------------- settings

    def _settings(self, forecast: Forecast) -> list[Setting]:
        """Measure what is worth it and keep the best of each share and rank, with a trace of each."""
        tries = forecast.tried()
        if self._journal.plain("kept") is None:
            self._measure(tries)
        self._keep_uniform(forecast)
        kept = [one for one in tries if [one.share, one.rank, one.key] in self._journal.plain("kept")]
        exact, last = self._journal.plain("exact"), len(self._measured)
        self._trace(kept)
        return [
            Setting(
                share=one.share,
                rank=one.rank,
                recipes=one.recipes,
                read_bytes=forecast.read_bytes(one.recipes),
                exact_perplexity=exact["perplexity"],
                **self._journal.plain(f"measured/{last}/{one.key}"),
            )
            for one in kept
        ]

    def _measure(self, tries: list[Try]) -> None:
        """Find the best of each share and rank; the exact model's logits first, for they are not kept beyond a run."""
        config = self._store.config.get_text_config()
        rest = self._options.precision
        with room(self._store.folder, self._measured, config.vocab_size, self._store.dtype.itemsize) as logits:
            with self._open("int8", self._sums()) as model:
                self._keep_exact(model, logits)
                if rest == "int8":
                    self._halve(model, logits, tries)
            if rest != "int8":
                with self._open(rest, self._sums()) as model:
                    self._halve(model, logits, tries)

    def _keep_exact(self, model: Any, kept: KeptLogits) -> None:
        with self._bar("the exact model on the text", model.tiercache, len(self._measured), 0) as after:
            exact = Measurer(model, model.tiercache.mixed.blocks, self._measured, after).keep(kept)
        if not exact.finite:
            raise StoreError(
                f"the exact model of {self._store.folder} predicts what is no number, so nothing can be held against "
                "it; look whether the checkpoint's own weights are sound, and convert it again"
            )
        if self._journal.plain("exact") is None:
            self._journal.put(plain={"exact": asdict(exact)})

    def _halve(self, model: Any, logits: KeptLogits, tries: list[Try]) -> None:
        """Keep the best of each share and rank, and what uniform precisions lose.

        Raises:
            StoreError: nothing is finite.
        """
        groups: dict[tuple[float, int], list[Try]] = {}
        for one in tries:
            groups.setdefault((one.share, one.rank), []).append(one)
        pieces = len(self._measured)
        passes = len(_UNIFORM) * pieces + halving.passes(list(groups.values()), pieces)
        with self._bar(f"measuring {len(tries)} settings", model.tiercache, passes, 0) as after:
            measurer = Measurer(model, model.tiercache.mixed.blocks, self._measured, after)
            for name, precision in _UNIFORM.items():
                recipes = uniform(precision, self._inward, self._layers)
                self._measured_with(measurer, logits, f"uniform/{name}", recipes, pieces)

            def measure(one: Try, some: int) -> Measured:
                return self._measured_with(measurer, logits, f"measured/{some}/{one.key}", one.recipes, some)

            by_loss = self._options.objective == "loss"
            kept = halving.best(
                list(groups.values()), pieces, measure, lambda found: found.kl if by_loss else found.entropy
            )
        if not kept:
            raise StoreError(
                f"none of {len(tries)} settings has a finite loss on the text; look at the store with: "
                f"tiercache quality {self._store.folder}"
            )
        self._journal.put(plain={"kept": [[one.share, one.rank, one.key] for one in kept]})

    def _measured_with(
        self, measurer: Measurer, logits: KeptLogits, key: str, recipes: Recipes, pieces: int
    ) -> Measured:
        """What some recipes lose on the first `pieces` pieces of the text, from the journal or now."""
        known = self._journal.plain(key)
        if known is not None:
            return Measured(**known)  # in an earlier round, or by a process that was killed
        found = measurer.mixed(recipes, logits, pieces)
        self._journal.put(plain={key: asdict(found)})
        note(
            f"{described(recipes)}: KL {found.kl:.5f} nats a token, on {pieces} of {len(self._measured)} pieces",
            show=self._options.show_progress,
        )
        return found

    def _keep_uniform(self, forecast: Forecast) -> None:
        each = {
            name: {
                **_finite(self._journal.plain(f"uniform/{name}")),
                "read_bytes": self._layers * forecast.neurons * forecast.sizes.neuron(precision),
            }
            for name, precision in _UNIFORM.items()
        }
        self._journal.put(plain={"uniform": each})

    def _trace(self, kept: list[Try]) -> None:
        """What some tokens choose under each setting that is kept."""
        missing = [place for place in range(len(kept)) if self._journal.arrays(f"trace/{place}") is None]
        if not missing:
            return
        with (
            self._open(self._options.precision, self._sums()) as model,
            self._bar("traces of the settings", model.tiercache, len(missing), 0) as after,
        ):
            measurer = Measurer(model, model.tiercache.mixed.blocks, self._measured, after)
            for place in missing:
                arrays = measurer.trace(kept[place].recipes, _TRACED, min(_TRACE_BYTES, _TRACES_BYTES // len(kept)))
                self._journal.put(arrays={f"trace/{place}": arrays})
                after()

    # ---------------------------------------------------------------- what they share

    @contextmanager
    def _open(self, rest: str, sums: summing.Sums | None) -> Iterator[Any]:
        """The model, all of its neurons at hand with all of their planes."""
        options = self._options
        config = OffloadConfig(
            hbm=options.hbm,
            dram=options.dram,
            precision="int8" if rest == "int8" else "int4",
            context=options.context,
            logits=options.window,
            device=options.device,
            cpu_tokens=0,
            mode="mixed",
            bytes_per_token=Budget.parse(1.0),
        )
        with open_offloaded(
            self._store.folder, config, show_progress=options.show_progress, calibration=self._made_up(sums)
        ) as model:
            run: Any = model.tiercache
            if not run.mixed.plan.measured:
                raise UsageError(
                    "calibration needs every plane of every neuron, and not all of them fit DRAM beside an HBM tier; "
                    "give a larger --dram, or --device cpu without --hbm, which streams them"
                )
            yield model

    def _made_up(self, sums: summing.Sums | None) -> Calibration:
        """What the engine must be told to open a model that is not calibrated yet."""
        shape = (self._layers, self._neurons)
        recipe = Recipe("product", 2, self._inward, (1.0, 0.0, 0.0))
        norms = np.ones(shape, np.float32) if sums is None else sums["norms"].astype(np.float32)
        frequency = np.zeros(shape, np.float32) if sums is None else sums["frequency"].astype(np.float32)
        unknown = math.nan  # nobody has measured it
        whole = Setting(1.0, 2, (recipe,) * self._layers, 0, unknown, unknown, unknown, unknown, unknown)
        losses = np.tile([1.0, 0.1, 0.0], (self._layers, 1))
        return Calibration({}, norms, frequency, losses, (whole,), {})

    @contextmanager
    def _bar(self, title: str, attached: Any, passes: int, done: int) -> Iterator[Callable[[], None]]:
        """A bar over the weights that the passes need; what it yields is called after each."""
        each = attached.pass_bytes()["needed"]
        with bar(title, each * passes, done_bytes=each * done, show=self._options.show_progress) as advance:
            yield lambda: advance(each)

    # ---------------------------------------------------------------- results

    def _arrays(self, sums: summing.Sums, settings: int) -> dict[str, np.ndarray]:
        """What else is kept, by name."""
        tokens = sums["tokens"]
        arrays: dict[str, np.ndarray] = {
            "thresholds": sums["thresholds"] / sums["chunks"][:, None, None, None],
            "paired": sums["pair_of"].astype(np.int32),
            "coactivation": summing.lift(sums),
            "overlap": sums["overlap"] / np.maximum(sums["neighbours"], 1)[:, None],
            "unions": sums["unions"] / np.maximum(sums["union_runs"], 1)[:, None, :],
            "zeros": sums["zeros"] / tokens,
        }
        for place in range(settings):
            for block, rows in (self._journal.arrays(f"trace/{place}") or {}).items():
                arrays[f"trace/{place}/{block}"] = rows
        if self._options.predictor_rank is not None:
            for place in range(self._layers):
                for name, values in (self._journal.arrays(f"predictor/{place}") or {}).items():
                    arrays[f"predictor/{place}/{name}"] = values
        return arrays

    def _report(self, meta: dict[str, Any], sums: summing.Sums, settings: list[Setting]) -> dict[str, Any]:
        """Plain data; see `tiercache.calibrate.report`."""
        rows = [{**asdict(one), "recipes": plain(one.recipes), "recipe": described(one.recipes)} for one in settings]
        return {
            "schema": REPORT_SCHEMA,
            "store": str(self._store.folder),
            **{name: meta[name] for name in ("model", "precision", "objective", "text", "seconds", "uniform")},
            "blocks": self._layers,
            "neurons": self._neurons,
            "neuron_weights": (self._inward + 1) * self._store.blocks()[0].columns,
            "measured_tokens": sum(len(window) - 1 for window in self._measured),
            "exact_perplexity": self._journal.plain("exact")["perplexity"],
            **summing.means(sums, self._inward),
            **self._predictor_rows(),
            "settings": rows,
        }

    def _predictor_rows(self) -> dict[str, Any]:
        rank, found = self._options.predictor_rank, self._predicted()
        if rank is None or found is None:
            return {}
        rows = {
            name: {
                f"{half:.0%}": [one[key][h] if key in one else None for one in found]
                for h, half in enumerate(summing.HALVES)
            }
            for name, key in (("predictor", "own"), ("ahead", "ahead"))
        }
        return {"predictor_rank": rank, **rows}


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """None for what is not finite, which JSON cannot say."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}
