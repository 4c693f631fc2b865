"""Gives modules their weights for the length of one call, and takes everything back at the end.

A module keeps its class. A pre-hook acquires the units of its weight and points the parameter at their slots. A
post-hook, which also runs after an exception, points the parameter away again. Ctrl-C runs no hooks; then
`release_all` does it. Between calls the parameter is one NaN, expanded to the weight's shape: it takes no memory, has
the right dtype and device, and whatever reads it by mistake gets NaN and not a plausible number.

Where there are kernels for planes, no weight is made of them: the module gets a `forward` that multiplies by planes
(`model.linear`).

Slots that stay are looked up once. A resident pass acquires nothing: each module multiplies by the planes whose slots
it was told.

Knows modules and slots; not where slots come from.
"""

from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from tiercache.kernels.contract import Kernels
from tiercache.model.choosing import Choosing
from tiercache.model.fused_layer import FusedLayer, Fusing
from tiercache.model.head import RowBlocksForward, folding
from tiercache.model.layer_parts import fusable
from tiercache.model.linear import Inputs, PlaneForward, partners
from tiercache.model.meta_model import layer_of
from tiercache.model.shortlist import ShortlistForward
from tiercache.store.manifest import NeuronWeight, PlainWeight, PlaneWeight, RowBlocks, Weight
from tiercache.tiers.tier import Supply

_NOTHING = object()  # where a module had no value of its own


@dataclass(frozen=True)
class Use:
    """A module's call within a pass.

    Attributes:
        module: its name.
        weight: what it multiplies by.
        last: the weight's units are not needed again after it.
        resident: slots of the first planes, which stay, for resident passes; empty where there are no such passes.
    """

    module: str
    weight: Weight
    last: bool
    resident: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Bindings:
    """What the linear modules of one model multiply by, who supplies it and who multiplies.

    Attributes:
        uses: what each module multiplies by; several in a row for one module are blocks of its rows.
        supply: where units come from.
        workspace: uint8 memory for weights that must be made from what lies in the slot.
        kernels: multiply by planes as they are, by the kind of device that a slot is on; none make weights of them.
        fusing: whole layers are run by the kernels where they can be; None: module by module.
        choosing: in mixed mode, by which modules outside of decoder layers, the head, choose tokens.
    """

    uses: Sequence[Use]
    supply: Supply
    workspace: torch.Tensor
    kernels: Mapping[str, Kernels]
    choosing: Choosing | None = None
    fusing: Fusing | None = None


