"""Mixed mode once more, slow and plain: whole decoded matrices, masks, and the transformers model's own code between.

Shares nothing with the engine but the coding of the planes: no store, no tiers, no slots, no kernels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf
from torch import Tensor, nn
from transformers.activations import ACT2FN

from policies.precision import Recipe
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import Budget
from tiercache.engine.offload import open_offloaded
from tiercache.model import meta_model
from tiercache.quant import planes
from tiercache.quant.hadamard import restored, stored
from tiercache.store.calibration import FILE, SCHEMA, Calibration, Setting
from tiercache.store.planestore import PlaneStore

CONTEXT = 64
PRECISIONS = ("int3", "int4", "int8")
PARTS = {"product": (0, 1), "gate": (0,), "up": (1,), "inputs": (0, 1)}
_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function", "activation")


def calibration(folder: Path, recipes: Recipe | Sequence[Recipe], seed: int = 0) -> Calibration:
    """A made-up calibration with one setting; norms far from equal, so that leaving them out is seen."""
    store = PlaneStore.open(folder)
    blocks = store.blocks()
    rng = np.random.default_rng(seed)
    shape = len(blocks), blocks[0].rows
    every = (recipes,) * len(blocks) if isinstance(recipes, Recipe) else tuple(recipes)
    meta = {
        "schema": SCHEMA,
        "identity": store.contents.meta["identity"],
        "model": store.contents.meta["model_type"],
        "store": store.digest,
        "text": {"name": "made-up", "tokens": 0},
        "precision": "int8",
    }
    return Calibration(
        meta,
        rng.uniform(0.5, 2.0, shape).astype(np.float32),
        rng.random(shape, dtype=np.float32),
        np.tile([1.0, 0.1, 0.01], (len(blocks), 1)),
        (Setting(1.0, every[0].rank, every, 0, 0.25, 0.0, 2.0, 1.5, 0.5),),
        {},
    )


def calibrate(folder: Path, recipe: Recipe) -> None:
    """Write a made-up calibration beside a store."""
    calibration(folder, recipe).save(folder / FILE)


def mixed(
    folder: Path | tf.PreTrainedModel, made: Recipe | Calibration, **options: Any
) -> AbstractContextManager[tf.PreTrainedModel]:
    """A store's model in mixed mode under a made-up calibration."""
    place = options.get("store", folder)
    known = made if isinstance(made, Calibration) else calibration(place, made)
    sizes = {name: options.pop(name, default) for name, default in (("hbm", None), ("dram", "256MiB"))}
    config = OffloadConfig(
        hbm=None if sizes["hbm"] is None else Budget.parse(sizes["hbm"]),
        dram=Budget.parse(sizes["dram"]),
        **{"precision": "int8", "context": CONTEXT, "mode": "mixed", "bytes_per_token": Budget.parse(1.0)} | options,
    )
    return open_offloaded(folder, config, calibration=known)


@contextmanager
def orders(model: tf.PreTrainedModel) -> Iterator[dict[int, list[np.ndarray]]]:
    """The neurons that the engine chose within: per block, token by token."""
    choosing = model.tiercache.mixed.choosing
    found: dict[int, list[np.ndarray]] = {place: [] for place in range(len(model.tiercache.mixed.blocks))}
    before, choosing.trace = choosing.trace, lambda block, order: found[block].append(order)
    try:
        yield found
    finally:
        choosing.trace = before


