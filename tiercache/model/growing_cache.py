"""Appends to transformers' own KV cache in place: its dynamic layers copy all keys and values for each new token.

The cache stays transformers': after each pass its layer holds plain tensors [1, heads, tokens, width], views of a
buffer with room behind them. What a view shows is never written again, so whoever keeps one keeps what it showed. A
layer whose tensors are not the last ones that were put in (it was cropped, reordered, copied) gets a buffer anew.

Knows transformers' caches; nothing of models.
"""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tiercache.compat import DynamicLayer

_LEAST = 16  # slots of room in a new buffer; and a sixteenth of what it holds, so that copying it is rare


class GrowingCache:
    """Room behind the keys and values of one layer of a model, in each cache that it has met.

    Args:
        most: tokens that a KV cache was reserved for: buffers do not outgrow it.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: WeakKeyDictionary[Any, Room] = WeakKeyDictionary()

    def room(self, cache: Any, index: int, new: int) -> "Room | None":
        """Room for so many more tokens in a layer of a cache; None where `update` has to see to them."""
        layer: Any = cache.layers[index] if index < len(cache.layers) else None
        if type(layer) is not DynamicLayer or not layer.is_initialized or getattr(layer.keys, "ndim", 0) != 4:
            return None
        held: Any = layer.keys, layer.values
        keys, values = held
        room = self._known.get(layer)
        if room is None or not room.fits(keys, values, new):
            needed = keys.shape[2] + new
            slots = max(needed, min(needed + max(_LEAST, needed // 16), self._most))
            room = self._known[layer] = Room(keys, values, slots)
        return room


class Room:
    """Buffers of keys and values, filled from the front."""

    def __init__(self, keys: Tensor, values: Tensor, slots: int) -> None:
        self._buffers = [part.new_empty((*part.shape[:2], slots, part.shape[3])) for part in (keys, values)]
        for buffer, part in zip(self._buffers, (keys, values), strict=True):
            buffer[:, :, : keys.shape[2]] = part
        self._newest: tuple[Tensor, Tensor] = keys, values

    def fits(self, keys: Tensor, values: Tensor, new: int) -> bool:
        """Whether these are the tensors that were put in last, and so many more tokens can be written behind them."""
        if keys is not self._newest[0] or values is not self._newest[1]:
            return False
        buffer = self._buffers[0]  # one that was made in inference mode can be written to only there
        writable = torch.is_inference_mode_enabled() or not buffer.is_inference()
        return writable and keys.shape[2] + new <= buffer.shape[2]

    def views(self, new: int) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last, which are still to be written."""
        first, second = self._buffers
        end = self._newest[0].shape[2] + new
        return first.narrow(2, 0, end), second.narrow(2, 0, end)

    def keep(self, layer: Any, views: tuple[Tensor, Tensor]) -> None:
        """Make views, whose new tokens were written, what a cache's layer holds."""
        self._newest = views  # first: after an interrupt here the layer's are not the newest, and get a buffer anew
        layer.keys, layer.values = views
