"""What a model asks of memory: the order of its units, and every reserve. A pass on the meta device tells both.

Knows manifests and traces; decides nothing about where things go.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from math import prod

import torch

from policies.plan import PlanInputs
from tiercache.config.options import OffloadConfig
from tiercache.engine.card_memory import card_reserve
from tiercache.engine.source import Opened
from tiercache.errors import UnsupportedModelError
from tiercache.kernels.contract import MAX_TOKENS
from tiercache.kernels.cuda import down_launches
from tiercache.kernels.cuda.layer_calls import Heads
from tiercache.kernels.cuda.mma_launches import LEAST_CAPABILITY
from tiercache.kv.cache import cache_of
from tiercache.model import mixed, shortlist
from tiercache.model.binding import Use, needs_workspace, weight_of
from tiercache.model.card_attention import Capability
from tiercache.model.layer_parts import LayerParts, fusable
from tiercache.model.linear import is_down, scratch_bytes
from tiercache.model.trace import MetaTrace, trace_on_meta
from tiercache.quant.hadamard import RESTORING_BYTES
from tiercache.quant.planes import DECODE_SCRATCH_BYTES
from tiercache.store.manifest import Manifest, PlaneWeight, in_turn
from tiercache.tiers.device import on_gpu

_PACKED_BYTES = 32 << 20
# The C library's heap keeps blocks of up to this size when they are freed (glibc: DEFAULT_MMAP_THRESHOLD_MAX).
_HEAP_BLOCK_BYTES = 32 << 20
# Beside a product's own on a card: tiles of some 32 MiB (decoded for many tokens before capability 8.0, brought near
# of neurons across the link), the scratch of fused halves for up to 65 tokens, of which outgrown blocks stay (40 MiB of
# a 7B on a 3090), and what torch's segments of 20 MiB leave unused. Counted; with it an H100's peaks kept to budgets.
_CARD_BYTES = 96 << 20


@dataclass(frozen=True)
class MemoryRequirements:
    """What a model asks for.

    Attributes:
        uses: its linear modules, in the order of a pass; each block of rows by itself.
        needs: units and reserves, for the planner.
        workspace_bytes: memory for weights that are made from what lies in their slot.
        payload: each unit's own bytes, padding left out.
        matrices: of each matrix that is cut by plane, the units of its planes, lowest first.
        fused: of each layer whose attention half is one call of the kernels, the units of its halves that are.
    """

    uses: tuple[Use, ...]
    needs: PlanInputs
    workspace_bytes: int
    payload: dict[int, int]
    matrices: tuple[tuple[int, ...], ...] = ()
    fused: tuple[tuple[tuple[int, ...], ...], ...] = ()

    def staged(self, staging_bytes: int) -> "MemoryRequirements":
        """The same where reading files takes other bytes."""
        return replace(self, needs=replace(self.needs, dram={**self.needs.dram, "staging": staging_bytes}))


@dataclass(frozen=True)
class Arithmetic:
    """How matrices are multiplied, as far as memory is concerned.

    Attributes:
        device: where the model computes.
        kernels: by planes as they are; otherwise each weight is decoded first.
        on_cpu: the CPU multiplies, in DRAM, by what does not stay in the HBM tier.
        shortlist: the head reads few planes of all its rows, and all planes of the likeliest ones.
        fused: kernels run whole layers where they can, and hold all matrices of a half at once.
        capability: of the GPU, measured or told, which decides how attention is counted; None of the CPU.
    """

    device: torch.device
    kernels: bool
    on_cpu: bool = False
    shortlist: bool = False
    fused: bool = False
    capability: Capability | None = None

    @property
    def is_gpu(self) -> bool:
        """Whether the device has memory of its own."""
        return on_gpu(self.device)


def traced(opened: Opened, config: OffloadConfig, capability: Capability | None) -> MetaTrace:
    """Run one pass on the meta device: the order of modules, and what the KV cache and activations take.

    `capability` is the GPU's, see `Arithmetic`.

    Raises:
        UnsupportedModelError: modules that a pass never calls, or a forward that cannot run without data.
    """
    modules = tuple(opened.manifest.weights)
    cache = None if config.draft is None else cache_of(opened.meta_model, config.context)
    meta_trace = trace_on_meta(opened.meta_model, modules, config.context, config.logits, cache, capability)
    if unused := sorted(set(modules) - set(meta_trace.calls)):
        raise UnsupportedModelError(
            f"a pass never calls {unused[0]} ({len(unused)} such modules); use a plain language model"
        )
    return meta_trace


def memory_requirements(
    opened: Opened, config: OffloadConfig, arithmetic: Arithmetic, meta_trace: MetaTrace | None = None
) -> MemoryRequirements:
    """Add up what a model takes; `meta_trace` is `traced`'s, where a caller has it already.

    Raises:
        UnsupportedModelError: as `traced` says.
    """
    manifest = opened.manifest
    meta_trace = meta_trace or traced(opened, config, arithmetic.capability)
    called = (part for module in meta_trace.calls for part in in_turn(manifest.weights[module]))
    runs = [units for units, _ in groupby(part.units for part in called)]
    again = frozenset(key for units, count in Counter(runs).items() if count > 1 for key in units)
    order = tuple(dict.fromkeys(key for units in runs for key in units))
    cut = tuple(units for units in dict.fromkeys(runs) if len(units) > 1)
    planes = max(map(len, cut), default=0)
    fused = _fused(opened, arithmetic)
    kinds = 2 if config.resident else 1  # of passes whose halves are called: with all planes, and with those that stay
    graphs = kinds * sum(len(parts.halves) for parts in fused)
    workspace = _workspace(opened, arithmetic.kernels)
    payload = {key: unit.nbytes for key, unit in enumerate(manifest.units)}
    only_rows = tuple(key for block in manifest.blocks for key in dict.fromkeys(block.units[block.low :]))
    needs = PlanInputs(
        sizes={key: unit.slot_bytes for key, unit in enumerate(manifest.units)},
        names=[unit.name for unit in manifest.units],
        order=order,
        always=again,
        table=None if opened.table_unit in order else opened.table_unit,
        compute=_compute_reserve(opened, meta_trace, config, workspace, arithmetic)
        | (card_reserve(arithmetic.capability, graphs) if arithmetic.is_gpu else {}),
        dram=_dram_reserve(opened, config, arithmetic),
        only_rows=only_rows,
        neuron_bytes=sum(manifest.units[key].nbytes for key in only_rows),
        together=_held_at_once(opened, fused, cut),
        levels=tuple(frozenset(units[plane] for units in cut if plane < len(units)) for plane in range(planes)),
    )
    halves = tuple(_halves(opened, parts) for parts in fused)
    return MemoryRequirements(_uses(manifest, meta_trace), needs, workspace, payload, cut, halves)


def _fused(opened: Opened, arithmetic: Arithmetic) -> list[LayerParts]:
    """The layers that the kernels run as one piece, or the attention half of."""
    if not arithmetic.kernels or not arithmetic.fused:
        return []
    found = fusable(opened.meta_model, opened.manifest.weights)
    return [parts for parts in found if not arithmetic.is_gpu or Heads.fit(*parts.heads)]


def _halves(opened: Opened, parts: LayerParts) -> tuple[tuple[int, ...], ...]:
    """The units of each half of a layer."""
    weights = opened.manifest.weights
    return tuple(tuple(dict.fromkeys(key for module in half for key in weights[module].units)) for half in parts.halves)


def _held_at_once(
    opened: Opened, layers: Sequence[LayerParts], cut: tuple[tuple[int, ...], ...]
) -> tuple[tuple[int, ...], ...]:
    """The units of each half of a layer that is fused, and of each other matrix that is cut by plane."""
    halves = [half for parts in layers for half in _halves(opened, parts)]
    fused = {key for half in halves for key in half}
    return (*(half for half in halves if len(half) > 1), *(units for units in cut if fused.isdisjoint(units)))


def _uses(manifest: Manifest, meta_trace: MetaTrace) -> tuple[Use, ...]:
    last = {manifest.weights[module].unit: place for place, module in enumerate(meta_trace.calls)}
    uses: dict[str, tuple[Use, ...]] = {}
    for place, module in enumerate(meta_trace.calls):
        weight = manifest.weights[module]
        goes = last[weight.unit] == place
        uses[module] = tuple(Use(module, part, goes) for part in in_turn(weight))
    return tuple(use for each in uses.values() for use in each)


def _workspace(opened: Opened, kernels: bool) -> int:
    """The largest weight that must be made before a module can multiply by it."""
    return max(
        needs_workspace(weight, weight_of(opened.model.get_submodule(module)).dtype, kernels=kernels)
        for module, weight in opened.manifest.weights.items()
    )


def _compute_reserve(
    opened: Opened, meta_trace: MetaTrace, config: OffloadConfig, workspace: int, arithmetic: Arithmetic
) -> dict[str, int]:
    """Bytes beside the units where the model computes, by purpose."""
    # The allocator: measured, the C library's heap keeps about as much again as the tensors that come and go in a pass,
    # and in a product.
    if arithmetic.kernels:
        scratch = _product_scratch(opened, config, arithmetic)
        kept = _kept_bytes(scratch, arithmetic)
    else:
        scratch, kept = _decode_scratch(opened), _packed_bytes(opened)
    reserve = {
        "KV cache": meta_trace.kv_bytes,
        "activations": meta_trace.workspace_bytes,
        "workspace": workspace + scratch,
        "allocator": meta_trace.workspace_bytes + kept,
    }
    if opened.allocates_rest(arithmetic.device):
        own = dict(opened.meta_model.named_parameters())
        reserve["norms, biases, positions"] = sum(own[name].nbytes for name in opened.rest())
        reserve["embedding rows"] = opened.row_bytes * config.context
    return reserve


def _decode_scratch(opened: Opened) -> int:
    decoded = [prod(w.shape) for w in opened.manifest.weights.values() if isinstance(w, PlaneWeight)]
    return min(DECODE_SCRATCH_BYTES, RESTORING_BYTES * max(decoded, default=0))


def _product_scratch(opened: Opened, config: OffloadConfig, arithmetic: Arithmetic) -> int:
    """Of the greediest product; the head makes as many rows as logits may be asked for."""
    most, head = 0, opened.manifest.head
    for name, weight in opened.manifest.weights.items():
        tokens = min(config.logits, config.context) if weight is head else config.context
        parts = [part for part in in_turn(weight) if isinstance(part, PlaneWeight)]
        for part in parts:
            taken = scratch_bytes(opened.meta_model.get_submodule(name), part, tokens)
            if arithmetic.shortlist and weight is head:
                taken += shortlist.scratch_bytes(part, tokens)
            most = max(most, taken)
    for block in opened.manifest.blocks:
        rows = mixed.scratch_bytes(block.neurons, block.columns, block.parts - 1, config.context)
        most = max(most, rows)
    return most + (_card_scratch(opened, config, arithmetic) if arithmetic.is_gpu else 0)


def _card_scratch(opened: Opened, config: OffloadConfig, arithmetic: Arithmetic) -> int:
    """What a card's products take beside that.

    Matrix units leave sums of slices of a down matrix on their way, more of them where neurons lie across the link.
    """
    if arithmetic.capability is None or arithmetic.capability < LEAST_CAPABILITY:
        return _CARD_BYTES
    tokens = min(config.context, MAX_TOKENS)
    near = [
        down_launches.most_partial_bytes(weight.rows, weight.columns, weight.group, tokens, far=False)
        for name, weight in opened.manifest.weights.items()
        if isinstance(weight, PlaneWeight) and is_down(opened.meta_model.get_submodule(name), weight)
    ]
    far = [
        down_launches.most_partial_bytes(block.neurons, block.columns, block.group, tokens, far=True)
        for block in opened.manifest.blocks
    ]
    return max([*near, *far], default=0) + _CARD_BYTES


def _dram_reserve(opened: Opened, config: OffloadConfig, arithmetic: Arithmetic) -> dict[str, int]:
    """Bytes in main memory whatever computes."""
    reserve = {
        "staging": opened.staging_bytes(config.settings.read_threads),
        "embedding rows": opened.row_bytes * config.context,
    }
    if arithmetic.on_cpu and arithmetic.is_gpu:
        beside = replace(arithmetic, device=torch.device("cpu"))
        scratch = _product_scratch(opened, config, beside)
        reserve["products"] = scratch + _kept_bytes(scratch, beside)
    return reserve


def _kept_bytes(scratch: int, arithmetic: Arithmetic) -> int:
    """What the C library's heap keeps of a product's passing memory; a card's allocator is counted in its scratch."""
    return 0 if arithmetic.is_gpu else min(scratch, _HEAP_BLOCK_BYTES)


def _packed_bytes(opened: Opened) -> int:
    """What torch's matrix products hold beyond the tensors that are asked of them; products with planes hold nothing.

    Measured on the CPU: they pack blocks of the weights that they multiply by, up to some 30 MB in all for large ones.
    """
    units = opened.manifest.units
    cut = (sum(units[key].slot_bytes for key in weight.units) for weight in opened.manifest.weights.values())
    largest = max(*(unit.slot_bytes for unit in units), *cut)
    return min(2 * largest, _PACKED_BYTES)
