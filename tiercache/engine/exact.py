"""Where the weights of an exact run lie: plain decoding's placement or drafting's, compared before any is reserved.

Knows memory requirements, plans and drafters; allocates nothing. Which placement is better is `policies.room`'s to say.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from policies import room
from policies.plan import Plan
from policies.room import Rates, Traffic
from tiercache.config.drafting import DraftConfig
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import human
from tiercache.engine import drafting
from tiercache.engine.budgets import divide
from tiercache.engine.drafting import DrafterSpec
from tiercache.engine.loaded import Loaded
from tiercache.engine.machine import Machine
from tiercache.engine.memory import Arithmetic, MemoryRequirements, memory_requirements
from tiercache.engine.on_cpu import OnCpu
from tiercache.engine.run import ExactRun, ResidentRun
from tiercache.engine.source import Opened
from tiercache.errors import DoesNotFitError
from tiercache.kv.cache import Support, support
from tiercache.progress import note
from tiercache.quant.planes import PRECISIONS
from tiercache.tiers.breakeven import measure_breakeven

# Bytes a second where nobody measured them; of the machines that this is for, and only their proportions matter.
_DRAM, _CARD, _LINK, _SSD = 35e9, 900e9, 25e9, 3e9


@dataclass(frozen=True)
class ExactPlacement:
    """A placement of an exact run.

    Attributes:
        config: the options that it was made for.
        opened: the model, its units cut as these options say.
        drafter_spec: which drafters; None where no drafter was asked for.
        asked: what was asked of memory.
        plan: what lies where.
        on_cpu: whether the CPU multiplies, in DRAM, by what does not stay in HBM.
        room_price: see `policies.room.price`; None where nothing was compared.
    """

    config: OffloadConfig
    opened: Opened
    drafter_spec: DrafterSpec | None
    asked: MemoryRequirements
    plan: Plan
    on_cpu: OnCpu
    room_price: float | None = None

    @property
    def traffic(self) -> Traffic:
        """What a pass moves."""
        order, payload = self.asked.needs.order, self.asked.payload
        needed = sum(payload[key] for key in order)
        staying = set(order if self.plan.hbm is None else self.plan.hbm.placement.pinned)
        up = sum(payload[key] for key in order if key not in staying)
        return Traffic(needed, up, sum(payload[key] for key in self.plan.streamed))

    def start(self, loaded: Loaded, *, show_progress: bool | None) -> ExactRun:
        """Fill the tiers, and say how passes go."""
        tokens = 0
        hbm = self.plan.hbm
        if hbm is not None and len(hbm.placement.pinned) < len(hbm.order):  # measured while the tiers are still empty
            tokens = self.on_cpu.tokens(
                lambda: measure_breakeven(
                    loaded.machine.kernels["cpu"], PRECISIONS[self.config.precision], loaded.machine.device
                )
            )
        loaded.tiers.load(show_progress=show_progress)
        return ResidentRun(tokens, self.asked, self.plan) if self.config.resident else ExactRun(tokens)


def place(opened: Opened, config: OffloadConfig, machine: Machine, *, show: bool) -> ExactPlacement:
    """The placement of an exact run; "auto" takes the one in which it is likely to be faster, and says which.

    Args:
        opened: the model.
        config: the options, with `resident` where the model's own planes may draft.
        machine: where it runs.
        show: whether notes may be printed.

    Raises:
        DoesNotFitError: a budget is too small, with "auto" even for plain decoding.
        UsageError, StoreError, UnsupportedModelError: as `drafting.find_drafters` and `memory_requirements` say.
    """
    OnCpu.of_exact(config.cpu_tokens, machine, resident=config.resident)  # refuses what cannot be, before all else

    def planned(options: OffloadConfig) -> ExactPlacement:
        same = options.resident == config.resident
        own = opened if same else opened.cut(config.precision, resident=options.resident)
        return _planned(own, options, machine)

    if config.draft is None or config.draft.drafter != "auto":
        return planned(config)
    return _compared(config, config.draft, planned, support(opened.meta_model), _rates(config, machine), show)


def _compared(
    config: OffloadConfig,
    draft: DraftConfig,
    planned: Callable[[OffloadConfig], ExactPlacement],
    takes: Support,
    rates: Rates,
    show: bool,
) -> ExactPlacement:
    """The first of three that is likely to pay: with the model's own planes and n-grams, these alone, or nobody."""
    plain, price, reason = _fitted(planned, replace(config, resident=False, draft=None)), None, takes.reason
    wanted = draft.fixed or draft.speckv is not None  # a drafter, at any price
    own_planes = [True, False] if config.resident else [False]
    for own in own_planes if takes.takes != "nothing" else ():
        found = _fitted(planned, replace(config, resident=own))
        if isinstance(found, DoesNotFitError):
            who = "by its own planes" if own else "at all"
            reason = f"to draft {who} takes {human(found.missing_bytes)} more of {found.tier or 'memory'}"
            continue
        if isinstance(plain, ExactPlacement) and not wanted:
            price = room.price(plain.traffic, found.traffic, rates)
            if not room.pays(plain.traffic, found.traffic, rates):
                reason = f"its room would make a pass take {price:.2f} times as long, more than it is likely to win"
                continue
            if own and not found.traffic.waits(rates):
                reason = "no pass waits for a slower tier, so passes of its own planes would save nothing"
                continue
        if reason:
            note(f"drafting by n-grams alone: {reason}", show=show)
        return replace(found, room_price=price)
    if isinstance(plain, DoesNotFitError):
        raise plain
    note(f"decoding without drafting, for {reason}", show=show)
    return replace(plain, drafter_spec=drafting.no_drafters(plain.opened, draft, reason), room_price=price)


def _fitted(
    planned: Callable[[OffloadConfig], ExactPlacement], options: OffloadConfig
) -> ExactPlacement | DoesNotFitError:
    """The placement, or why there is none."""
    try:
        return planned(options)
    except DoesNotFitError as error:
        return error


def _planned(opened: Opened, config: OffloadConfig, machine: Machine) -> ExactPlacement:
    """What these options ask for, and the plan for it."""
    on_cpu = OnCpu.of_exact(config.cpu_tokens, machine, resident=config.resident)
    drafter_spec = drafting.find_drafters(config, opened)
    arithmetic = Arithmetic(machine.device, kernels=bool(machine.kernels), on_cpu=on_cpu.allowed)
    asked = memory_requirements(opened, drafting.widened(config), arithmetic)
    asked = drafting.reserve(asked, drafter_spec, config)
    return ExactPlacement(config, opened, drafter_spec, asked, divide(opened, asked, config, machine.device), on_cpu)


def _rates(config: OffloadConfig, machine: Machine) -> Rates:
    """A region of main memory that stands in for a card is as fast as its link, unless that is throttled.

    Where the CPU stands in for a card it multiplies in DRAM what does not stay in that region, unless cpu_tokens=0: a
    pass of one token then waits for no link.
    """
    memory, link = (_CARD, _LINK) if machine.is_gpu else (_DRAM, _DRAM)
    crosses = machine.is_gpu or not OnCpu.of_exact(config.cpu_tokens, machine, resident=False).allowed
    if config.link_gbps is not None and crosses:
        link = config.link_gbps * 1e9
    return Rates(memory, link, _SSD)
