"""What all steps of a calibration work on: the store, the text, the journal, and the model when it is opened.

The engine opens the model within budgets like any other run, so one that is larger than memory streams.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from policies.precision import Recipe
from tiercache import progress
from tiercache.calibrate import halving
from tiercache.calibrate import sums as summing
from tiercache.calibrate.journal import Journal
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import Budget, human
from tiercache.engine.offload import open_offloaded
from tiercache.errors import UsageError
from tiercache.store.calibration import Calibration, Setting
from tiercache.store.planestore import PlaneStore
from tiercache.text import Text

Objective = Literal["loss", "entropy"]
Rest = Literal["int8", "int4"]

_PREDICTOR_BYTES = 384 << 20


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions:
    """What a calibration was asked for; see `tiercache.calibrate.command.calibrate`."""

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


class Job:
    """One calibration, as far as its journal has it.

    Attributes:
        windows: of the text, from which statistics are gathered.
        pieces: of the text, on which settings are measured.
        layers, neurons: feed-forward blocks, and the neurons of each.
        inward: matrices of a block that make its neurons: gate and up, or up alone.

    Raises UsageError where predictors were asked for that are too large.
    """

    def __init__(self, store: PlaneStore, text: Text, options: CalibrationOptions, journal: Journal) -> None:
        self.store, self.text, self.options, self.journal = store, text, options, journal
        self.windows = text.windows(options.window)
        self.pieces = halving.spread(text.windows(min(halving.PIECE, options.window)), options.measure_tokens)
        records = store.blocks()
        self.inward = records[0].parts - 1 if records else 1
        self.layers, self.neurons = len(records), records[0].rows if records else 0
        self._check_predictors(records[0].columns if records else 0)

    def _check_predictors(self, features: int) -> None:
        """Refuse predictors that are too large to be kept beside a catalogue."""
        rank = self.options.predictor_rank
        if rank is None:
            return
        each = 2 * 4 * self.layers * (features + self.neurons)
        most = (_PREDICTOR_BYTES - 2 * 4 * self.layers * self.neurons) // max(1, each)
        if rank > most:
            raise UsageError(f"--predictor-rank {rank} takes {human(rank * each)} of weights; give {most} or less")

    def sums(self) -> summing.Sums:
        """What was added up so far."""
        return self.journal.arrays("sums") or summing.empty(self.layers, self.neurons, self.inward)

    def predicted(self) -> list[dict[str, Any]] | None:
        """How well each block's predictors do; None before all are trained."""
        found = [self.journal.plain(f"predicted/{place}") for place in range(self.layers)]
        return None if None in found else found

    @contextmanager
    def opened(self, rest: Rest, sums: summing.Sums | None) -> Iterator[Any]:
        """The model, all of its neurons at hand with all of their planes, and what is no neuron at precision `rest`.

        `sums` are what is known of the neurons; None where nothing is. Raises UsageError where there is no room.
        """
        options = self.options
        config = OffloadConfig(
            hbm=options.hbm,
            dram=options.dram,
            precision=rest,
            context=options.context,
            logits=options.window,
            device=options.device,
            cpu_tokens=0,
            mode="mixed",
            bytes_per_token=Budget.parse(1.0),
        )
        with open_offloaded(
            self.store.folder, config, show_progress=options.show_progress, calibration=self._assumed(sums)
        ) as model:
            attached: Any = model.tiercache
            if not attached.mixed.plan.measured:
                raise UsageError(
                    "calibration needs every plane of every neuron, and not all of them fit DRAM beside an HBM tier; "
                    "give a larger --dram, or --device cpu without --hbm, which streams them"
                )
            yield model

    def _assumed(self, sums: summing.Sums | None) -> Calibration:
        """A calibration by which the engine opens a model that has none yet."""
        shape = (self.layers, self.neurons)
        recipe = Recipe("product", 2, self.inward, (1.0, 0.0, 0.0))
        norms = np.ones(shape, np.float32) if sums is None else sums["norms"].astype(np.float32)
        frequency = np.zeros(shape, np.float32) if sums is None else sums["frequency"].astype(np.float32)
        unknown = math.nan  # nobody has measured it
        whole = Setting(1.0, 2, (recipe,) * self.layers, 0, unknown, unknown, unknown, unknown, unknown)
        losses = np.tile([1.0, 0.1, 0.0], (self.layers, 1))
        return Calibration({}, norms, frequency, losses, (whole,), {})

    @contextmanager
    def bar(self, title: str, model: Any, passes: int, done: int = 0) -> Iterator[Callable[[], None]]:
        """A bar over the weights that the passes need; what it yields is called after each."""
        each = model.tiercache.pass_bytes()["needed"]
        with progress.bar(title, each * passes, done_bytes=each * done, show=self.options.show_progress) as advance:
            yield lambda: advance(each)
