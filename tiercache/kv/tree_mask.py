"""Makes the attention masks of passes over one sequence and the trees of tokens below it.

Knows slots of the KV cache, depths and a model's attention window; it does not know tokens or run the model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from tiercache.compat import attention_of
from tiercache.errors import UsageError
from tiercache.tiers.device import on_host


class TreeMasks:
    """Says which slots each token of a pass may see.

    Args:
        config: the language model's configuration; it names the kinds of layers and the attention window.
        dtype: the model's.
        device: where the masks are made.
        padding: attention mask of the prompt [prompt] or [1, prompt], zeros where it is padded; None for no padding.

    Attributes:
        padded: how many slots hold padding, which no token may see.

    Raises:
        UsageError: the padding is not that of one sequence.
    """

    def __init__(
        self, config: transformers.PretrainedConfig, dtype: torch.dtype, device: torch.device, padding: Tensor | None
    ) -> None:
        window = getattr(config, "sliding_window", None)
        kinds = set(
            getattr(config, "layer_types", None) or ("full_attention" if window is None else "sliding_attention",)
        )
        self._hidden = _padded_slots(padding, device)
        self.device, self.padded = device, 0 if self._hidden is None else int(self._hidden.sum())
        self._dtype = dtype
        self._window: int | None = window if "sliding_attention" in kinds else None
        self._mixed = len(kinds) > 1
        self._additive = attention_of(config) == "eager"

    def causal(self, start: int, end: int) -> tuple[Tensor | None, Tensor]:
        """For the slots from `start` to `end`: the model's own 2-D mask [1, end], and positions [1, end - start]."""
        if self._hidden is None:
            return None, torch.arange(start, end, device=self.device)[None]
        shown = torch.ones(1, end, dtype=torch.long, device=self.device)
        prompt = min(end, self._hidden.shape[0])
        shown[0, :prompt] = ~self._hidden[:prompt]
        return shown, (shown.cumsum(1) - 1).clamp_(min=0)[:, start:]

    def tree(self, ancestors: Sequence[int], depths: Sequence[int], first: int, length: int) -> Any:
        """For the nodes from `first` on, below `length` committed tokens: one mask, or one for each kind of layer.

        A mask is [1, 1, nodes, length + all open nodes]; None where every new node sees every slot, which the model's
        own fast path for one token does by itself.
        """
        nodes, new = len(ancestors), len(ancestors) - first
        window = self._window
        if window is not None and length + max(depths[first:]) < window:
            window = None  # it reaches to the beginning
        if new == 1 and window is None and self._hidden is None and ancestors[first] == (1 << nodes) - 1:
            return None
        width = (nodes + 7) // 8
        packed = np.frombuffer(
            b"".join(ancestor_bits.to_bytes(width, "little") for ancestor_bits in ancestors[first:]), np.uint8
        )
        bits = np.unpackbits(packed.reshape(new, width), axis=1, count=nodes, bitorder="little")
        seen = self._shown(new, length + nodes)
        seen[:, length:] = torch.from_numpy(bits.view(np.bool_)).to(self.device)
        if self._hidden is not None:
            seen[:, : self._hidden.shape[0]].masked_fill_(self._hidden, False)
        near = seen if window is None else self._near(seen, depths, first, length, window)
        if self._mixed:
            full = self._for_attention(seen)
            return {"full_attention": full, "sliding_attention": full if near is seen else self._for_attention(near)}
        return self._for_attention(near)

    def _shown(self, rows: int, columns: int) -> Tensor:
        """A mask that hides nothing; numpy makes it without waking threads, which would take longer than the work."""
        if on_host(self.device):
            return torch.from_numpy(np.ones((rows, columns), dtype=np.bool_))
        return torch.ones(rows, columns, dtype=torch.bool, device=self.device)

    def _near(self, seen: Tensor, depths: Sequence[int], first: int, length: int, window: int) -> Tensor:
        """Of what nodes see, what is within their window: by the place that a node would take, not by its slot."""
        below = torch.tensor(depths, device=self.device) + length
        places = torch.cat((torch.arange(length, device=self.device), below))
        return (places > below[first:, None] - window).logical_and_(seen)

    def _for_attention(self, seen: Tensor) -> Tensor:
        seen = seen[None, None]
        if not self._additive:
            return seen
        least = torch.finfo(self._dtype).min
        return torch.zeros(seen.shape, dtype=self._dtype, device=self.device).masked_fill_(~seen, least)


def _padded_slots(padding: Tensor | None, device: torch.device) -> Tensor | None:
    """Whether each slot of the prompt is padding [prompt]; None where none is."""
    if padding is None:
        return None
    if padding.dim() > 2 or (padding.dim() == 2 and padding.shape[0] != 1):
        raise UsageError(f"padding of shape {tuple(padding.shape)} is not that of one sequence; give one row of it")
    hidden = (padding.reshape(-1) == 0).to(device)
    return hidden if bool(hidden.any()) else None
