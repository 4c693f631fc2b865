"""The Hessians of a layer's linear modules, summed while the layer runs.

A linear module multiplies its weights by inputs x. The squared error of its outputs has the same second derivatives
with regard to the weights of every output: X^T X, the sum of x x^T over the inputs. This matrix is called the Hessian
here, as in GPTQ (arXiv 2210.17323).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

Hessians = dict[str, Tensor]
"""fp32 [inputs, inputs], by name of the module."""


@contextmanager
def summed_hessians(model: nn.Module, layer: str, modules: set[str], sums: Hessians) -> Iterator[None]:
    """Within, add x x^T of what goes into the linear modules of a layer to `sums`; modules with one input share one."""
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

    named = [(name, module) for name, module in model.get_submodule(layer).named_modules(prefix=layer)]
    hooks = [m.register_forward_pre_hook(partial(listen, name)) for name, m in named if name in modules]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
