"""Measures settings on the text, and keeps the best of each share and rank."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from operator import attrgetter
from typing import Any

from policies.precision import PRECISION_NAMES, TOP
from tiercache.calibrate import halving
from tiercache.calibrate.job import Job
from tiercache.calibrate.measure import Measured, Measurer
from tiercache.calibrate.settings import Forecast, Recipes, Try, described, uniform
from tiercache.errors import StoreError
from tiercache.progress import note
from tiercache.quality.measure import KeptLogits, kept_logits
from tiercache.store.calibration import Setting

_TRACED = 64
_TRACE_BYTES, _TRACES_BYTES = 16 << 20, 256 << 20  # of one setting, of all together
_UNIFORM = {PRECISION_NAMES[precision]: precision for precision in range(TOP, 0, -1)}


class Search:
    """Measures the settings of one calibration; each step is kept in the job's journal."""

    def __init__(self, job: Job, forecast: Forecast) -> None:
        self.job, self._forecast = job, forecast

    def settings(self) -> list[Setting]:
        """Measure what is worth it and keep the best of each share and rank, with a trace of each."""
        tries = self._forecast.tried()
        if self.job.journal.plain("kept") is None:
            self._measure(tries)
        self._keep_uniform()
        kept = [one for one in tries if [one.share, one.rank, one.key] in self.job.journal.plain("kept")]
        exact, last = self.job.journal.plain("exact"), len(self.job.pieces)
        self._trace(kept)
        return [
            Setting(
                share=one.share,
                rank=one.rank,
                recipes=one.recipes,
                read_bytes=self._forecast.read_bytes(one.recipes),
                exact_perplexity=exact["perplexity"],
                **self.job.journal.plain(f"measured/{last}/{one.key}"),
            )
            for one in kept
        ]

    def _measure(self, tries: list[Try]) -> None:
        """Find the best of each share and rank; the exact model's logits first, for they are not kept beyond a run."""
        store, rest = self.job.store, self.job.options.precision
        rows = sum(len(piece) - 1 for piece in self.job.pieces)
        size_bytes = rows * store.config.get_text_config().vocab_size * store.dtype.itemsize
        with kept_logits(store.folder, size_bytes, "give fewer --measure-tokens, or free some space") as logits:
            with self.job.opened("int8", self.job.sums()) as model:
                self._keep_exact(model, logits)
                if rest == "int8":
                    self._halve(model, logits, tries)
            if rest != "int8":
                with self.job.opened(rest, self.job.sums()) as model:
                    self._halve(model, logits, tries)

    def _keep_exact(self, model: Any, kept: KeptLogits) -> None:
        with self.job.bar("the exact model on the text", model, len(self.job.pieces)) as after:
            exact = Measurer(model, self.job.pieces, after).keep(kept)
        if not exact.finite:
            raise StoreError(
                f"the exact model of {self.job.store.folder} predicts what is no number, so nothing can be held "
                "against it; look whether the checkpoint's own weights are sound, and convert it again"
            )
        if self.job.journal.plain("exact") is None:
            self.job.journal.put(plain={"exact": asdict(exact)})

    def _halve(self, model: Any, logits: KeptLogits, tries: list[Try]) -> None:
        """Keep the best of each share and rank, and what uniform precisions lose."""
        groups: dict[tuple[float, int], list[Try]] = {}
        for one in tries:
            groups.setdefault((one.share, one.rank), []).append(one)
        pieces = len(self.job.pieces)
        passes = len(_UNIFORM) * pieces + halving.halving_passes(list(groups.values()), pieces)
        with self.job.bar(f"measuring {len(tries)} settings", model, passes) as after:
            measurer = Measurer(model, self.job.pieces, after)
            for name, precision in _UNIFORM.items():
                recipes = uniform(precision, self.job.inward, self.job.layers)
                self._measured_with(measurer, logits, f"uniform/{name}", recipes, pieces)

            def measure(one: Try, some: int) -> Measured:
                return self._measured_with(measurer, logits, f"measured/{some}/{one.key}", one.recipes, some)

            objective = attrgetter("kl" if self.job.options.objective == "loss" else "entropy")
            kept = halving.best(list(groups.values()), pieces, measure, objective)
        if not kept:
            raise StoreError(
                f"none of {len(tries)} settings has a finite loss on the text; look at the store with: "
                f"tiercache quality {self.job.store.folder}"
            )
        self.job.journal.put(plain={"kept": [[one.share, one.rank, one.key] for one in kept]})

    def _measured_with(
        self, measurer: Measurer, logits: KeptLogits, key: str, recipes: Recipes, pieces: int
    ) -> Measured:
        """What some recipes lose on the first `pieces` pieces of the text, from the journal or now."""
        known = self.job.journal.plain(key)
        if known is not None:
            return Measured(**known)  # in an earlier round, or by a process that was killed
        found = measurer.mixed(recipes, logits, pieces)
        self.job.journal.put(plain={key: asdict(found)})
        on = f"on {pieces} of {len(self.job.pieces)} pieces"
        note(f"{described(recipes)}: KL {found.kl:.5f} nats a token, {on}", show=self.job.options.show_progress)
        return found

    def _keep_uniform(self) -> None:
        each = {}
        for name, precision in _UNIFORM.items():
            read_bytes = self.job.layers * self.job.neurons * self._forecast.sizes.neuron(precision)
            each[name] = {**_finite(self.job.journal.plain(f"uniform/{name}")), "read_bytes": read_bytes}
        self.job.journal.put(plain={"uniform": each})

    def _trace(self, kept: list[Try]) -> None:
        """What some tokens choose under each setting that is kept."""
        missing = [place for place in range(len(kept)) if self.job.journal.arrays(f"trace/{place}") is None]
        if not missing:
            return
        with (
            self.job.opened(self.job.options.precision, self.job.sums()) as model,
            self.job.bar("traces of the settings", model, len(missing)) as after,
        ):
            measurer = Measurer(model, self.job.pieces, after)
            for place in missing:
                arrays = measurer.trace(kept[place].recipes, _TRACED, min(_TRACE_BYTES, _TRACES_BYTES // len(kept)))
                self.job.journal.put(arrays={f"trace/{place}": arrays})
                after()


def _finite(row: Mapping[str, float]) -> dict[str, float | None]:
    """None for what is not finite, which JSON cannot say."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}