class Binder:
    """Binds the linear modules of one model."""

    def __init__(self, model: nn.Module, bindings: Bindings) -> None:
        self._supply, self._workspace = bindings.supply, bindings.workspace
        self._held: dict[int, torch.Tensor] = {}
        self._counted: set[tuple[int, ...]] = set()  # units of which a module tells that they are used
        self._known: dict[str, tuple[Use, tuple[torch.Tensor, ...], bool]] = {}
        self._bound: nn.Parameter | None = None
        self.passes, self.resident = 0, False  # see `fused_layer.Slots`
        self._hooks: list[RemovableHandle] = []
        self._forwards, self._planes = Replacements(), list[PlaneForward]()
        self._layers: list[FusedLayer] = []
        self._inputs = Inputs()
        by_module: dict[str, list[Use]] = {}
        for use in bindings.uses:
            if not isinstance(use.weight, NeuronWeight):
                by_module.setdefault(use.module, []).append(use)
        uses = [each[0] for each in by_module.values() if len(each) == 1]
        named = [(use, model.get_submodule(use.module)) for use in uses]
        pairs = partners([(u.module, u.weight, module) for u, module in named if isinstance(u.weight, PlaneWeight)])
        for use, module in named:
            self._know(use.module, use)
            forward = self._plane_forward(use, module, bindings, pairs.get(use.module))
            if forward is not None:
                self._forwards.put(module.__dict__, "forward", forward)
                self._planes.append(forward)
            elif layer_of(use.module) is None:
                self._forwards.put(module.__dict__, "forward", folding(module))
            self._hooks.append(module.register_forward_pre_hook(self._begin(use, forward)))
            self._hooks.append(module.register_forward_hook(self._end(use, forward), always_call=True))
        for name, each in by_module.items():
            if len(each) > 1:
                self._bind_blocks(model.get_submodule(name), each, bindings)
        if bindings.fusing is not None and bindings.kernels:
            for parts in fusable(model, {use.module: use.weight for use in uses}):
                if not all(kernels.takes_heads(*parts.heads) for kernels in bindings.kernels.values()):
                    continue
                layer = FusedLayer(parts, self, bindings.kernels, bindings.fusing)
                self._layers.append(layer)
                self._forwards.put(parts.layer.__dict__, "forward", layer)

    def _bind_blocks(self, module: nn.Module, uses: Sequence[Use], bindings: Bindings) -> None:
        """Let a module multiply by blocks of rows, each of which is asked for and given back by itself."""
        blocks = []
        for place, use in enumerate(uses):
            name = f"{use.module}, block {place}"
            assert isinstance(use.weight, PlaneWeight)  # no other is cut
            self._know(name, use)
            blocks.append((name, PlaneForward(use.module, module, use.weight, bindings.kernels, self._inputs)))
        self._forwards.put(module.__dict__, "forward", RowBlocksForward(module, blocks, self))

    def _plane_forward(
        self, use: Use, module: nn.Module, bindings: Bindings, partner: tuple[str, PlaneWeight] | None
    ) -> PlaneForward | None:
        """What multiplies by a module's planes as they are; None where its weight is made instead."""
        if not isinstance(use.weight, PlaneWeight) or not bindings.kernels:
            return None
        if bindings.choosing is not None and layer_of(use.module) is None:
            return ShortlistForward(use.module, module, use.weight, bindings.kernels, self._inputs, bindings.choosing)
        return PlaneForward(use.module, module, use.weight, bindings.kernels, self._inputs, partner)

    def begin_pass(self, *, resident: bool) -> None:
        """A pass begins; `resident`: it multiplies by the planes that stay."""
        self.passes, self.resident = self.passes + 1, resident

    def release_all(self) -> None:
        """Release what an interrupted pass still held."""
        if self._bound is not None:
            hide(self._bound)
            self._bound = None
        self._inputs.forget()
        for forward in self._planes:
            forward.slots = ()
        for key in tuple(self._held):
            del self._held[key]
            self._supply.release(key)

    def close(self) -> None:
        """Remove the hooks."""
        self.release_all()
        self._forwards.restore()
        while self._layers:
            self._layers.pop().close()
        while self._hooks:
            self._hooks.pop().remove()

    def staying(self, modules: Sequence[str]) -> Sequence[Sequence[torch.Tensor]] | None:
        """The slots of modules' weights in passes like the one at hand, if all of them stay as long as the model."""
        known = [self._known[module] for module in modules]
        slots = [use.resident if self.resident else staying for use, staying, _ in known]
        return slots if all(slots) else None

    def counted(self, modules: Sequence[str]) -> Sequence[int]:
        """The units that stay of which these modules tell that they are used."""
        known = [self._known[module] for module in modules]
        return [unit for use, staying, first in known if staying and first for unit in use.weight.units]

    def hit(self, units: Sequence[int]) -> None:
        """Units that stay are used; those of resident passes are counted by whoever runs such passes."""
        if units and not self.resident:
            self._supply.hit(units)

    def take(self, module: str) -> Sequence[torch.Tensor]:
        """The slots of a module's weight, for as long as the module is at work; see `hit` for those that stay."""
        use, staying, _ = self._known[module]
        if self.resident:
            return use.resident
        return staying or self._acquire(use.weight.units)

    def give_back(self, module: str) -> None:
        """A module is done; units that are not needed again are released."""
        use, staying, _ = self._known[module]
        if use.last and not staying:
            for key in use.weight.units:
                if self._held.pop(key, None) is not None:
                    self._supply.release(key)

    def _know(self, name: str, use: Use) -> None:
        """Look up what of a weight stays, and whether it is the first to tell that its units are used."""
        units = use.weight.units
        self._known[name] = use, self._staying(units), units not in self._counted
        self._counted.add(units)

    def _begin(self, use: Use, forward: PlaneForward | None) -> Callable[[nn.Module, object], None]:
        counted = self.counted([use.module])

        def begin(module: nn.Module, arguments: object) -> None:
            slots = self.take(use.module)
            self.hit(counted)
            if forward is not None:
                forward.slots = slots
                return
            parameter = self._bound = weight_of(module)
            parameter.data = self._tensor(use.weight, slots, parameter.dtype)

        return begin

    def _staying(self, units: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """The slots of units if all of them stay: bound once, for asking costs a small model some percent of a pass."""
        slots = [slot for key in units if (slot := self._supply.pinned_slot(key)) is not None]
        return tuple(slots) if len(slots) == len(units) else ()

    def _acquire(self, units: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
        """The slots of a weight's units, in their order; they are held until `last`, or the end of the pass."""
        for key in units:
            if key not in self._held:
                self._held[key] = self._supply.acquire(key)
        return tuple([self._held[key] for key in units])

    def _end(self, use: Use, forward: PlaneForward | None) -> Callable[[nn.Module, object, object], None]:
        def end(module: nn.Module, arguments: object, output: object) -> None:
            if forward is not None:
                forward.slots = ()
            else:
                hide(weight_of(module))
                self._bound = None
            self.give_back(use.module)

        return end

    def _tensor(self, weight: Weight, slots: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        slot = slots[0]
        if isinstance(weight, PlainWeight) and weight.dtype == dtype:
            return weight.view(slot)
        shape = torch.Size(weight.shape)
        made = self._workspace[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
        if isinstance(weight, PlainWeight):
            return made.copy_(weight.view(slot))
        assert isinstance(weight, PlaneWeight)  # a neuron's planes have forwards of their own
        weight.decode_into(slot, made, slots[1:])
        return made


def weight_of(module: nn.Module) -> nn.Parameter:
    """The parameter that a linear or embedding module multiplies by."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def hide(parameter: nn.Parameter) -> None:
    """Point `parameter` at NaN again."""
    parameter.data = poison(parameter.shape, parameter.dtype, parameter.device)


def needs_workspace(weight: Weight, dtype: torch.dtype, *, kernels: bool) -> int:
    """Bytes of workspace that binding `weight` takes; `kernels`: there are some for planes."""
    if isinstance(weight, NeuronWeight) or (isinstance(weight, PlaneWeight | RowBlocks) and kernels):
        return 0
    if isinstance(weight, PlainWeight) and weight.dtype == dtype:
        return 0
    return torch.Size(weight.shape).numel() * dtype.itemsize


def poison(shape: Iterable[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """NaN in every place, for the memory of one."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(tuple(shape))


class Replacements:
    """Puts other values into the dictionaries of modules, and remembers what was there."""

    def __init__(self) -> None:
        self._before: list[tuple[MutableMapping[str, Any], str, object]] = []

    def put(self, values: MutableMapping[str, Any], name: str, value: object) -> None:
        """Let `values[name]` be another value: a parameter, a buffer, or a method of the module's own."""
        self._before.append((values, name, values.get(name, _NOTHING)))
        values[name] = value

    def restore(self) -> None:
        """Put the originals back, the same objects; harmless when done twice."""
        while self._before:
            values, name, before = self._before.pop()
            if before is _NOTHING:
                del values[name]
            else:
                values[name] = before
