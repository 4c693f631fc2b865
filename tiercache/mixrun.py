"""Mixed mode while a model is attached: its blocks, how they choose, and what is recorded of it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from profiler import replay
from profiler.trace import Trace
from tiercache import mixing
from tiercache.config import OffloadConfig
from tiercache.kernels.contract import Kernels
from tiercache.mixing import Mixing
from tiercache.model.mixed import Choosing, MixedBlock
from tiercache.opening import Opened
from tiercache.plan import Plan
from tiercache.tiers.link import Link
from tiercache.tiers.neurons import NeuronSlots
from tiercache.tiers.slab import Slab
from tiercache.tiers.stack import TierStack


@dataclass(frozen=True)
class MixedRun:
    """See the module.

    Attributes:
        way: the recipe, and where it comes from.
        blocks: of the model, in order.
        choosing: what they share.
        slots: of single neurons, with an HBM tier.
        units: the units that hold neurons.
        low: planes below those that have slots.
    """

    way: Mixing
    blocks: tuple[MixedBlock, ...]
    choosing: Choosing
    slots: NeuronSlots | None
    units: frozenset[int]
    low: int

    @classmethod
    def start(
        cls,
        stack: ExitStack,
        way: Mixing,
        opened: Opened,
        made: Plan,
        tiers: TierStack,
        link: Link,
        config: OffloadConfig,
        kernels: Mapping[str, Kernels],
        device: torch.device,
    ) -> "MixedRun":
        """Fill the slots, if there are any; what undoes it goes on `stack`."""
        choosing = Choosing()
        choosing.stats.calibrated_kl = way.setting.kl if way.measured else None
        slots, low = None, opened.manifest.blocks[0].low
        if made.hbm is not None:
            slot_plan = way.slot_plan(opened.manifest, made.hbm.neuron_bytes)
            memory = Slab(slot_plan.nbytes, device)
            stack.callback(memory.close)
            caching = way.caching(config, slot_plan, low)
            choosing.stats.policy = caching.policy

            def below(layer: int, plane: int) -> torch.Tensor:
                block = opened.manifest.blocks[layer]
                rows = block.plane(tiers.staying(block.units[block.low + plane]), block.low + plane)
                return rows.view(block.neurons, -1)

            slots = NeuronSlots(slot_plan, memory.bytes, below, caching, kernels["cpu"], link, choosing.stats)
            slots.fill()
        blocks = mixing.blocks(way, opened, tiers.top, slots, kernels[device.type], choosing, device)
        units = frozenset(key for block in opened.manifest.blocks for key in block.units)
        return cls(way, tuple(blocks), choosing, slots, units, low)

    @property
    def read_bytes(self) -> int:
        """Bytes of neurons that a token's products read, ranking included."""
        return sum(block.recipe.read_bytes(block.planes.block.neurons, block.sizes) for block in self.blocks)

    @contextmanager
    def recording(self) -> Iterator[Trace]:
        """Record each token's wishes; at the end the statistics get Belady's bound for the same slots."""
        neurons = self.blocks[0].planes.block.neurons
        trace = Trace(neurons, [block.recipe.wanted(neurons)[self.low :] for block in self.blocks])
        token: list[np.ndarray] = []

        def note(block: int, order: np.ndarray) -> None:
            if block == 0:
                token.clear()
            token.append(order)
            if len(token) == len(self.blocks):
                trace.append(token)

        before, self.choosing.trace = self.choosing.trace, note
        try:
            yield trace
        finally:
            self.choosing.trace = before
        if self.slots is not None and trace.tokens:
            hot = self.way.calibration.frequency
            bound = replay.replay(trace, self.slots.plan.slots, replay.BOUND, hot=hot)
            self.choosing.stats.belady_hits = int(bound.hits.sum())
            self.choosing.stats.belady_requests = int(bound.requests.sum())
