"""Where the weights of an exact run lie: the plan that was given, or the one that is predicted to be fastest.

Knows memory requirements, plans and drafters; allocates nothing. How long passes take is the cost model's to say.
"""

from dataclasses import replace
from functools import partial

from profiler import planner
from profiler.hardware import Hardware
from profiler.planner import Way
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import human
from tiercache.engine import drafting
from tiercache.engine.budgets import Budgets, fitted
from tiercache.engine.drafting_choice import DraftingChoice
from tiercache.engine.machine import Machine
from tiercache.engine.memory import Arithmetic, memory_requirements
from tiercache.engine.on_cpu import OnCpu
from tiercache.engine.placement import ExactPlacement
from tiercache.engine.source import Opened
from tiercache.engine.this_hardware import this_hardware
from tiercache.errors import DoesNotFitError, UsageError


def place(opened: Opened, config: OffloadConfig, machine: Machine, *, show: bool) -> ExactPlacement:
    """The placement of an exact run; drafter="auto" takes the one in which it is likely to be faster, and says which.

    With `config.resident` the model's own planes may draft; `show`: notes may be printed.

    Raises:
        DoesNotFitError: a budget is too small, with "auto" even for plain decoding.
        UsageError, StoreError, UnsupportedModelError: as `drafting.find_drafters` and `memory_requirements` say.
    """
    if config.resident and config.cpu_tokens and machine.is_gpu:
        raise UsageError(
            f"cpu_tokens={config.cpu_tokens} would multiply some planes of a matrix on {machine.device} and others on "
            "the CPU, which resident passes rule out; leave cpu_tokens= out, or choose drafter='ngram'"
        )
    on_cpu = OnCpu.of(config.cpu_tokens, machine, lossy=False)
    budgets = Budgets.of(config, machine.device)
    hardware = this_hardware(machine, config, cpu_multiplies=on_cpu.allowed)

    def planned(options: OffloadConfig) -> ExactPlacement:
        own = opened.cut(config.precision, by_plane=options.resident, by_rows=bool(machine.kernels))
        spec = drafting.find_drafters(options, own, machine.capability)
        arithmetic = Arithmetic(
            machine.device,
            kernels=bool(machine.kernels),
            on_cpu=on_cpu.allowed,
            fused=options.fuses,
            capability=machine.capability,
        )
        asked = memory_requirements(own, drafting.widened(options), arithmetic)
        asked = drafting.reserve(asked, spec, options)
        plan = budgets.divide(own, asked, options.settings.prefetch_bytes)
        where = {"config": options, "machine": machine, "opened": own, "asked": asked, "plan": plan, "on_cpu": on_cpu}
        return ExactPlacement(**where, drafter_spec=spec)  # type: ignore[arg-type]

    if config.draft is None or config.draft.drafter != "auto":
        found = planned(config)
    else:
        choice = DraftingChoice(config, config.draft, planned, hardware, show)
        found = choice.again(config.drafts) if config.drafts else choice.made()
    return _searched(found, budgets, hardware)


def _searched(found: ExactPlacement, budgets: Budgets, hardware: Hardware) -> ExactPlacement:
    """The same with the settings in which it is predicted to be fastest, where the options leave that open."""
    if found.config.plan != "auto" or found.plan.still or found.opened.memory is not None:
        return replace(found, ranked=planner.rank([_way(found)], hardware))
    placements = {}
    for settings in planner.settings_to_try(hardware):
        asked = found.asked.staged(found.opened.staging_bytes(settings.read_threads))
        plan = fitted(partial(budgets.divide, found.opened, asked, settings.prefetch_bytes))
        if not isinstance(plan, DoesNotFitError):
            config = replace(found.config, settings=settings)
            placements[settings] = replace(found, config=config, asked=asked, plan=plan)
    ranked = planner.rank([_way(each) for each in placements.values()], hardware, tie=planner.RING_TIE)
    best = placements[ranked[0].way.settings]
    return replace(best, decisions=(*best.decisions, *planner.decisions(ranked)), ranked=ranked)


def _way(placed: ExactPlacement) -> Way:
    """A placement as the planner sees it."""
    settings, on_cpu = placed.config.settings, placed.on_cpu
    choices = {
        "prefetch": human(settings.prefetch_bytes),
        "reads": f"{settings.read_threads} of {human(settings.read_bytes)}",
    }
    cpu_tokens = (1 if on_cpu.asked is None else on_cpu.asked) if on_cpu.allowed else 0
    return Way(choices, placed.workload, placed.plan, settings, cpu_tokens)
