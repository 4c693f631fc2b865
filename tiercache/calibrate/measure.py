"""What a way to run the neurons loses on the text: KL from the exact model, entropy, perplexity and agreement.

The exact model's logits lie in a file without a name, so that no second model and no memory is needed for them. Knows
an attached model, blocks and recipes.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from policies.precision import Recipe
from tiercache.model.mixed import MixedBlock
from tiercache.quality.measure import KeptLogits, Score, score

_RUN = 16  # tokens of a trace that follow one another, at least: caches live of what neighbours share


@dataclass(frozen=True)
class Measured:
    """Means over the tokens that were predicted; nats a token. What is not finite says that the model broke down."""

    kl: float
    entropy: float
    perplexity: float
    top1: float

    @property
    def finite(self) -> bool:
        """Whether all of it can be compared."""
        return all(map(math.isfinite, (self.kl, self.entropy, self.perplexity)))


class Measurer:
    """Runs windows of the text through a model, attached in mixed mode; `after` is called after each pass."""

    def __init__(self, model: Any, windows: Sequence[Tensor], after: Callable[[], None]) -> None:
        self._model, self._windows, self._after = model, windows, after
        self._blocks: Sequence[MixedBlock] = model.tiercache.mixed.blocks

    def keep(self, kept: KeptLogits) -> Measured:
        """The exact model: its logits are kept."""
        with self._model.tiercache.passes("exact"):
            return _means(score(self._model, self._inputs(), keep=kept, after=self._after))

    def mixed(self, recipes: Sequence[Recipe], kept: KeptLogits, windows: int | None = None) -> Measured:
        """Each token's neurons chosen, in the first `windows` windows; in all of them where it is None."""
        self._set(recipes)
        inputs = self._inputs()[:windows]
        return _means(score(self._model, inputs, reference=kept, every_token=True, after=self._after))

    def _inputs(self) -> list[Tensor]:
        return [window[None] for window in self._windows]

    def trace(self, recipes: Sequence[Recipe], tokens: int, most_bytes: int) -> dict[str, np.ndarray]:
        """The neurons that some `tokens` at most want of planes above the ranking's, by block, most important first.

        Arrays are [tokens, most], uint16 where that counts all neurons of a block, else int32, and take `most_bytes`
        together, unless one token alone takes more. The windows come from all over the text, and from the middle of
        each come tokens that follow one another, behind all that is before them in it.
        """
        self._set(recipes)
        neurons = self._blocks[0].planes.block.neurons
        wanted = [max(recipe.wanted(neurons)[recipe.rank :], default=0) for recipe in recipes]
        dtype = np.dtype(np.uint16 if neurons <= 0xFFFF else np.int32)
        each = sum(wanted) * dtype.itemsize
        count = max(1, min(tokens, most_bytes // max(1, each), sum(map(len, self._windows))))
        runs = max(1, min(len(self._windows), count // _RUN))
        found: list[list[np.ndarray]] = [[] for _ in self._blocks]
        for run in range(runs):
            window = self._windows[int((run + 0.5) * len(self._windows) / runs)]
            length = min(count // runs, len(window))
            end = (len(window) + length) // 2
            self._choices(window[:end], end - length, wanted, found)
        return {str(place): np.stack(rows).astype(dtype) for place, rows in enumerate(found)}

    def _choices(
        self,
        window: Tensor,
        start: int,
        wanted: Sequence[int],
        found: Sequence[list[np.ndarray]],
    ) -> None:
        """Add what the tokens from `start` on choose; choices come block by block, and in one token by token."""
        choosing = self._model.tiercache.mixed.choosing
        seen = [0] * len(found)

        def note(block: int, order: np.ndarray) -> None:
            if seen[block] >= start:
                found[block].append(order[: wanted[block]])
            seen[block] += 1

        before, choosing.trace = choosing.trace, note
        try:
            with self._model.tiercache.every_token():
                self._model(input_ids=window[None].to(self._model.device), use_cache=False)
        finally:
            choosing.trace = before

    def _set(self, recipes: Sequence[Recipe]) -> None:
        for recipe, block in zip(recipes, self._blocks, strict=True):
            block.recipe = recipe


def _means(total: Score) -> Measured:
    tokens = total.tokens
    return Measured(total.kl / tokens, total.entropy / tokens, total.perplexity, total.same / tokens)
