"""Learned rounding of one decoder layer: gradient steps move the code h by one where the layer's output gets better.

Knows a layer as a function of its weights and inputs, and the planes of its matrices; nothing of files or models.

AutoRound (arXiv 2309.05516) learns how weights are rounded from the output of a whole layer. Each weight has a latent
number that is rounded to its code. It takes steps of one size against the sign of its gradient, as if rounding had a
slope of one. The steps shrink to nothing by the end. Here the latent number is that of h (`quant.codes`), and the loss
is the sum of int3's and int4's, each relative to what it was. int8's weights stay as they are to the bit: an int4 cell
is 12 steps wide and c reaches over 16, so some of the weights (a third, after `quant.gptq`) can be written with either
of two h. Only these are learned, beginning with the codes of `quant.gptq`.

Those codes compensate one another's errors. Where many move at once, more is lost than gained. So each latent number
begins at a place of its own, halfway from h to where the weight itself lies. They reach the middle between two h one
after another, and most of them never do.

Some windows take no part in learning; the losses on them are watched. The codes that do best on them are kept. If none
are better than the first codes at both precisions, the first are kept.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.quant import hadamard
from tiercache.quant.codes import CELL, MIDDLES, TOP, values
from tiercache.quant.planes import Planes, codes_of, from_codes

LEARNED = ("int3", "int4")
"""Precisions whose losses are learned from; int8's weights do not change."""

BATCH = 2  # windows of a step
WATCHED = 8  # one window in so many takes no part in learning
_LOOKS = 10  # times that the watched windows are looked at
_TOWARDS = 0.5  # of the way from h to the weight's own place a latent number begins,
_NEAREST = 0.49  # but short of the middle between two h
_TRAVEL = 0.25  # how far it can get in all

BYTES = 32
"""Memory for each weight of the layer: two parameters and their slopes, the latent number, codes and planes twice, and
a little that the heap keeps."""

PIECE_BYTES = 48
"""Memory for each weight of one piece, in passing."""

Forward = Callable[[dict[str, Tensor], Tensor], Tensor]
"""The layer's output, of parameters by name (the rest are its own) and of the hidden states of one window."""


@dataclass(frozen=True)
class Layer:
    """A layer, and what goes in and comes out of it with the weights of the checkpoint.

    Parameters are by their names in the model; inputs and outputs are hidden states, fp32 [windows, tokens, features].
    """

    parameters: Mapping[str, Tensor]
    forward: Forward
    inputs: Tensor
    outputs: Tensor


@dataclass(frozen=True)
class CodedPiece:
    """Some rows of a parameter of the layer, and their planes.

    Attributes:
        parameter, first: the parameter's name in the model, and the first row.
        transposed: the planes hold the rows of the parameter's transpose.
        planes: all of them, as `hadamard.stored` says.
        factors: of their columns, fp32; None for ones.
    """

    parameter: str
    first: int
    transposed: bool
    planes: Planes
    factors: Tensor | None = None

    def of(self, parameter: Tensor) -> Tensor:
        """The rows that the planes hold."""
        return (parameter.T if self.transposed else parameter)[self.first : self.first + self.planes.rows]


def check_windows(windows: int) -> None:
    """Refuse a text that leaves nothing to learn from, or nothing to watch, with a UsageError."""
    if windows < 2:
        raise UsageError("tuning needs two windows of text or more; give more tokens, or a longer text")


def passes(windows: int, steps: int) -> int:
    """How many times tuning takes a window through the layer at one precision; a way back counts as two."""
    if not steps:
        return 0
    return 3 * min(BATCH, windows - _watched(windows)) * steps + (min(_LOOKS, steps) + 1) * _watched(windows)


