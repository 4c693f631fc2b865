"""GPTQ for nested planes: each weight's codes compensate the errors of the weights before it, at every precision.

Knows one matrix and the second moments of its inputs; nothing of models, text or files.

GPTQ (arXiv 2210.17323, algorithm 1) quantises a matrix input by input. Rounding the weights of input j changes the
outputs. The weights of the inputs after j are changed so that they take this back as well as they can; this is called
*error feedback*. How much each must change follows from the *Hessian* of the squared output error, X^T X.

Here one pair of codes serves three precisions, which make different errors. So the weights that remain are kept three
times, as one state for each precision, and each state gets the feedback of its own errors alone. The codes of an input
are those whose weighted errors against the three states are least (`codes.nearest_codes`). Inputs with the largest
second moments come first, because most inputs are then left to take their errors back. Inputs that share a group stay
together, because they share its scales.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tiercache.errors import QuantizationError
from tiercache.quant import hadamard
from tiercache.quant.codes import nearest_codes, ranges, values
from tiercache.quant.planes import Planes, from_codes, num_groups

DAMPING = 0.1
"""Share of the mean second moment that is added to each input's; with .3 int4 lost 7 % more."""

INPUT_POWER = 0.25
"""Inputs are divided by their root mean square to this power, and weights multiplied, as in AWQ (arXiv 2306.00978,
section 3.2), whose search finds powers around 1/2: it has no error feedback beside it."""

_SIZES = (1e-2, 1e2)  # an input's root mean square over the mean one: bounds scales, also of inputs that never come
STATES = 3  # int3, int4 and int8, in the order of `codes.nearest_codes`
REFINEMENTS = 2  # passes of `refined`
_BATCH = 64  # inputs whose errors reach the rest of the matrix together: GPTQ's lazy batches
CHUNK_WEIGHTS = 4 << 20  # of a matrix at a time
CHUNK_BYTES = 84
"""Memory for each weight of a chunk, measured: three states, what is made of them, their errors and their slopes."""


@dataclass(frozen=True)
class Moments:
    """How the inputs of a matrix move together, prepared for quantising: times their factors, and transformed.

    Inputs that have a row of their own, as neurons have in a down matrix, are left as they are.

    Attributes:
        order: inputs, in the order in which they are quantised.
        spread: upper Cholesky factor of the inverse Hessian, rows and columns in that order: [inputs, inputs].
        hessian: itself, damped, rows and columns as they were.
        factors: of the inputs, fp32 [inputs]; None for ones.
    """

    order: Tensor
    spread: Tensor
    hessian: Tensor
    factors: Tensor | None = None

    @classmethod
    def of(cls, hessian: Tensor, group: int | None, *, scaled: bool = False) -> "Moments":
        """Prepare a Hessian (fp32 [inputs, inputs], sum of x x^T over tokens).

        Args:
            hessian: it is damped in place and kept.
            group: inputs that share scales, which stay together; None where each input has scales of its own. The last
                group may be short.
            scaled: give the inputs factors, so that weights of large inputs have finer steps than others.

        Raises QuantizationError where it is not finite, so the model's activations are not.
        """
        energy = hessian.diagonal().clone()
        mean = energy.mean()
        if not bool(torch.isfinite(mean)):
            raise QuantizationError("the activations of the calibration text are not finite; convert with --plain")
        factors = None
        if scaled:
            size = (energy / mean.clamp_min(torch.finfo(torch.float32).tiny)).sqrt_()
            factors = size.clamp_(*_SIZES).pow_(-INPUT_POWER)
            hessian.mul_(factors).mul_(factors[:, None])
        if group is not None:
            _transform(hessian)
        energy = hessian.diagonal().clone()
        mean = energy.mean()
        hessian.diagonal().add_(DAMPING * mean + torch.finfo(torch.float32).tiny)
        order = _order(energy, group)
        lower = torch.linalg.cholesky(hessian[order][:, order])
        inverse = torch.cholesky_inverse(lower)
        del lower
        return cls(order, torch.linalg.cholesky(inverse, upper=True), hessian, factors)


