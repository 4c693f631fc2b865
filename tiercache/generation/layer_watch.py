"""Watches the decoder layers of a pass: tells how far it has come, and breaks it off where it is cancelled.

A pass of a model that streams from an SSD takes seconds, a long prompt's minutes; a layer takes a fraction of that.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import transformers

from tiercache.model.meta_model import layer_of

_LAYER = re.compile(r"\.\d+$")  # a decoder layer itself, none of its parts


class PassCancelledError(Exception):
    """The pass under way was broken off; its KV cache has more tokens in some layers than in others."""


@contextmanager
def watched_layers(
    model: transformers.PreTrainedModel, reached: Callable[[int, int], None], cancelled: Callable[[], bool]
) -> Iterator[None]:
    """Within, each decoder layer first asks whether the pass is cancelled, and tells that it begins.

    Args:
        model: the model; its layers get hooks.
        reached: is told how many layers of the pass are done, and how many there are.
        cancelled: whether to break off.

    Raises:
        PassCancelledError: out of the pass, where it is.
    """
    names = {name: module for name, module in model.named_modules() if _LAYER.search(name)}
    layers = [module for name, module in names.items() if layer_of(name) is not None]

    def begins(number: int, *_: Any) -> None:
        if cancelled():
            raise PassCancelledError
        reached(number, len(layers))

    hooks = [layer.register_forward_pre_hook(partial(begins, number)) for number, layer in enumerate(layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
