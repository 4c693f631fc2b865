"""Attaches a model to its weights' supply and detaches it again: hooks, parameters and buffers, all put back.

Knows modules, parameters and hooks; not where slots come from.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
import transformers
from torch import nn

from tiercache.model.binding import Binder, Bindings, Replacements, poison, weight_of
from tiercache.model.embedding import EmbeddingRows, Lookup
from tiercache.model.mixed import MixedBlock


class Attachment:
    """One model, attached; `close` undoes everything.

    Args:
        model: the model; its linear weights are replaced by placeholders.
        bindings: of its linear modules.
        dense: parameters to put in, by name; they are on `device` already.
        embedding: module name of the token embedding.
        table: the whole token embedding on `device`, or the rows it is looked up from.
        device: where the model computes.
        blocks: feed-forward blocks that are served neuron by neuron; their modules are among the bindings as well.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        bindings: Bindings,
        dense: Mapping[str, torch.Tensor],
        embedding: str,
        table: torch.Tensor | EmbeddingRows,
        device: torch.device,
        blocks: Sequence[MixedBlock] = (),
    ) -> None:
        self._replaced, self._blocks = Replacements(), tuple(blocks)
        self._lookup: Lookup | None = None
        self._binder: Binder | None = None
        try:
            for use in bindings.uses:
                self._hide(model.get_submodule(use.module), device)
            for name, tensor in dense.items():
                module, _, leaf = name.rpartition(".")
                self._set_parameter(model.get_submodule(module), leaf, tensor)
            if isinstance(table, torch.Tensor):
                self._set_parameter(model.get_submodule(embedding), "weight", table)
            else:
                lookup = model.get_submodule(embedding)
                assert isinstance(lookup, nn.Embedding)
                self._hide(lookup, device)
                self._lookup = Lookup(lookup, table)
            self._move_buffers(model, device)
            self._binder = Binder(model, bindings)
            self._replaced.put(model.__dict__, "tie_weights", _leave_tied)
            for block in self._blocks:
                self._mix(model, block)
        except BaseException:  # half-way: the model must not stay changed
            self.close()
            raise

    def begin_pass(self, *, resident: bool) -> None:
        """A pass begins; `resident`: it multiplies by the planes that stay, and acquires no unit."""
        assert self._binder is not None
        self._binder.begin_pass(resident=resident)

    def end_pass(self) -> None:
        """Release what an interrupted pass still held."""
        for block in self._blocks:
            block.forget()
        if self._binder is not None:
            self._binder.release_all()

    def close(self) -> None:
        """Make the model what it was before; harmless when done twice."""
        for block in self._blocks:
            block.forget()
        if self._binder is not None:
            self._binder.close()
        if self._lookup is not None:
            self._lookup.close()
        self._replaced.restore()

    def _mix(self, model: nn.Module, block: MixedBlock) -> None:
        names = block.planes.block
        for place, (module, _) in enumerate(names.inward):
            self._replaced.put(model.get_submodule(module).__dict__, "forward", partial(block.inward, place))
        self._replaced.put(model.get_submodule(names.outward).__dict__, "forward", block.outward)

    def _hide(self, module: nn.Module, device: torch.device) -> None:
        weight = weight_of(module)
        self._set_parameter(module, "weight", poison(weight.shape, weight.dtype, device))

    def _set_parameter(self, module: nn.Module, name: str, tensor: torch.Tensor) -> None:
        """Let `module.name` be a frozen parameter over `tensor`."""
        self._replaced.put(module._parameters, name, nn.Parameter(tensor, requires_grad=False))

    def _move_buffers(self, model: nn.Module, device: torch.device) -> None:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != device.type:
                    self._replaced.put(module._buffers, name, buffer.to(device))


def _leave_tied(*arguments: object, **named: object) -> None:
    """`tie_weights` of an attached model: nothing, for tying would replace the head's placeholder."""
