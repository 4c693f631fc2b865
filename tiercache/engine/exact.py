"""Where the weights of an exact run lie: plain decoding's placement or drafting's, compared before any is reserved.

Knows memory requirements, plans and drafters; allocates nothing. Which placement is better is `policies.room`'s to say.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

from policies import room
from policies.room import Rates, Traffic
from tiercache.config.drafting import DraftConfig
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import human
from tiercache.engine import drafting
from tiercache.engine.budgets import Budgets, fitted
from tiercache.engine.drafting import DrafterSpec
from tiercache.engine.machine import Machine
from tiercache.engine.memory import Arithmetic, memory_requirements
from tiercache.engine.on_cpu import OnCpu
from tiercache.engine.placement import Placement
from tiercache.engine.run import ExactRun, ResidentRun
from tiercache.engine.source import Opened
from tiercache.errors import DoesNotFitError, UsageError
from tiercache.kv.cache import Support, support
from tiercache.progress import note
from tiercache.tiers.stack import TierStack

# Bytes a second where nobody measured them; of the machines that this is for, and only their proportions matter.
_DRAM, _CARD, _LINK, _SSD = 35e9, 900e9, 25e9, 3e9


@dataclass(frozen=True)
class ExactPlacement(Placement):
    """A placement of an exact run.

    Attributes:
        drafter_spec: which drafters; None where no drafter was asked for.
        room_price: see `policies.room.price`; None where nothing was compared.
    """

    drafter_spec: DrafterSpec | None
    room_price: float | None = None

    @property
    def traffic(self) -> Traffic:
        """What a pass moves."""
        payload = self.asked.payload
        moved = (self.asked.needs.order, self.plan.copied, self.plan.streamed)
        return Traffic(*(sum(payload[key] for key in keys) for keys in moved))

    def start(self, tiers: TierStack, stack: ExitStack, *, show_progress: bool | None) -> ExactRun:
        """Fill the tiers, and say how passes go."""
        tokens = self.measure_cpu_tokens(self.config.precision) if self.plan.copied else 0
        tiers.load(show_progress=show_progress)
        return ResidentRun(tokens, self.asked, self.plan) if self.config.resident else ExactRun(tokens)


def place(opened: Opened, config: OffloadConfig, machine: Machine, *, show: bool) -> ExactPlacement:
    """The placement of an exact run; "auto" takes the one in which it is likely to be faster, and says which.

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

    def planned(options: OffloadConfig) -> ExactPlacement:
        own = opened.cut_by_plane(config.precision) if options.resident else opened
        drafter_spec = drafting.find_drafters(options, own)
        arithmetic = Arithmetic(machine.device, kernels=bool(machine.kernels), on_cpu=on_cpu.allowed)
        asked = memory_requirements(own, drafting.widened(options), arithmetic)
        asked = drafting.reserve(asked, drafter_spec, options)
        return ExactPlacement(options, machine, own, asked, budgets.divide(own, asked), on_cpu, drafter_spec)

    if config.draft is None or config.draft.drafter != "auto":
        return planned(config)
    rates = _rates(config, machine, on_cpu)
    return _compared(config, config.draft, planned, support(opened.meta_model), rates, show)


def _compared(
    config: OffloadConfig,
    draft: DraftConfig,
    planned: Callable[[OffloadConfig], ExactPlacement],
    takes: Support,
    rates: Rates,
    show: bool,
) -> ExactPlacement:
    """The first of three that is likely to pay: with the model's own planes and n-grams, these alone, or nobody."""
    plain, price, reason = fitted(partial(planned, replace(config, resident=False, draft=None))), None, takes.reason
    wanted = draft.fixed or draft.speckv is not None  # a drafter, at any price
    own_planes = [True, False] if config.resident else [False]
    for own in own_planes if takes.takes != "nothing" else ():
        found = fitted(partial(planned, replace(config, resident=own)))
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


def _rates(config: OffloadConfig, machine: Machine, on_cpu: OnCpu) -> Rates:
    """A region of main memory that stands in for a card is as fast as its link, unless that is throttled.

    Where the CPU stands in for a card it multiplies in DRAM what does not stay in that region, unless cpu_tokens=0: a
    pass of one token then waits for no link.
    """
    memory, link = (_CARD, _LINK) if machine.is_gpu else (_DRAM, _DRAM)
    if config.link_gbps is not None and (machine.is_gpu or not on_cpu.allowed):
        link = config.link_gbps * 1e9
    return Rates(memory, link, _SSD)
