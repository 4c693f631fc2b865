"""What a way to run the neurons loses on the text: KL from the exact model, entropy, perplexity and agreement.

The exact model's logits lie in a file without a name, so that no second model and no memory is needed for them. Knows
an attached model, blocks and recipes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from policies.precision import Recipe
from tiercache.errors import EnvironmentUnsupportedError
from tiercache.model.mixed import MixedBlock
from tiercache.quality.measure import KeptLogits, kept_logits

_ROWS = 64  # of logits that are compared at a time, in fp64


@dataclass(frozen=True)
class Measured:
    """Means over the tokens that were predicted; nats a token."""

    kl: float
    entropy: float
    perplexity: float
    top1: float


@contextmanager
def room(folder: Path, windows: Sequence[Tensor], vocabulary: int, item_bytes: int) -> Iterator[KeptLogits]:
    """Where the exact model's logits are kept meanwhile.

    Raises:
        EnvironmentUnsupportedError: the disk is too full.
    """
    rows = sum(len(window) - 1 for window in windows)
    try:
        with kept_logits(folder, rows * vocabulary * item_bytes) as kept:
            yield kept
    except EnvironmentUnsupportedError as error:
        if "scratch" not in str(error):
            raise
        what = str(error).partition(";")[0]
        raise EnvironmentUnsupportedError(f"{what}; give fewer --measure-tokens, or free some space") from error


class Measurer:
    """Runs windows of the text.

    Args:
        model: attached, in mixed mode.
        blocks: of it.
        windows: of the text.
        after: called after each pass.
    """

    def __init__(
        self, model: Any, blocks: Sequence[MixedBlock], windows: Sequence[Tensor], after: Callable[[], None]
    ) -> None:
        self._model, self._blocks, self._windows, self._after = model, blocks, windows, after

    def keep(self, kept: KeptLogits) -> Measured:
        """The exact model: its logits are kept."""
        with self._model.tiercache.passes("exact"):
            return self._pass(kept.put, None)

    def exact(self, kept: KeptLogits) -> Measured:
        """The neurons exact; what is no neuron as the model was opened."""
        with self._model.tiercache.passes("exact"):
            return self._pass(None, kept)

    def mixed(self, recipes: Sequence[Recipe], kept: KeptLogits) -> Measured:
        """Each token's neurons chosen."""
        self._set(recipes)
        with self._model.tiercache.every_token():
            return self._pass(None, kept)

    def trace(self, recipes: Sequence[Recipe], tokens: int, most_bytes: int) -> dict[str, np.ndarray]:
        """The neurons that the first tokens choose, most important first: int32 [tokens, most], by block.

        Args:
            recipes: of each block.
            tokens: at most.
            most_bytes: of all blocks together, unless one token alone takes more.
        """
        self._set(recipes)
        choosing = self._model.tiercache.mixed.choosing
        most = sum(sum(recipe.counts(block.planes.block.neurons)) for recipe, block in self._pairs(recipes))
        count = max(1, min(tokens, most_bytes // max(1, 4 * most)))
        found: dict[str, list[np.ndarray]] = {str(place): [] for place in range(len(self._blocks))}
        before, choosing.trace = choosing.trace, lambda block, order: found[str(block)].append(order.astype(np.int32))
        try:
            with self._model.tiercache.every_token():
                self._run(self._windows[0][:count])
        finally:
            choosing.trace = before
        return {place: np.stack(rows) for place, rows in found.items()}

    def _pairs(self, recipes: Sequence[Recipe]) -> Iterator[tuple[Recipe, MixedBlock]]:
        return zip(recipes, self._blocks, strict=True)

    def _set(self, recipes: Sequence[Recipe]) -> None:
        for recipe, block in self._pairs(recipes):
            block.recipe = recipe

    def _run(self, window: Tensor) -> Tensor:
        logits: Tensor = self._model(input_ids=window[None].to(self._model.device), use_cache=False).logits[0]
        return logits

    def _pass(self, put: Callable[[Tensor], None] | None, kept: KeptLogits | None) -> Measured:
        sums = np.zeros(4)  # kl, entropy, negative log likelihood, agreement
        tokens = 0
        if kept is not None:
            kept.rewind()
        for window in self._windows:
            logits = self._run(window)[:-1]
            for rows, targets in zip(logits.split(_ROWS), window[1:].split(_ROWS), strict=True):
                here = rows.cpu()
                if put is not None:
                    put(here)
                sums += _compare(here, targets, here if kept is None else kept.take(len(here)))
                tokens += len(here)
            self._after()
        means = (sums / tokens).tolist()
        return Measured(means[0], means[1], math.exp(min(means[2], 700.0)), means[3])


def _compare(logits: Tensor, targets: Tensor, reference: Tensor) -> np.ndarray:
    """Sums over rows of logits."""
    log_q, log_p = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).nan_to_num(0.0).sum()  # 0 log 0 = 0
    entropy = -(log_q.exp() * log_q).nan_to_num(0.0).sum()
    nats = -log_q.gather(-1, targets[:, None]).sum()
    same = (logits.argmax(-1) == reference.argmax(-1)).sum()
    return np.array([float(kl), float(entropy), float(nats), float(same)])
