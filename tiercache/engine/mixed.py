"""Mixed mode while a model is attached: its blocks, how they choose, and what is recorded of it."""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from policies.eviction import BOUND
from policies.precision import PRECISION_NAMES
from policies.types import Key
from profiler import replay
from profiler.trace import Trace
from tiercache.config.sizes import human
from tiercache.engine import mixed_plan
from tiercache.engine.mixed_plan import MixedPlan
from tiercache.engine.placement import Placement
from tiercache.engine.run import Views
from tiercache.errors import UsageError
from tiercache.model import shortlist
from tiercache.model.choosing import Choosing, Kind, holding
from tiercache.model.mixed import MixedBlock
from tiercache.model.pass_hooks import NextPass
from tiercache.model.slotted_planes import Deltas
from tiercache.store.manifest import NeuronBlock, PlaneWeight
from tiercache.tiers.neurons import NeuronSlots
from tiercache.tiers.slab import Slab
from tiercache.tiers.stack import TierStack


@dataclass(frozen=True)
class MixedRun:
    """See the module.

    Attributes:
        plan: the recipe, and where it comes from.
        blocks: of the model, in order.
        choosing: what they share.
        slots: of single neurons, with an HBM tier.
        part_units: of neurons and of the head, of which a token reads a part.
        low: planes below those that have slots, or would have them with an HBM tier: what ranking reads.
        precision: of everything that is no neuron.
        capped: neurons without a slot may have to do with the planes at hand.
        head: the language-model head's planes, if it has some.
        next_pass: of the hooks, which know of no mixed passes: never resident there.
        views, resident_bytes, cpu_tokens: see `engine.run.ExactRun`; a resident pass counts as a mixed one, and neurons
            are multiplied where they lie whatever the tokens.
    """

    plan: MixedPlan
    blocks: tuple[MixedBlock, ...]
    choosing: Choosing
    slots: NeuronSlots | None
    part_units: frozenset[Key]
    low: int
    precision: str
    capped: bool
    head: PlaneWeight | None
    next_pass: NextPass = field(default_factory=NextPass)
    views: Views = field(default_factory=dict)
    resident_bytes: int = 0
    cpu_tokens: int = 0

    @classmethod
    def start(
        cls, plan: MixedPlan, placed: Placement, tiers: TierStack, stack: ExitStack, *, on_cpu: bool
    ) -> "MixedRun":
        """Make the blocks and fill their slots, if there are any; `stack` closes what is opened here.

        With `on_cpu` the CPU multiplies, in DRAM, what has no slot; a token then brings up only as many neurons as
        renew the slots.
        """
        config, opened, slotted = placed.config, placed.opened, placed.plan.has_hbm
        choosing = Choosing(in_order=config.max_fetches is not None)
        capped = slotted and config.max_fetches is not None and not on_cpu
        known = plan.measured and not capped and not math.isnan(plan.setting.kl)
        if known and plan.calibration.meta.get("precision") == config.precision:
            choosing.stats.calibrated_kl = plan.setting.kl
        slots = _filled_slots(plan, placed, tiers, stack, choosing, on_cpu=on_cpu) if slotted else None
        deltas = [_deltas(tiers, block) for block in opened.manifest.blocks] if on_cpu else None
        kernels, device = placed.machine.kernels, placed.machine.device
        blocks = mixed_plan.blocks(plan, opened, tiers.top, slots, kernels, choosing, device, deltas)
        units = frozenset(key for block in opened.manifest.blocks for key in block.units)
        head = opened.manifest.head if isinstance(opened.manifest.head, PlaneWeight) else None
        if head is not None:
            units |= {head.unit}
        return cls(plan, tuple(blocks), choosing, slots, units, plan.setting.rank, config.precision, capped, head)

    def pass_bytes(self) -> dict[str, int]:
        """What a token needs."""
        return {"needed": self.needed_bytes}

    def passes(self, kind: Kind) -> AbstractContextManager[None]:
        """Passes within run as `kind`."""
        if kind == "exact" and not self.plan.whole:
            raise UsageError(
                "planes of some layers did not fit and were left out, so no pass can be exact; raise dram=, or open "
                "the model with mode='exact'"
            )
        return self.choosing.passes(kind)

    @property
    def notice(self) -> str:
        """What a person is told before the first token."""
        return self.loss_line

    @property
    def loss_line(self) -> str:
        """What a lossy run says first: what it reads, and what that lost on the calibration text."""
        setting, meta = self.plan.setting, self.plan.calibration.meta
        read = human(self.read_bytes)
        if math.isnan(setting.kl):
            return f"mixed mode is lossy: a token reads {read} of the neurons; nobody measured what that loses"
        how = f"{setting.share:.0%} of int8's bytes, ranked by {PRECISION_NAMES[setting.rank]}"
        lost = f"KL {setting.kl:.2g} nats a token from int8, perplexity {setting.perplexity:.4g} for "
        lost += f"{setting.exact_perplexity:.4g}, the same likeliest token {setting.top1:.1%} of the time"
        rest = meta["precision"]
        if rest != self.precision:
            lost = f"{lost}, measured with {rest} for what is no neuron, where this run has {self.precision}"
        if not self.plan.measured:
            lost = f"at least {lost}: planes of some layers do not fit and are left out, which no calibration measured"
        elif not self.plan.whole:
            lost += "; planes of some layers do not fit and are left out, so prompts are not read exactly"
        if self.capped:
            lost = f"at least {lost}: fetches are capped, and neurons beyond do with the planes at hand"
        if self.slots is not None and self.slots.plan.empty:
            lost += "; hbm= leaves no slot for neurons, so each is brought up anew for every token: raise it"
        text = meta["text"]["name"]
        return f"mixed mode is lossy: a token reads {read} of the neurons ({how}); on {text} that lost {lost}"

    @property
    def read_bytes(self) -> int:
        """Bytes of neurons that a token's products read, ranking included."""
        return sum(block.recipe.read_bytes(block.planes.block.neurons, block.sizes) for block in self.blocks)

    @property
    def needed_bytes(self) -> int:
        """What a token reads of the blocks, factors of inputs and outputs included, and of the head."""
        blocks = self.read_bytes + sum(block.planes.block.factor_bytes for block in self.blocks)
        return blocks + (0 if self.head is None else shortlist.read_bytes(self.head))

    def replay(self, trace: Trace) -> list[replay.PolicyRow]:
        """What every policy would have done with a recorded trace in these slots, from the start that this run had.

        Raises:
            UsageError: there are no slots.
        """
        if self.slots is None or self.slots.plan.empty:
            raise UsageError("without slots in an HBM tier there is nothing to replay; raise hbm=")
        slot_plan, hot = self.slots.plan, self.plan.calibration.frequency
        return replay.compare(trace, slot_plan.slots, self.slots.max_fetches, slot_plan.widths, hot=hot)

    @contextmanager
    def recording(self) -> Iterator[Trace]:
        """Record each token's wishes; at the end the statistics get Belady's bound for the same slots."""
        neurons = self.blocks[0].planes.block.neurons
        trace = Trace(neurons, [block.recipe.wanted(neurons)[self.low :] for block in self.blocks])
        with holding(self.choosing, "trace", _Rows(trace)):
            yield trace
        if self.slots is not None and trace.tokens:
            hot = self.plan.calibration.frequency
            bound = replay.replay(trace, self.slots.plan.slots, BOUND, hot=hot)
            self.choosing.stats.belady_hits = int(bound.hits.sum())
            self.choosing.stats.belady_requests = int(bound.requests.sum())


