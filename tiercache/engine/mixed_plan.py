"""Mixed mode's part of opening a model: which recipe, which planes of which block, how many slots, who stays in them.

Knows the calibration, the store's blocks and the budgets; moves nothing and multiplies nothing.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import transformers

from policies import precision
from policies.precision import TOP, Recipe, Sizes
from profiler import replay
from profiler.trace import Trace
from tiercache.compat import ACT2FN
from tiercache.config.options import OffloadConfig
from tiercache.engine.source import Opened
from tiercache.errors import UnsupportedModelError, UsageError
from tiercache.kernels.contract import Kernels
from tiercache.model.block_planes import BlockPlanes, DirectPlanes
from tiercache.model.choosing import Choosing
from tiercache.model.importance import Activation
from tiercache.model.mixed import MixedBlock
from tiercache.model.slotted_planes import Deltas, SlottedPlanes
from tiercache.quant.planes import plane_widths, scale_row_bytes
from tiercache.store.calibration import Calibration, Setting
from tiercache.store.catalog import UnitRecord
from tiercache.store.manifest import Manifest
from tiercache.store.planestore import PlaneStore
from tiercache.tiers.neurons import NEURONS_PER_SUM, Caching, NeuronSlots, SlotPlan
from tiercache.tiers.tier import SlotSource

_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation")
_RENEWED = 64  # one in so many neurons
_PASSING_ROWS = NEURONS_PER_SUM  # chunks of whole slices change no bit of a dense pass on a CPU


@dataclass(frozen=True)
class MixedPlan:
    """A way to run a store's neurons.

    Attributes:
        calibration: what is known of them.
        setting: the measured way that was chosen.
        tops: up to how many planes of each block are ever brought.
    """

    calibration: Calibration
    setting: Setting
    tops: tuple[int, ...]

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """Of each block, with what it has."""
        return tuple(recipe.capped(top) for recipe, top in zip(self.setting.recipes, self.tops, strict=True))

    @property
    def measured(self) -> bool:
        """Whether calibration measured just this: no block lacks planes that its recipe wants."""
        return self.recipes == self.setting.recipes

    @property
    def whole(self) -> bool:
        """Whether every plane of every block is there, so that dense passes are exact."""
        return all(top == TOP for top in self.tops)

    def manifest(self, store: PlaneStore, level: str, *, slotted: bool) -> Manifest:
        """The store's parts; `slotted`: planes above the ranking's are units of their own, for slots."""
        ranks = [min(recipe.rank, top) if slotted else top for recipe, top in zip(self.recipes, self.tops, strict=True)]
        return store.manifest(level, list(zip(ranks, self.tops, strict=True)))

    def _wanted(self, manifest: Manifest) -> list[tuple[int, ...]]:
        """Of each block, how many neurons a token wants in each plane that may have slots."""
        low, blocks = manifest.blocks[0].low, manifest.blocks
        return [recipe.wanted(block.neurons)[low:] for block, recipe in zip(blocks, self.recipes, strict=True)]

    def passing(self, manifest: Manifest) -> tuple[int, ...]:
        """Rows of each slotted plane that one token of any block may need at once."""
        least = min(manifest.blocks[0].neurons, _PASSING_ROWS)
        return tuple(max(least, *counts) for counts in zip(*self._wanted(manifest), strict=True))

    def passing_bytes(self, manifest: Manifest) -> int:
        """Memory for `passing`, and for the down rows that the first tokens of a short pass hold from the others."""
        first = manifest.blocks[0]
        widths = plane_widths(first.columns, first.group)[first.low :]
        most = map(max, zip(*self._wanted(manifest), strict=True))
        held: int = sum(count * width for count, width in zip(most, widths, strict=True))
        return self.slot_plan(manifest, 0).nbytes + (Choosing().few - 1) * held

    def share_bytes(self, store: PlaneStore) -> int:
        """What whole layers may bring of the neurons: the share of int8's bytes that was chosen."""
        return int(self.setting.share * neurons_bytes(store))

    def slot_plan(self, manifest: Manifest, budget_bytes: int) -> SlotPlan:
        """Slots of every block within a budget."""
        first = manifest.blocks[0]
        widths = tuple(first.parts * width for width in plane_widths(first.columns, first.group)[first.low :])
        wanted = [
            [count if first.low + plane < len(block.units) else 0 for plane, count in enumerate(counts)]
            for block, counts in zip(manifest.blocks, self._wanted(manifest), strict=True)
        ]
        slots = precision.share_slots(wanted, widths, first.neurons, budget_bytes)
        return SlotPlan(tuple(map(tuple, slots)), self.passing(manifest), widths, first.neurons)

    def caching(self, config: OffloadConfig, plan: SlotPlan, low: int, *, on_cpu: bool) -> Caching:
        """Who stays in the slots: as asked for, or whoever would have missed least on the calibration's trace."""
        policy, max_fetches = config.policy, config.max_fetches
        if on_cpu and max_fetches is None:  # the CPU is the cheaper one: copies only renew the slots
            max_fetches = max(1, plan.neurons // _RENEWED)
        if policy == "auto":
            rows = self.replayed(plan, low, max_fetches)
            policy = replay.best(rows) if rows else "lfru"
        return Caching(policy, max_fetches, on_cpu, self.calibration.frequency)

    def replayed(self, plan: SlotPlan, low: int, max_fetches: int | None) -> list[replay.PolicyRow]:
        """Every policy on the calibration's trace of this setting; nothing where it kept none, or planes are capped."""
        trace = self.trace(low)
        if trace is None or plan.empty:
            return []
        return replay.compare(trace, plan.slots, max_fetches, plan.widths, hot=self.calibration.frequency)

    def trace(self, low: int) -> Trace | None:
        """The calibration's recorded wishes under this setting, of the planes from `low` on."""
        place = self.calibration.settings.index(self.setting)
        rows = [self.calibration.arrays.get(f"trace/{place}/{block}") for block in range(len(self.tops))]
        neurons = self.calibration.norms.shape[1]
        if not self.measured or any(row is None for row in rows):
            return None
        counts = [recipe.wanted(neurons)[low:] for recipe in self.recipes]
        return Trace(neurons, counts, [row for row in rows if row is not None])


def plans_within(calibration: Calibration, opened: Opened, config: OffloadConfig) -> Iterator[MixedPlan]:
    """Ways that are within what was asked for, best first: each ranks with fewer planes than the one before.

    Raises:
        UsageError: none is.
    """
    assert opened.store is not None
    asked, share = config.bytes_per_token, None
    if asked is not None:
        whole = neurons_bytes(opened.store)
        share = asked.fraction or asked.resolve(total_bytes=whole, free_bytes=whole) / whole
    rest = calibration.meta.get("precision", config.precision)
    if config.max_loss is not None and rest != config.precision:
        raise UsageError(
            f"max_loss= holds for what calibration measured: precision={rest!r} for what is no neuron; ask for it, or "
            f"calibrate with --precision {config.precision}"
        )
    before: Setting | None = None
    for most in range(TOP, 0, -1):
        try:
            setting = calibration.choose(share=share, max_loss=config.max_loss, ranks=range(most + 1))
        except UsageError:
            if before is None:
                raise
            return
        if setting != before:
            yield MixedPlan(calibration, setting, (TOP,) * len(setting.recipes))
        before = setting


def capped(mixing: MixedPlan, store: PlaneStore, limit_bytes: int, *, slotted: bool) -> MixedPlan:
    """`mixing` without the planes that whole layers may not bring within `limit_bytes`, the least missed left out.

    With slots every block keeps the ranking's planes: they lie in HBM, and slots begin above them in all blocks alike.
    """
    sizes = [
        [block.rows * sizes_of(block, store).neuron(level) for level in range(1, TOP + 1)] for block in store.blocks()
    ]
    least = mixing.setting.rank - 1 if slotted else 0
    tops = precision.divide(mixing.calibration.losses.tolist(), sizes, limit_bytes, start=least)
    return replace(mixing, tops=tuple(top + 1 for top in tops))


def neurons_bytes(store: PlaneStore) -> int:
    """Bytes of all neurons at int8."""
    return sum(precision.exact_bytes(block.rows, sizes_of(block, store)) for block in store.blocks())


def sizes_of(record: UnitRecord, store: PlaneStore) -> Sizes:
    """Bytes of a row of a block, by plane."""
    group: int = store.contents.meta["group"]
    return Sizes(plane_widths(record.columns, group), scale_row_bytes(record.columns, group), record.parts - 1)


def refuse_unfit(opened: Opened) -> None:
    """Raise for a model that has no store, or whose blocks mixed mode cannot serve."""
    if opened.store is None:
        raise UsageError("mode='mixed' runs from a plane store; give precision='int8' or 'int4'")
    blocks = opened.store.blocks()
    if not blocks or len({(block.rows, block.columns) for block in blocks}) > 1:
        raise UnsupportedModelError(
            f"{opened.model.config.model_type} has no feed-forward blocks of one size, which mixed mode needs; use "
            "mode='exact'"
        )
    activation_of(opened.model)


def activation_of(model: transformers.PreTrainedModel) -> Activation:
    """What the model's feed-forward blocks do between their matrices.

    Raises:
        UnsupportedModelError: its configuration does not say.
    """
    text = model.config.get_text_config()
    for name in _ACTIVATIONS:
        found = getattr(text, name, None)
        if isinstance(found, str) and found in ACT2FN:
            made: Activation = ACT2FN[found]
            return made
    raise UnsupportedModelError(
        f"the configuration of {model.config.model_type} names no activation that is known; use mode='exact'"
    )


def blocks(
    mixing: MixedPlan,
    opened: Opened,
    supply: SlotSource,
    slots: NeuronSlots | None,
    kernels: Mapping[str, Kernels],
    choosing: Choosing,
    device: torch.device,
    deltas: Sequence[Deltas | None] | None = None,
) -> list[MixedBlock]:
    """The runtime of every block of `opened.manifest`."""
    activation = activation_of(opened.model)
    parts = zip(opened.manifest.blocks, mixing.recipes, mixing.calibration.norms, strict=True)
    made = []
    for place, (block, recipe, norms) in enumerate(parts):
        planes: BlockPlanes = DirectPlanes(block, supply, device)
        if slots is not None:
            planes = SlottedPlanes(block, supply, slots, device, None if deltas is None else deltas[place])
        modules = [opened.model.get_submodule(name) for name in (*(name for name, _ in block.inward), block.outward)]
        weights = torch.from_numpy(norms).to(device)
        made.append(MixedBlock(planes, modules, activation, kernels, choosing, recipe, weights))
    return made