class LayerMoments:
    """The moments of a layer's modules, each prepared when it is first asked for.

    `hessians` are by module, and used up; modules with the same inputs share one. `scaled` is as in `Moments.of`.
    """

    def __init__(self, hessians: dict[str, Tensor], *, scaled: bool = False) -> None:
        self._hessians, self._scaled = hessians, scaled
        self._made: dict[int, Moments] = {}  # by the Hessian's identity

    def of(self, module: str, group: int | None) -> Moments:
        """See `Moments.of`; modules that share inputs share what is made of them."""
        hessian = self._hessians[module]
        if id(hessian) not in self._made:
            self._made[id(hessian)] = Moments.of(hessian, group, scaled=self._scaled and group is not None)
        return self._made[id(hessian)]

    def digest(self, module: str) -> str:
        """16 hex digits of the SHA-256 of a module's input factors, whose moments have been made; "" for ones."""
        factors = self._made[id(self._hessians[module])].factors
        return "" if factors is None else hashlib.sha256(factors.numpy().tobytes()).hexdigest()[:16]


def _transform(hessian: Tensor) -> None:
    """Make the Hessian of inputs that of transformed inputs, in place."""
    for matrix in (hessian, hessian.T):
        for rows in matrix.split(max(1, CHUNK_WEIGHTS // len(hessian))):
            rows.copy_(hadamard.transform(rows))


def _order(energy: Tensor, group: int | None) -> Tensor:
    """Inputs by energy, groups kept together."""
    if group is None:
        return torch.argsort(energy, descending=True, stable=True)
    whole = num_groups(len(energy), group)
    padded = torch.nn.functional.pad(energy, (0, whole * group - len(energy)), value=-1.0).view(whole, group)
    within = torch.argsort(padded, dim=1, descending=True, stable=True)
    groups = torch.argsort(padded.clamp_min(0).sum(dim=1), descending=True, stable=True)
    order = (groups[:, None] * group + within[groups]).flatten()
    return order[order < len(energy)]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads: a thousand small operations wait for no core that others hold."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def quantize_rows(weight: Tensor, moments: Moments, group: int) -> Planes:
    """Codes of `weight` [outputs, inputs] (fp32, fp16 or bf16), whose groups run along its inputs.

    Rows are held as `hadamard.stored` says. `moments` were made with the same `group`.

    Raises QuantizationError for weights that are not finite, or beyond fp16.
    """
    outputs, inputs = weight.shape
    groups = num_groups(inputs, group)
    scales = torch.zeros(outputs, groups, 2, dtype=torch.float16)
    codes = torch.zeros(2, outputs, inputs, dtype=torch.uint8)
    high = max(1, CHUNK_WEIGHTS // inputs)
    for first in range(0, outputs, high):
        r = slice(first, min(outputs, first + high))
        part = hadamard.stored(weight[r], moments.factors)
        feedback, before = _ErrorFeedback(part, moments), -1
        with threads(1):
            for index in moments.order.tolist():
                place = index // group
                if place != before:
                    ahead = feedback.ahead(min(group, inputs - place * group))  # [states, outputs, inputs of the group]
                    lo, step = ranges(ahead.amin((0, 2))[:, None], ahead.amax((0, 2))[:, None], first_row=first)
                    scales[r, place, 0], scales[r, place, 1], before = lo[:, 0], step[:, 0], place
                codes[:, r, index] = feedback.step(*scales[r, place].unbind(-1))
        of_input = scales[r].repeat_interleave(group, dim=1)[:, :inputs].permute(1, 2, 0)
        codes[:, r] = refined(part, moments, codes[:, r], of_input)
    return from_codes(codes[0], codes[1], scales, group)


def quantize_columns(weight: Tensor, moments: Moments, group: int, factors: Tensor) -> Planes:
    """Codes of `weight` [inputs, outputs], stored input by input: the groups run along its outputs.

    Rows are held as `hadamard.stored` says, divided by the outputs' `factors` (fp32 [outputs]).

    Raises QuantizationError as `quantize_rows` does.
    """
    inputs, outputs = weight.shape
    groups = num_groups(outputs, group)
    scales = torch.zeros(inputs, groups, 2, dtype=torch.float16)
    codes = torch.zeros(2, groups * group, inputs, dtype=torch.uint8)
    least = max(1, hadamard.BLOCK // group)  # groups of a block of the transform
    wide = max(least, CHUNK_WEIGHTS // (inputs * group) // least * least)
    for first in range(0, groups, wide):
        g = slice(first, min(groups, first + wide))
        columns, padded = slice(first * group, min(outputs, g.stop * group)), slice(first * group, g.stop * group)
        part = hadamard.stored(weight[:, columns], factors[columns]).T
        ragged = (g.stop - g.start) * group - part.shape[0]
        if ragged:  # repeat the last output: it changes no group's range
            part = torch.cat([part, part[-1:].expand(ragged, -1)])
        feedback = _ErrorFeedback(part, moments)
        with threads(1):
            for index in moments.order.tolist():
                ahead = feedback.ahead(1).view(STATES, -1, group)  # [states, groups, outputs of the group]
                lo, step = ranges(ahead.amin((0, 2))[:, None], ahead.amax((0, 2))[:, None], first_row=index)
                scales[index, g, 0], scales[index, g, 1] = lo[:, 0], step[:, 0]
                codes[:, padded, index] = feedback.step(*scales[index, g].repeat_interleave(group, dim=0).unbind(-1))
        of_input = scales[:, g].repeat_interleave(group, dim=1).permute(0, 2, 1)
        codes[:, padded] = refined(part, moments, codes[:, padded], of_input)
    h, c = codes[:, :outputs].transpose(1, 2)
    return from_codes(h, c, scales, group)


def refined(weight: Tensor, moments: Moments, codes: Tensor, scales: Tensor) -> Tensor:
    """Better codes under the same scales: each input's in turn is chosen again, now that all others are known.

    Coordinate descent on the same squared errors (QuantEase, arXiv 2309.01885, algorithm 1), with a state for each
    precision. It takes a quarter to a tenth off int3's and int4's squared errors.

    `weight` is fp32 [outputs, inputs], `codes` are h and c, uint8 [2, outputs, inputs], and `scales` are lo and step,
    fp16 [inputs, 2, outputs].
    """
    hessian = moments.hessian
    codes = codes.permute(2, 0, 1).contiguous()  # inputs first: [inputs, 2, outputs]
    shape = len(codes), STATES, codes.shape[2]
    made = torch.stack([values(h, c, lo, step) for (h, c), (lo, step) in zip(codes, scales, strict=True)])
    slope = (hessian @ (made - weight.T[:, None]).flatten(1)).view(shape)  # of half the squared errors
    changes = torch.empty(_BATCH, *shape[1:])
    for batch in moments.order.repeat(REFINEMENTS).split(_BATCH):
        among = hessian[batch][:, batch]
        with threads(1):
            for at, index in enumerate(batch.tolist()):
                here = slope[index] + (among[at, :at] @ changes[:at].flatten(1)).view(shape[1:])
                wanted = made[index] - here / hessian[index, index]
                h, c = nearest_codes(wanted[0], wanted[1], wanted[2], *scales[index])
                changed = values(h, c, *scales[index])
                changes[at] = changed - made[index]
                codes[index, 0], codes[index, 1], made[index] = h, c, changed
        slope += (hessian[:, batch] @ changes[: len(batch)].flatten(1)).view(shape)
    return codes.permute(1, 2, 0)


class _ErrorFeedback:
    """The states of a `weight` [outputs, inputs]: its inputs that remain, with the feedback of errors so far."""

    def __init__(self, weight: Tensor, moments: Moments) -> None:
        self._spread = moments.spread
        # inputs first, so that one of them lies in one piece: [inputs, states, outputs]
        self._left = weight.T[moments.order][:, None].repeat(1, STATES, 1)
        self._errors = torch.empty(min(_BATCH, len(self._left)), *self._left.shape[1:])
        self._at, self._threads = 0, torch.get_num_threads()

    def ahead(self, count: int) -> Tensor:
        """What the states want the next inputs to be: [states, outputs, count]."""
        return self._settled(self._at, self._at + count).permute(1, 2, 0)

    def step(self, lo: Tensor, step: Tensor) -> Tensor:
        """Choose the next input's codes, h and c [2, outputs], and pass on the errors."""
        at, first = self._at, self._at - self._at % _BATCH
        wanted = self._settled(at, at + 1)[0]  # [states, outputs]
        h, c = nearest_codes(wanted[0], wanted[1], wanted[2], lo, step)
        self._errors[at - first] = (wanted - values(h, c, lo, step)) / self._spread[at, at]
        self._at += 1
        if self._at % _BATCH == 0 and self._at < len(self._left):
            flat = self._left[self._at :].flatten(1)
            with threads(self._threads):
                flat -= self._spread[first : self._at, self._at :].T @ self._errors.flatten(1)
        return torch.stack([h, c])

    def _settled(self, begin: int, end: int) -> Tensor:
        """Inputs less the errors of their own batch, as far as they are chosen: [count, states, outputs]."""
        first = self._at - self._at % _BATCH
        made = self._at - first
        if not made:
            return self._left[begin:end]
        back = self._spread[first : self._at, begin:end].T @ self._errors[:made].flatten(1)
        return self._left[begin:end] - back.view(end - begin, *self._left.shape[1:])