def _watched(windows: int) -> int:
    return max(1, windows // WATCHED)


def tuned(layer: Layer, pieces: Sequence[CodedPiece], steps: int, seed: int) -> list[Planes]:
    """The planes of all quantised pieces of a layer, with codes that are better for the layer's output.

    `seed` decides which windows are drawn for each of the `steps`.
    """
    check_windows(len(layer.inputs))
    learner = _Learner(layer, pieces)
    drawn = torch.Generator().manual_seed(seed)
    kept, least = [latent.h for latent in learner.latents], 1.0
    for step in range(steps):
        windows = torch.randperm(learner.learned, generator=drawn)[:BATCH].tolist()
        learner.step(windows, rate=2 * _TRAVEL * (1 - step / steps) / steps)
        if (step + 1) * _LOOKS // steps > step * _LOOKS // steps:
            losses = learner.watch()
            loss = sum(losses) / len(losses)
            if loss < least and max(losses) < 1:
                kept, least = [latent.rounded() for latent in learner.latents], loss
    return [latent.planes(h) for latent, h in zip(learner.latents, kept, strict=True)]


class _Latent:
    """The codes of a piece while they are learned; `weight` (fp32) is what they stand for."""

    def __init__(self, piece: CodedPiece, weight: Tensor) -> None:
        self.piece = piece
        self.h, c = codes_of(piece.planes)
        self._sum = self.h.short() * CELL + c
        lo, step = self._scales()
        scale = torch.where(step > 0, 1 / step.float(), 0)
        place = ((hadamard.stored(weight, piece.factors) - lo.float()) * scale - MIDDLES[1]) / CELL
        self._z = self.h + (_TOWARDS * (place - self.h)).clamp_(-_NEAREST, _NEAREST)

    def _scales(self) -> list[Tensor]:
        """lo and step of each weight."""
        planes = self.piece.planes
        return [one.repeat_interleave(planes.group, 1)[:, : planes.columns] for one in planes.scales.unbind(-1)]

    def bounds(self) -> tuple[Tensor, Tensor]:
        """The least and the largest h that leave 12 h + c as it is: [rows, columns] each."""
        least = (self._sum - TOP + CELL - 1).div_(CELL, rounding_mode="floor").clamp_(0)
        return least, (self._sum // CELL).clamp_(max=TOP)

    def rounded(self) -> Tensor:
        """h, as it stands."""
        least, most = self.bounds()
        return self._z.round().clamp_(least, most).to(torch.uint8)

    def move(self, slope: Tensor, rate: float) -> None:
        """A step against the sign of the loss's slope, which steps, never negative, do not change.

        The transform is its own transpose, so that slopes of rows become slopes of what is stored by it.
        """
        factors = self.piece.factors
        self._z -= rate * hadamard.transform(slope if factors is None else slope * factors).sign()

    def put(self, parameters: Sequence[Tensor]) -> None:
        """Set the parameters, one for each of `LEARNED`, to what the codes stand for."""
        h = self.rounded()
        made = values(h, self._lower(h), *self._scales())
        for parameter, weight in zip(parameters, made, strict=False):
            rows = hadamard.transform(weight)
            self.piece.of(parameter).copy_(rows if self.piece.factors is None else rows.mul_(self.piece.factors))

    def planes(self, h: Tensor) -> Planes:
        """Planes with these h."""
        return from_codes(h, self._lower(h), self.piece.planes.scales, self.piece.planes.group)

    def _lower(self, h: Tensor) -> Tensor:
        """c beside these h."""
        return (self._sum - h.short() * CELL).to(torch.uint8)


class _Learner:
    """A layer's weights at two precisions, learned together."""

    def __init__(self, layer: Layer, pieces: Sequence[CodedPiece]) -> None:
        self._layer, own = layer, layer.parameters
        self.latents = [_Latent(piece, piece.of(own[piece.parameter]).float()) for piece in pieces]
        names = dict.fromkeys(piece.parameter for piece in pieces)
        self._weights = [{name: own[name].float().clone() for name in names} for _ in LEARNED]
        self.learned = len(layer.inputs) - _watched(len(layer.inputs))  # windows to learn from, the first ones
        self._scale = [1.0] * len(LEARNED)
        self._scale = [1 / loss if loss else 1.0 for loss in self.watch()]

    def step(self, windows: list[int], rate: float) -> None:
        """Learn from some windows."""
        self._put()
        for weights, scale in zip(self._weights, self._scale, strict=True):
            for weight in weights.values():
                weight.requires_grad_()
            for window in windows:
                with torch.enable_grad():
                    (self._loss(weights, window) * scale).backward()
        for latent in self.latents:
            grads = [weights[latent.piece.parameter].grad for weights in self._weights]
            slopes = [latent.piece.of(grad) for grad in grads if grad is not None]
            latent.move(sum(slopes[1:], slopes[0]), rate)
        for weights in self._weights:
            for weight in weights.values():
                weight.requires_grad_(False).grad = None

    def watch(self) -> list[float]:
        """The losses on the windows that are watched, relative to the first time."""
        self._put()
        watched = range(self.learned, len(self._layer.inputs))
        with torch.no_grad():
            sums = [sum(float(self._loss(weights, window)) for window in watched) for weights in self._weights]
        return [loss * scale for loss, scale in zip(sums, self._scale, strict=True)]

    def _put(self) -> None:
        for latent in self.latents:
            latent.put([weights[latent.piece.parameter] for weights in self._weights])

    def _loss(self, weights: dict[str, Tensor], window: int) -> Tensor:
        made = self._layer.forward(weights, self._layer.inputs[window])
        return (made - self._layer.outputs[window]).square().mean()