def _filled_slots(
    plan: MixedPlan, placed: Placement, tiers: TierStack, stack: ExitStack, choosing: Choosing, *, on_cpu: bool
) -> NeuronSlots:
    """Slots for single neurons' planes in the HBM tier, with those that are there from the start."""
    manifest, machine = placed.opened.manifest, placed.machine
    slot_plan = plan.slot_plan(manifest, placed.plan.fastest.neuron_bytes)
    memory = Slab(slot_plan.nbytes, machine.device)
    stack.callback(memory.close)
    caching = plan.caching(placed.config, slot_plan, plan.setting.rank, on_cpu=on_cpu)
    choosing.stats.policy = caching.policy

    def rows(layer: int, plane: int) -> torch.Tensor:
        block = manifest.blocks[layer]
        return _above(tiers, block, block.low + plane).view(block.neurons, -1)

    slots = NeuronSlots(slot_plan, memory.bytes, rows, caching, machine.kernels["cpu"], tiers.link, choosing.stats)
    stack.callback(slots.close)
    slots.fill()
    return slots


class _Rows:
    """Puts a pass's choices into a trace: they come block by block, and within a block token by token."""

    def __init__(self, trace: Trace) -> None:
        self._trace, self._at = trace, 0
        self._rows: list[list[np.ndarray]] = [[] for _ in range(trace.layers)]

    def __call__(self, block: int, order: np.ndarray) -> None:
        """One token's choice of one block; of a pass that is cut off nothing is kept."""
        if block < self._at:
            self._clear()
        self._at = block
        self._rows[block].append(order)
        if len(self._rows[-1]) == len(self._rows[0]):
            for token in zip(*self._rows, strict=True):
                self._trace.append(token)
            self._clear()

    def _clear(self) -> None:
        for row in self._rows:
            row.clear()


def _above(tiers: TierStack, block: NeuronBlock, plane: int) -> torch.Tensor:
    """A plane that stays in DRAM: [neurons, parts, bytes of a row]."""
    return block.plane(tiers.staying(block.units[plane]), plane)


def _deltas(tiers: TierStack, block: NeuronBlock) -> Deltas | None:
    """What the planes of a block in DRAM add to those that are in HBM."""
    if block.low == len(block.units):
        return None
    scales = block.scales(tiers.top.acquire(block.units[0]))
    try:
        return Deltas(block, scales, [_above(tiers, block, plane) for plane in range(block.low, len(block.units))])
    finally:
        tiers.top.release(block.units[0])