class Block:
    """One feed-forward block of the oracle: every matrix at every precision, and the recorded order of each token.

    Attributes:
        worst: how far, in units of the largest score, the engine's order was from the oracle's own at worst.
    """

    def __init__(self, model: nn.Module, ffn: Any, recipe: Recipe, norms: np.ndarray, activation: Any) -> None:
        self.recipe, self.norms, self.activation = recipe, torch.from_numpy(norms), activation
        self.orders: list[np.ndarray] = []
        self.worst = 0.0
        inward = [model.get_submodule(matrix.module) for matrix in ffn]
        outward = inward.pop()
        self.neurons = len(norms)
        self.weights: list[list[Tensor]] = []  # of each part, [neurons, features] at each precision
        self.biases: list[Tensor | None] = []
        for module, matrix in zip(inward, ffn, strict=False):
            rows = module.weight.data.T if matrix.transposed else module.weight.data
            halves = range(len(rows) // self.neurons)
            for half in halves:  # a fused gate and up: the upper half is gate
                own = slice(half * self.neurons, (half + 1) * self.neurons)
                self.weights.append(_rungs(rows[own]))
                self.biases.append(None if module.bias is None else module.bias.data[own])
        down = outward.weight.data if ffn[-1].transposed else outward.weight.data.T  # [neurons, features]
        self.down, self.out_bias = _rungs(down, down.abs().amax(dim=0).float()), outward.bias
        first = 0
        for module in inward:
            count = module.weight.numel() // self.weights[0][0].shape[1] // self.neurons
            module.forward = self._inward(range(first, first + count))
            first += count
        outward.forward = self._outward

    def matmuls(self, x: Tensor, part: int, precision: int) -> Tensor:
        made = x @ self.weights[part][precision - 1].T
        return made if self.biases[part] is None else made + self.biases[part]

    def choose(self, x: Tensor) -> None:
        """Rank one token's neurons, hold the engine's order against it, and make the inward values."""
        recipe, counts = self.recipe, self.recipe.counts(self.neurons)
        ranked = [part for part in PARTS[recipe.scorer] if part < len(self.weights)]
        seen = x
        if recipe.scorer == "inputs":  # the larger half of the model's own inputs
            seen = torch.zeros_like(x).index_copy(0, half := x.abs().argsort()[len(x) // 2 :], x[half])
        low = {part: self.matmuls(seen, part, recipe.rank) for part in ranked}
        score = torch.ones(())
        for part, value in low.items():
            score = score * (self.activation(value) if part == 0 else value)
        score = score.abs() * self.norms
        order = torch.from_numpy(self.orders.pop(0)).long()
        assert len(order) == sum(counts) == len(set(order.tolist()))
        best, first = score.sort(descending=True).values, 0
        for count in counts:  # within a class the order is free
            some = slice(first, first + count)
            off = (score[order[some]].sort(descending=True).values - best[some]).abs().max() if count else 0.0
            self.worst, first = max(self.worst, float(off / best[0].clamp_min(1e-20))), first + count
        precisions = torch.zeros(self.neurons, dtype=torch.long)
        precisions[order] = torch.repeat_interleave(torch.tensor([3, 2, 1]), torch.tensor(counts))
        values = torch.zeros(len(self.weights), self.neurons)
        for part in range(len(self.weights)):
            every = torch.stack(
                [torch.zeros(self.neurons), *(self.matmuls(x, part, precision) for precision in (1, 2, 3))]
            )
            values[part] = every.gather(0, precisions[None])[0]
            if part in low:  # what ranking has found is kept by whoever has no more planes
                values[part] = torch.where((precisions > 0) & (precisions <= recipe.rank), low[part], values[part])
        self.values.append(values)
        self.precisions.append(precisions)

    def _inward(self, parts: range) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            if parts.start == 0:
                self.values: list[Tensor] = []
                self.precisions: list[Tensor] = []
                for token in x.reshape(-1, x.shape[-1]):
                    self.choose(token)
            made = torch.stack([values[parts.start : parts.stop].flatten() for values in self.values])
            return made.view(*x.shape[:-1], -1)

        return forward

    def _outward(self, hidden: Tensor) -> Tensor:
        out = []
        for token, precisions in zip(hidden.reshape(-1, hidden.shape[-1]), self.precisions, strict=True):
            made = torch.zeros(self.down[0].shape[1])
            for precision in (1, 2, 3):
                made = made + token.where(precisions == precision, 0) @ self.down[precision - 1]
            out.append(made if self.out_bias is None else made + self.out_bias)
        return torch.stack(out).view(*hidden.shape[:-1], -1)


class Oracle:
    """A resident model with every linear weight rounded, and its feed-forward blocks as `Block`s."""

    def __init__(self, checkpoint: Path, made: Calibration, precision: str) -> None:
        self.model = tf.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
        found = meta_model.matrices(self.model)
        ffns = [[*ffn.inward, ffn.outward] for ffn in meta_model.ffns(found)]
        bundled = {matrix.module for ffn in ffns for matrix in ffn}
        text = self.model.config.get_text_config()
        name = next(getattr(text, name) for name in _ACTIVATIONS if getattr(text, name, None))
        self.blocks = [
            Block(self.model, ffn, recipe, norms, ACT2FN[name])
            for ffn, recipe, norms in zip(ffns, made.settings[0].recipes, made.norms, strict=True)
        ]
        for matrix in found:
            if matrix.module in bundled:
                continue
            module = self.model.get_submodule(matrix.module)
            rows = module.weight.data.T if matrix.transposed else module.weight.data
            at = _rungs(rows)[PRECISIONS.index(precision) if matrix.layer is not None else 2]
            module.weight = nn.Parameter(at.T.contiguous() if matrix.transposed else at, requires_grad=False)
            if matrix.layer is None:
                module.register_forward_hook(_shortlisted(_rungs(rows)[0]))

    def logits(self, recorded: dict[int, list[np.ndarray]], *arguments: Any, **named: Any) -> Any:
        """A pass whose neurons are those that the engine chose."""
        for place, block in enumerate(self.blocks):
            block.orders = list(recorded[place])
        with torch.no_grad():
            made = self.model(*arguments, **named)
        assert not any(block.orders for block in self.blocks), "the engine chose for more tokens than there were"
        return made

    @property
    def worst(self) -> float:
        """See `Block`."""
        return max(block.worst for block in self.blocks)


def _shortlisted(low: Tensor) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
    """What the head gives: logits at int3, but those of one token in twelve, the likeliest, as they are."""

    def hook(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        made = arguments[0] @ low.T
        likeliest = made.argsort(dim=-1, descending=True)[..., : -(-low.shape[0] // 24)]
        return made.scatter(-1, likeliest, output.gather(-1, likeliest))

    return hook


def _rungs(rows: Tensor, factors: Tensor | None = None) -> list[Tensor]:
    coded = planes.encode(stored(rows, factors))
    return [restored(coded.at(precision), factors, torch.empty(rows.shape)) for precision in PRECISIONS]


def apart(one: Tensor, other: Tensor) -> float:
    """The largest difference, in units of the other's RMS."""
    return float((one.float() - other.float()).abs().max() / other.float().pow(2).mean().sqrt())
