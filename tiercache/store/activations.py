"""Takes a text through a checkpoint, one decoder layer at a time, and sums the Hessians of its linear modules.

A linear module multiplies its weights by inputs x. The squared error of its outputs has the same second derivatives
with regard to the weights of every output: X^T X, the sum of x x^T over the inputs. This matrix is called the Hessian
here, as in GPTQ (arXiv 2210.17323).

Knows the checkpoint and transformers' own layers; not how weights are quantised or where they are kept. At no time is
more of the model in memory than one layer, in fp32, and what lies outside of the layers. The hidden states of the text
between two layers are kept in a file, so that an interrupted pass goes on where it was.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tiercache.errors import StoreError, UnsupportedModelError
from tiercache.model import meta_model
from tiercache.quant.tune import Layer
from tiercache.store.checkpoint import Checkpoint
from tiercache.store.reader import Reader, load
from tiercache.store.writer import sync

HIDDEN_FILES = "hidden-*.npy"

Hessians = dict[str, Tensor]
"""fp32 [inputs, inputs], by name of the module."""

_Call = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments and keywords that the model calls a layer with, beside the hidden states."""


class TextPass:
    """A text that is taken through a checkpoint; `at` is the layer that comes next.

    Args:
        checkpoint, reader: what weights are read from, and by.
        windows: token ids, int64 [windows, tokens].
        folder: where hidden states are kept between two layers.
        looks_back: keep the hidden states before a layer in memory too, for `passed`.

    Raises:
        UnsupportedModelError: the model has no list of decoder layers, or calls them in a way that cannot be repeated.
    """

    def __init__(
        self, checkpoint: Checkpoint, windows: Tensor, reader: Reader, folder: Path, *, looks_back: bool = False
    ) -> None:
        self._checkpoint, self._windows, self._reader, self._folder = checkpoint, windows, reader, folder
        self._looks_back = looks_back
        self._before = torch.empty(0)  # the hidden states before the last layer, if it looks back
        self._model = meta_model.build(checkpoint.config, torch.float32)
        self._modules = {matrix.module for matrix in meta_model.matrices(self._model)}
        self._layers = _layers(self._model, self._modules)
        self._calls: list[_Call] = []  # of each layer: the same for every window, for all windows are as long
        self._in_tuple: dict[type, bool] = {}  # whether layers of a kind return their hidden states in a tuple
        self._hidden = torch.empty(0)  # [windows, tokens, features], of the layer that comes next
        self.at = 0

    def resume(self, layer: int | None) -> None:
        """Take up the pass before decoder layer `layer`: 0, or one whose hidden states were kept; None for the head."""
        self._hidden = self._record()
        self.at = len(self._layers) if layer is None else layer
        if self.at == 0:
            return
        path = self._file()
        try:
            self._hidden = torch.from_numpy(np.load(path))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read ({error}); convert from the start, with --restart") from error

    def layer(self) -> Hessians:
        """Take the text through the next layer; modules that are given the same x share one Hessian."""
        name, module = self._layers[self.at]
        (arguments, keywords), hidden = self._calls[self.at], self._hidden
        self._before = torch.empty(0)  # gone before there is another
        if self._looks_back:
            self._before = hidden.clone()
        sums: Hessians = {}
        with self._weights(name), self._summed_hessians(name, sums):
            for place, window in enumerate(hidden):
                hidden[place] = self._output(module, module(window[None], *arguments, **keywords))
        self.at += 1
        return sums

    @contextmanager
    def passed(self) -> Iterator[Layer]:
        """The layer that the text was just taken through, its parameters in memory."""
        name, module = self._layers[self.at - 1]
        arguments, keywords = self._calls[self.at - 1]

        def forward(weights: dict[str, Tensor], window: Tensor) -> Tensor:
            own = {key.removeprefix(name + "."): weight for key, weight in weights.items()}
            given = (window[None], *arguments)
            return self._output(module, torch.func.functional_call(module, own, given, keywords))

        with self._weights(name):
            yield Layer(dict(module.named_parameters(prefix=name)), forward, self._before, self._hidden)

    def head(self) -> Tensor:
        """After the last layer: sum of x x^T of what goes into the head."""
        total: Tensor | None = None
        with self._outside():
            for window in self._hidden:
                x = self._run(partial(_instead, window[None]), self._windows[:1])[0]
                total = x.T @ x if total is None else total.addmm_(x.T, x)  # OPT narrows hidden states before its head
        assert total is not None
        return total

    def keep(self) -> None:
        """Write the hidden states before the next layer to disk; earlier ones may go once the journal says so."""
        path = self._file()
        np.save(path, self._hidden.numpy())
        sync(path)
        sync(self._folder)

    def forget(self) -> None:
        """Remove the hidden states before layers that are done."""
        for path in self._folder.glob(HIDDEN_FILES):
            if int(path.stem.rpartition("-")[2]) < self.at:
                path.unlink()

    def _file(self) -> Path:
        return self._folder / f"hidden-{self.at:05d}.npy"

    def _record(self) -> Tensor:
        """Find out what each layer is called with, and the hidden states before the first."""
        calls: list[_Call] = []
        first: list[Tensor] = []

        def record(place: int, hidden: Tensor, call: _Call) -> Tensor:
            name, module = self._layers[place]
            kind = type(module)
            if kind not in self._in_tuple:
                with self._weights(name):
                    made = kind.forward(module, hidden, *call[0], **call[1])
                self._in_tuple[kind] = isinstance(made, tuple)
            calls.append(call)
            return hidden

        def begin(place: int, hidden: Tensor, _call: _Call) -> Tensor:
            if place == 0:
                first.append(hidden[0].clone())
            return hidden

        embedding = self._model.get_submodule(meta_model.embedding(self._model)[0])
        in_fp32 = embedding.register_forward_hook(lambda _module, _given, rows: rows.float())
        with self._outside(), in_fp32:
            self._run(record, self._windows[:1])
            if len(calls) != len(self._layers):
                kind = self._checkpoint.config.model_type
                raise UnsupportedModelError(
                    f"{kind} calls {len(calls)} of its {len(self._layers)} layers, so that a text cannot be taken "
                    "through them one by one; convert with --plain"
                )
            self._calls = calls
            for window in self._windows:
                self._run(begin, window[None])
        return torch.stack(first)

    def _run(self, forward: Callable[[int, Tensor, _Call], Tensor], ids: Tensor) -> Tensor:
        """Run the model without its head on one window, with another forward for its layers."""

        def called(place: int, hidden: Tensor, *arguments: Any, **keywords: Any) -> Any:
            made = forward(place, hidden, (arguments, keywords))
            return (made,) if self._in_tuple[type(self._layers[place][1])] else made

        for place, (_, module) in enumerate(self._layers):
            module.__dict__["forward"] = partial(called, place)
        try:
            result: Tensor = self._model.base_model(input_ids=ids, use_cache=False)[0]
        finally:
            for _, module in self._layers:
                del module.__dict__["forward"]
        return result

    def _output(self, module: nn.Module, made: Any) -> Tensor:
        """The hidden states of the one window in what a layer returned."""
        hidden: Tensor = made[0] if self._in_tuple[type(module)] else made
        return hidden[0]

    @contextmanager
    def _summed_hessians(self, layer: str, sums: Hessians) -> Iterator[None]:
        """Within, add x x^T of what goes into the linear modules of a layer to `sums`."""
        newest: list[tuple[Tensor, str]] = []
        shared: dict[str, str] = {}

        def listen(name: str, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
            x = given[0]
            if newest and newest[0][0] is x and shared.setdefault(name, newest[0][1]) == newest[0][1]:
                sums[name] = sums[newest[0][1]]  # the same tensor: q, k and v
                return
            newest[:] = [(x, name)]
            flat = x.reshape(-1, x.shape[-1])
            if name not in sums:
                sums[name] = torch.zeros(flat.shape[1], flat.shape[1])
            sums[name].addmm_(flat.T, flat)

        with ExitStack() as stack:
            for name, module in self._model.get_submodule(layer).named_modules(prefix=layer):
                if name in self._modules:
                    stack.enter_context(module.register_forward_pre_hook(partial(listen, name)))
            yield

    def _outside(self) -> Any:
        """The parameters outside of the layers, the head's left out, for as long as they are needed."""
        prefixes = tuple(name + "." for name, _ in self._layers)
        base = {id(parameter) for parameter in self._model.base_model.parameters()}
        names = [name for name, p in self._model.named_parameters() if not name.startswith(prefixes) and id(p) in base]
        return self._materialised(names)

    def _weights(self, layer: str) -> Any:
        """The parameters of a layer, for as long as it runs."""
        return self._materialised([n for n, _ in self._model.named_parameters() if n.startswith(layer + ".")])

    @contextmanager
    def _materialised(self, names: list[str]) -> Iterator[None]:
        before: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        _, table = meta_model.embedding(self._model)
        try:
            for name in names:
                parent, _, leaf = name.rpartition(".")
                module = self._model.get_submodule(parent)
                value = load(self._reader, self._checkpoint.tensors[name])
                if name != table:  # the largest of all stays as it is: its rows become fp32
                    value = value.float()
                before.append((module, leaf, module._parameters[leaf]))
                module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
            yield
        finally:
            for module, leaf, parameter in before:
                module._parameters[leaf] = parameter


def _instead(last: Tensor, *_given: Any) -> Tensor:
    """What the layers have made, whatever a layer is given."""
    return last


def layer_name(module: str) -> str | None:
    """The name of the decoder layer that a module is part of; None outside of the layers."""
    layer = meta_model.layer_of(module)
    return None if layer is None else module[: module.index(f".{layer}.")] + f".{layer}"


def _layers(model: nn.Module, modules: Iterable[str]) -> list[tuple[str, nn.Module]]:
    """Names and modules of the decoder layers, in their order."""
    found = {meta_model.layer_of(module): name for module in modules if (name := layer_name(module)) is not None}
    if found.keys() != set(range(len(found))) or not found:
        raise UnsupportedModelError("the model's linear modules stand in no list of layers; convert with --plain")
    return [(found[place], model.get_submodule(found[place])) for place in range(len(found))]
