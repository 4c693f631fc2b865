"""Holds what a run's passes took against what the cost model says of them, and keeps the pair for later fits.

Only where this machine was probed, and only for exact passes of one token whose weights the CPU reads straight from
main memory. Whatever goes wrong here, a run goes on.
"""

import statistics
from dataclasses import replace

from profiler.cost_model import PassTime, pass_time
from profiler.figure import ERROR
from profiler.fitting import Pair
from profiler.hardware import Hardware
from tiercache.engine.placement import Placement
from tiercache.engine.probe_cache import add_pairs, measured_machine
from tiercache.progress import note
from tiercache.stats.run import Stats

LEAST_PASSES = 8  # fewer may all be the first ones, which are slower


class Actuals:
    """One run's comparison.

    Args:
        placed: the run.
        stats: its statistics, which are told both seconds.
        show: notes may be printed.
    """

    def __init__(self, placed: Placement, stats: Stats, *, show: bool) -> None:
        self._placed, self._stats, self._show = placed, stats, show
        self._machine: Hardware | None = None
        self._made: PassTime | None = None
        self._looked = False

    def tell(self) -> None:
        """Put predicted and actual seconds into the statistics, where there are enough passes."""
        try:
            self._compare()
        except Exception as error:  # a comparison must not end a run
            note(f"what was predicted could not be compared with this run: {error}", show=self._show)

    def _compare(self) -> None:
        stats = self._stats
        placed, fast = self._placed, stats.kernels not in ("decode", "reference")
        if len(stats.token_passes_s) < LEAST_PASSES or stats.lossy or placed.plan.has_hbm or not fast:
            return
        stats.actual_pass_s = statistics.median(stats.token_passes_s)
        if not self._looked:
            self._looked, self._machine = True, measured_machine()
        if self._machine is None:
            return
        self._made = self._predicted(self._machine)
        stats.predicted_pass_s = self._made.total_s

    def close(self) -> None:
        """At the end of the run: keep the pair, and say where the prediction was off by more than its band."""
        self.tell()
        if self._machine is None or self._made is None:
            return
        try:
            self._keep(self._machine)
        except Exception as error:  # a full disk, for example
            note(f"what this run took could not be kept: {error}", show=self._show)

    def _keep(self, machine: Hardware) -> None:
        stats, band = self._stats, 1 + ERROR[machine.basis]
        assert stats.predicted_pass_s is not None
        assert stats.actual_pass_s is not None
        plain = self._predicted(replace(machine, fitted={}))
        name = f"{self._placed.opened.model.config.model_type} {stats.precision}, a run, 1 token"
        add_pairs([Pair.of(name, plain, machine.overlap.value, stats.actual_pass_s)])
        ratio = stats.actual_pass_s / stats.predicted_pass_s
        if not 1 / band <= ratio <= band:
            note(
                f"a pass took {stats.actual_pass_s:.3f} s where {stats.predicted_pass_s:.3f} were predicted, off by "
                f"more than the {band - 1:.0%} of its band; run 'tiercache-profile probe' while nothing else runs",
                show=self._show,
            )

    def _predicted(self, machine: Hardware) -> PassTime:
        return pass_time(self._placed.workload, self._placed.plan, machine, past=self._stats.token_past)
