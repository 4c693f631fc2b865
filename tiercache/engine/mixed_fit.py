"""Fits a mixed run into its budgets: chooses the recipe, and which planes of which layers are left out.

Knows recipes, requirements and plans; allocates nothing.
"""

from dataclasses import dataclass, replace

from policies.plan import Plan
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import Budget
from tiercache.engine import mixed_plan
from tiercache.engine.budgets import divide
from tiercache.engine.loaded import Loaded
from tiercache.engine.machine import Machine
from tiercache.engine.memory import Arithmetic, MemoryRequirements, memory_requirements, traced
from tiercache.engine.mixed import MixedRun
from tiercache.engine.mixed_plan import MixedPlan
from tiercache.engine.on_cpu import OnCpu
from tiercache.engine.source import Opened
from tiercache.errors import DoesNotFitError
from tiercache.model.trace import MetaTrace
from tiercache.quant.planes import PRECISIONS, scale_row_bytes
from tiercache.store.calibration import Calibration
from tiercache.store.manifest import Manifest
from tiercache.store.planestore import PlaneStore
from tiercache.tiers.breakeven import measure_breakeven


@dataclass(frozen=True)
class MixedPlacement:
    """Where the weights of a mixed run lie.

    Attributes:
        mixed_plan: how neurons are run.
        opened: the model, its blocks cut as that plan says.
        asked: what was asked of memory.
        plan: what lies where.
        on_cpu: whether the CPU multiplies, in DRAM, neurons that have no slot.
    """

    mixed_plan: MixedPlan
    opened: Opened
    asked: MemoryRequirements
    plan: Plan
    on_cpu: OnCpu

    def start(self, loaded: Loaded, *, show_progress: bool | None) -> MixedRun:
        """Fill the tiers and the slots, and say how passes go."""
        host, device = loaded.machine.kernels["cpu"], loaded.machine.device
        slotted = self.plan.hbm is not None  # measured while the tiers are still empty
        on_cpu = slotted and self.on_cpu.tokens(lambda: measure_breakeven(host, PRECISIONS["int8"], device)) > 0
        loaded.tiers.load(show_progress=show_progress)
        return MixedRun.start(self.mixed_plan, loaded, on_cpu=on_cpu)


def place(opened: Opened, config: OffloadConfig, machine: Machine, calibration: Calibration | None) -> MixedPlacement:
    """Choose the recipe and plan for it: of several, the best whose ranking planes all stay in HBM.

    Args:
        opened: the model, from a plane store.
        config: the options.
        machine: where it runs.
        calibration: stands in for the store's own; None for that.

    Raises:
        UsageError, UnsupportedModelError: mixed mode cannot run this model, or knows no recipe within what was asked.
        DoesNotFitError: no recipe fits the budgets.
    """
    mixed_plan.refuse_unfit(opened)
    assert opened.store is not None
    fitting = _Fitting(opened, opened.store, config, machine)
    found, refused = None, None
    for plan in mixed_plan.choose(calibration or Calibration.load(opened.store), opened, config):
        try:
            found = fitting.fit(plan)
        except DoesNotFitError as error:  # another plan may need less
            refused = error if refused is None or error.missing_bytes < refused.missing_bytes else refused
            continue
        hbm = found.plan.hbm
        if hbm is None or len(hbm.placement.pinned) == len(hbm.order):
            break
    if found is None:
        assert refused is not None
        raise refused
    return found


class _Fitting:
    """Fits plans of one model into its budgets; a pass is traced on the meta device once for all of them."""

    def __init__(self, opened: Opened, store: PlaneStore, config: OffloadConfig, machine: Machine) -> None:
        self._opened, self._store, self._config, self._device = opened, store, config, machine.device
        self._on_cpu = OnCpu.of_mixed(config.cpu_tokens, machine)
        self._slotted = machine.is_gpu or config.hbm not in (None, Budget())
        self._trace: MetaTrace | None = None

    def fit(self, plan: MixedPlan) -> MixedPlacement:
        """The placement for one recipe; where planes above do not fit DRAM, the least missed stay on the SSD.

        Raises:
            DoesNotFitError: even without them it does not fit.
        """
        limit: int | None = None
        while True:
            opened, asked = self._asked(plan)
            neurons = {key for block in opened.manifest.blocks for key in block.units}
            held = sum(asked.payload[key] for key in neurons)
            try:
                made = divide(opened, asked, self._config, self._device)
            except DoesNotFitError as error:
                if not self._slotted or error.tier != "dram":
                    raise
                before, limit = plan.tops, held - max(error.missing_bytes, held // 64)
                while (plan := self._capped(plan, limit)).tops == before:
                    if limit <= 0:  # nothing is left to leave out
                        raise
                    limit -= held // 64 + 1
            else:
                if self._slotted or limit is not None or not made.streamed:
                    return MixedPlacement(plan, opened, asked, made, self._on_cpu)
                limit = max(_room_for_neurons(asked, made, neurons), plan.share_bytes(self._store))
                plan = self._capped(plan, limit)

    def _capped(self, plan: MixedPlan, limit: int) -> MixedPlan:
        return mixed_plan.capped(plan, self._store, limit, slotted=self._slotted)

    def _asked(self, plan: MixedPlan) -> tuple[Opened, MemoryRequirements]:
        """The model cut for a plan, and what it asks of memory."""
        manifest = plan.manifest(self._store, self._config.precision, slotted=self._slotted)
        opened = replace(self._opened, manifest=manifest)
        self._trace = self._trace or traced(opened, self._config)
        arithmetic = Arithmetic(self._device, kernels=True, on_cpu=self._on_cpu.allowed, shortlist=True)
        asked = memory_requirements(opened, self._config, arithmetic, self._trace)
        if not self._slotted:
            return opened, asked
        passing = plan.passing_bytes(manifest)
        compute = {**asked.needs.compute, "neurons in passing": passing}
        dram = {**asked.needs.dram, "scales of deltas": _delta_bytes(manifest) if self._on_cpu.allowed else 0}
        if arithmetic.is_gpu:
            dram["staging of neurons"] = passing
        return opened, replace(asked, needs=replace(asked.needs, compute=compute, dram=dram))


def _delta_bytes(manifest: Manifest) -> int:
    """A second copy of the neurons' scales, for planes that have no slot and are multiplied by the CPU."""
    blocks = manifest.blocks
    return sum(block.neurons * block.parts * scale_row_bytes(block.columns, block.group) for block in blocks)


def _room_for_neurons(asked: MemoryRequirements, made: Plan, neurons: set[int]) -> int:
    """What of DRAM is left for neurons that stay, beside everything else."""
    others = sum(size for key, size in asked.needs.sizes.items() if key in asked.needs.order and key not in neurons)
    return made.dram.capacity_bytes - sum(made.dram.reserved_bytes.values()) - others
