"""Fits a mixed run into its budgets: chooses the recipe, and which planes of which layers are left out.

Knows recipes, requirements and plans; allocates nothing.
"""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from tiercache.config.options import OffloadConfig
from tiercache.engine import mixed_plan
from tiercache.engine.budgets import Budgets, fitted
from tiercache.engine.machine import Machine
from tiercache.engine.memory import Arithmetic, MemoryRequirements, memory_requirements, traced
from tiercache.engine.mixed import MixedRun
from tiercache.engine.mixed_plan import MixedPlan
from tiercache.engine.on_cpu import OnCpu
from tiercache.engine.placement import Placement
from tiercache.engine.source import Opened
from tiercache.errors import DoesNotFitError, UsageError
from tiercache.model.trace import MetaTrace
from tiercache.quant.planes import scale_row_bytes
from tiercache.store.calibration import Calibration
from tiercache.store.manifest import Manifest
from tiercache.store.planestore import PlaneStore
from tiercache.tiers.stack import TierStack


@dataclass(frozen=True, kw_only=True)
class MixedPlacement(Placement):
    """A placement of a mixed run; `mixed_plan` says how its neurons are run."""

    mixed_plan: MixedPlan

    def start(self, tiers: TierStack, stack: ExitStack, *, show_progress: bool | None) -> MixedRun:
        """Fill the tiers and the slots, and say how passes go."""
        on_cpu = self.plan.has_hbm and self.measure_cpu_tokens("int8") > 0
        tiers.load(show_progress=show_progress)
        return MixedRun.start(self.mixed_plan, self, tiers, stack, on_cpu=on_cpu)


def place(opened: Opened, config: OffloadConfig, machine: Machine, calibration: Calibration | None) -> MixedPlacement:
    """Choose the recipe and plan for it: of several, the best whose ranking planes all stay in HBM.

    `calibration` stands in for the store's own.

    Raises:
        UsageError, UnsupportedModelError: mixed mode cannot run this model, or knows no recipe within what was asked.
        DoesNotFitError: no recipe fits the budgets.
    """
    mixed_plan.refuse_unfit(opened)
    assert opened.store is not None
    budgets, on_cpu = Budgets.of(config, machine.device), OnCpu.of(config.cpu_tokens, machine, lossy=True)
    if not budgets.has_hbm and (config.policy != "auto" or config.max_fetches is not None):
        raise UsageError(
            "policy= and max_fetches= are for the slots of an HBM tier, and there is none; give hbm= a size, or leave "
            "them out"
        )
    fitting = _Fitting(
        opened, opened.store, config, machine, on_cpu, budgets, traced(opened, config, machine.capability)
    )
    found: MixedPlacement | None = None
    refused: list[DoesNotFitError] = []
    for plan in mixed_plan.plans_within(calibration or Calibration.load(opened.store), opened, config):
        fit = fitting.best_slotted(plan) if budgets.has_hbm else fitting.best_in_dram(plan)
        if isinstance(fit, DoesNotFitError):  # another plan may need less
            refused.append(fit)
            continue
        found = fit
        if not found.plan.copied:
            break
    if found is None:
        raise min(refused, key=lambda error: error.missing_bytes)
    return found


@dataclass(frozen=True)
class _Fitting:
    """Fits plans of one model into its budgets: each method returns what fits, or the error that says why nothing does.

    `trace` is the pass on the meta device, which is the same for all plans.
    """

    opened: Opened
    store: PlaneStore
    config: OffloadConfig
    machine: Machine
    on_cpu: OnCpu
    budgets: Budgets
    trace: MetaTrace

    def best_in_dram(self, plan: MixedPlan) -> MixedPlacement | DoesNotFitError:
        """Without slots: planes that would pass through DRAM are left out, down to the share that was asked for."""
        opened, asked = self._asked(plan)
        placed = self._placed(plan, opened, asked)
        if isinstance(placed, DoesNotFitError) or not placed.plan.streamed:
            return placed
        needs, neurons, dram = asked.needs, _neurons(opened.manifest), placed.plan.dram
        others = sum(needs.sizes[key] for key in needs.order if key not in neurons)
        room = dram.capacity_bytes - sum(dram.reserved_bytes.values()) - others
        plan = self._capped(plan, max(room, plan.share_bytes(self.store)))
        return self._placed(plan, *self._asked(plan))

    def best_slotted(self, plan: MixedPlan) -> MixedPlacement | DoesNotFitError:
        """With slots, whose planes must stay in DRAM: the least missed are left out until the others fit there.

        The bytes that are missing say how many to leave out, so few turns are needed; each leaves out a 64th at least.
        """
        opened, asked = self._asked(plan)
        placed = self._placed(plan, opened, asked)
        while isinstance(placed, DoesNotFitError) and placed.tier == "dram":
            held = sum(asked.payload[key] for key in _neurons(opened.manifest))
            limit = held - max(placed.missing_bytes, held // 64)
            smaller = self._capped(plan, limit)
            while smaller.tops == plan.tops and limit > 0:
                limit -= held // 64 + 1
                smaller = self._capped(plan, limit)
            if smaller.tops == plan.tops:  # nothing is left to leave out
                break
            plan = smaller
            opened, asked = self._asked(plan)
            placed = self._placed(plan, opened, asked)
        return placed

    def _capped(self, plan: MixedPlan, limit: int) -> MixedPlan:
        return mixed_plan.capped(plan, self.store, limit, slotted=self.budgets.has_hbm)

    def _placed(self, plan: MixedPlan, opened: Opened, asked: MemoryRequirements) -> MixedPlacement | DoesNotFitError:
        """The placement of one plan."""
        made = fitted(partial(self.budgets.divide, opened, asked, self.config.settings.prefetch_bytes))
        if isinstance(made, DoesNotFitError):
            return made
        return MixedPlacement(
            config=self.config,
            machine=self.machine,
            opened=opened,
            asked=asked,
            plan=made,
            on_cpu=self.on_cpu,
            mixed_plan=plan,
        )

    def _asked(self, plan: MixedPlan) -> tuple[Opened, MemoryRequirements]:
        """The model cut for a plan, and what it asks of memory."""
        slotted = self.budgets.has_hbm
        manifest = plan.manifest(self.store, self.config.precision, slotted=slotted)
        opened = replace(self.opened, manifest=manifest)
        arithmetic = Arithmetic(
            self.machine.device,
            kernels=True,
            on_cpu=self.on_cpu.allowed,
            shortlist=True,
            fused=self.config.fuses,
            capability=self.machine.capability,
        )
        asked = memory_requirements(opened, self.config, arithmetic, self.trace)
        if not slotted:
            return opened, asked
        passing = plan.passing_bytes(manifest)
        compute = {**asked.needs.compute, "neurons in passing": passing}
        dram = {**asked.needs.dram, "scales of deltas": _delta_bytes(manifest) if self.on_cpu.allowed else 0}
        if arithmetic.is_gpu:
            dram["staging of neurons"] = passing
        return opened, replace(asked, needs=replace(asked.needs, compute=compute, dram=dram))


def _neurons(manifest: Manifest) -> set[int]:
    """The units of neurons."""
    return {key for block in manifest.blocks for key in block.units}


def _delta_bytes(manifest: Manifest) -> int:
    """A second copy of the neurons' scales, for planes that have no slot and are multiplied by the CPU."""
    blocks = manifest.blocks
    return sum(block.neurons * block.parts * scale_row_bytes(block.columns, block.group) for block in blocks)
