"""The tiers of one model, built as a plan says and stacked: SSD reader, DRAM, HBM.

Knows units and plans; not modules. With an HBM tier, units are handed out from there, else from DRAM.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import prod

import torch

from policies.plan import Plan, TierPlan
from policies.residency import Residency
from policies.types import Key, UnitPlacement
from tiercache.progress import bar
from tiercache.stats.run import TierStats
from tiercache.store.manifest import Manifest, PlainWeight
from tiercache.store.reader import Reader
from tiercache.tiers.arrivals import Pending
from tiercache.tiers.device import device_of
from tiercache.tiers.link import Link
from tiercache.tiers.slab import Slab
from tiercache.tiers.tier import Cause, Fill, Supply, Tier, waited_for_ssd
from tiercache.tiers.transfer import CopyTicket, Span, Transfer

Observer = Callable[[str, str, Key], None]


class CallersTier(Supply):
    """Stands for the DRAM tier of a model in memory: its units are the caller's parameters, which stay."""

    def __init__(self, slots: Sequence[torch.Tensor], stats: TierStats) -> None:
        self._slots, self.stats = slots, stats
        stats.capacity_bytes = stats.peak_bytes = sum(slot.nbytes for slot in slots)

    def acquire(self, key: Key) -> torch.Tensor:
        self.hit((key,))
        return self._slots[key]

    def release(self, key: Key) -> None:
        pass

    def pinned_slot(self, key: Key) -> torch.Tensor:
        return self._slots[key]

    def hit(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self.stats.hits += 1
            self.stats.hit_bytes += self._slots[key].nbytes


class TierChoice(Supply):
    """Hands out units from the upper tier, or from the lower one in passes that multiply them there.

    Args:
        upper: the tier whose pinned units are always taken from it.
        lower: where the others lie.
    """

    def __init__(self, upper: Tier, lower: Tier | CallersTier) -> None:
        self._upper, self._lower = upper, lower
        self._on_cpu = False

    def begin(self, *, on_cpu: bool) -> None:
        """A pass begins; `on_cpu`: the CPU multiplies, in DRAM, the units that do not stay in HBM."""
        self._upper.release_all()
        if self._on_cpu and isinstance(self._lower, Tier):
            self._lower.release_all()
        if on_cpu:  # in this order: after Ctrl-C anywhere in it no pass uses the lower tier beside the copies
            self._upper.pause()
            self._on_cpu = True
        else:
            self._on_cpu = False
            self._upper.resume()

    def acquire(self, key: Key) -> torch.Tensor:
        if not self._on_cpu or self._upper.pinned_slot(key) is not None:
            return self._upper.acquire(key)
        self._upper.count(key, hit=False)
        return self._lower.acquire(key)

    def release(self, key: Key) -> None:
        above = not self._on_cpu or self._upper.pinned_slot(key) is not None
        (self._upper if above else self._lower).release(key)

    def pinned_slot(self, key: Key) -> torch.Tensor | None:
        return self._upper.pinned_slot(key)

    def hit(self, keys: Iterable[Key]) -> None:
        self._upper.hit(keys)


class TierStack:
    """See the module.

    Args:
        plan: what goes where.
        manifest: the units.
        reader: of the SSD tier.
        device: where the HBM tier lies; the CPU stands in for a GPU with a region of host memory.
        memory: parameters of a model in memory, which then replace SSD and DRAM.
        link: what copies to the HBM tier cross; the machine's own by default.
        observe: is told (tier, event, key) of every decision.
    """

    def __init__(
        self,
        plan: Plan,
        manifest: Manifest,
        reader: Reader,
        device: torch.device,
        memory: Sequence[torch.Tensor] | None,
        observe: Observer,
        link: Link | None = None,
    ) -> None:
        self._units, self._reader, self._plan = manifest.units, reader, plan
        self._payload = {key: unit.nbytes for key, unit in enumerate(manifest.units)}
        self._sizes = {key: unit.slot_bytes for key, unit in enumerate(manifest.units)}
        self._observe, self.link = observe, link or Link()
        self._device = device_of(device)
        self._stream = self._device.follow(None)
        self.stats: dict[str, TierStats] = {}
        self.plain, self._spans = _layout(manifest, device, memory is not None, not plan.has_hbm)
        with ExitStack() as stack:
            self._dram = self._make_dram(plan, device) if memory is None else None
            lower = self._dram if memory is None else CallersTier(memory, TierStats())
            assert lower is not None
            if self._dram is not None:
                stack.callback(self._dram.close)
            self.top: Tier | CallersTier | TierChoice = lower
            self._hbm = None
            if plan.hbm is not None:
                transfer = Transfer(lower, self._spans, device, self.link)
                stack.callback(transfer.close)
                slab = Slab(plan.hbm.slab_bytes, device)
                self._hbm = self._make_tier("hbm", plan.hbm, slab, transfer.fill, _copied, transfer.settle)
                stack.callback(self._hbm.close)
                self.top = TierChoice(self._hbm, lower)
            self.stats["dram"] = lower.stats
            self._closing = stack.pop_all()

    def follow_stream(self) -> None:
        """A pass begins, maybe on another stream than the one before: it comes after what that one has queued."""
        self._stream = self._device.follow(self._stream)

    def begin(self, *, on_cpu: bool) -> None:
        """A pass begins; `on_cpu`: the CPU multiplies, in DRAM, the units that do not stay in HBM."""
        if isinstance(self.top, TierChoice):
            self.top.begin(on_cpu=on_cpu)
        elif isinstance(self.top, Tier):
            self.top.release_all()

    def load(self, *, show_progress: bool | None) -> None:
        """Load every unit that stays."""
        tiers = (self._plan.hbm, self._plan.dram if self._dram else None)
        total = sum(self._payload[key] for tier in tiers if tier for key in tier.placement.pinned)
        with bar("loading", total, show=show_progress) as advance:
            if self._hbm is not None:
                self._hbm.load_pinned(advance)
            if self._dram is not None:
                if self._hbm is not None:
                    self._dram.decide(Residency(self._plan.dram.order, self._sizes, self._plan.dram.placement))
                self._dram.load_pinned(advance)

    def resident(self, key: Key) -> torch.Tensor:
        """The slot in the fastest tier of a unit that stays there."""
        tier = self._dram if self._hbm is None else self._hbm
        slot = None if tier is None else tier.pinned_slot(key)
        assert slot is not None
        return slot

    def staying(self, key: Key) -> torch.Tensor:
        """The slot in DRAM of a unit that stays there."""
        slot = None if self._dram is None else self._dram.pinned_slot(key)
        assert slot is not None
        return slot

    def table(self, weight: PlainWeight) -> torch.Tensor | None:
        """The token embedding, where it stays in a tier."""
        for tier in (self._hbm, self._dram):
            slot = tier.pinned_slot(weight.unit) if tier is not None else None
            if slot is not None:
                return (replace(weight, at=0) if device_of(slot.device).wants_aligned else weight).view(slot)
        return None

    def close(self) -> None:
        """Stop copies, wait for reads and free the memory; harmless when done twice."""
        self._closing.close()

    def _make_dram(self, plan: Plan, device: torch.device) -> Tier:
        """While HBM is being filled, all of DRAM is a ring that its units pass through."""
        slab = Slab(plan.dram.slab_bytes, torch.device("cpu"), pinned_for=device)
        tier = self._make_tier("dram", plan.dram, slab, self._read, waited_for_ssd)
        if plan.hbm is not None:
            passing = UnitPlacement((), 0, plan.dram.slab_bytes)
            tier.decide(Residency(plan.hbm.placement.pinned, self._sizes, passing, once=True))
        return tier

    def _make_tier(
        self,
        name: str,
        plan: TierPlan,
        slab: Slab,
        fill: Fill,
        cause: Cause,
        settle: Callable[[], None] = lambda: None,
    ) -> Tier:
        reserved = dict(plan.reserved_bytes)
        if plan.neuron_bytes:
            reserved["neuron slots"] = plan.neuron_bytes
        stats = TierStats(plan.capacity_bytes, reserved)
        stats.peak_bytes = sum(reserved.values())
        self.stats[name] = stats
        residency, observe = Residency(plan.order, self._sizes, plan.placement), partial(self._observe, name)
        return Tier(slab, residency, self._payload, fill, stats, cause=cause, observe=observe, settle=settle)

    def _read(self, key: Key, slot: torch.Tensor, after: object) -> Pending:
        return self._reader.read(self._units[key].pieces, slot.numpy())


def _copied(pending: Pending, begin: float) -> Mapping[str, float]:
    """What a wait in the HBM tier was for."""
    assert isinstance(pending, CopyTicket)
    return pending.causes(begin)


def _layout(
    manifest: Manifest, device: torch.device, in_memory: bool, in_place: bool
) -> tuple[dict[str, PlainWeight], dict[Key, list[Span]]]:
    """How plain weights lie in the uppermost tier, by module, and which bytes of each unit move there.

    On the host a tensor keeps its place within a block (see `store.format.unit_of`). On a GPU a plain tensor starts
    its slot, since the matrix kernels of a GPU want alignment. Parameters in memory that are multiplied there start
    their slot.
    """
    weights: dict[str, PlainWeight] = {}
    spans: dict[Key, list[Span]] = {}
    for key, unit in enumerate(manifest.units):
        spans[key] = [Span(piece.at, piece.at, piece.nbytes) for piece in unit.pieces]
    plain = {**manifest.weights, "": manifest.embedding[1]}  # an untied embedding is a unit of its own
    for module, weight in plain.items():
        if not isinstance(weight, PlainWeight):
            continue
        at = 0 if device_of(device).wants_aligned or (in_memory and in_place) else weight.at
        source = 0 if in_memory else weight.at
        spans[weight.unit] = [Span(source, at, weight.dtype.itemsize * prod(weight.shape))]
        if module:
            weights[module] = replace(weight, at=at)
    return weights, spans
