"""One chunk of text through the exact model: what every block shows in its turn is added to the sums.

A block's errors are taken relative to the residual stream behind its layer, token by token, since a model's first token
may have a stream thousands of times as large as all others. Knows blocks and tensors; not where sums are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from policies.precision import PRECISION_NAMES, TOP
from profiler.trace import Trace
from tiercache.calibrate.sums import HALVES, PAIRED, POINTS, QUANTILES, RANKS, UNIONS, Sums, scorers
from tiercache.engine import mixed_plan
from tiercache.kernels.contract import MAX_TOKENS
from tiercache.model.importance import SCORERS, largest, needed, previous, recall, scores
from tiercache.model.mixed import MixedBlock, Seen
from tiercache.quant.hadamard import restored
from tiercache.quant.planes import Planes
from tiercache.store.activations import layer_name

# Tokens of a window whose neurons are put in order by every scorer, evenly taken. Sorting was nine tenths of a
# calibration; what comes of it are means over all windows, which rank the candidates that are then measured.
_ORDERED = 32
_DECODED_BYTES = 64 << 20
_TINY = 1e-30
_SLICE = 128  # tokens whose errors are made at a time


@contextmanager
def watching(model: Any, see: Callable[[int, Seen], None]) -> Iterator[None]:
    """Exact passes within tell `see` what each block has, by its place."""
    with ExitStack() as stack:
        for place, block in enumerate(model.tiercache.mixed.blocks):
            block.watch = partial(see, place)
            stack.callback(setattr, block, "watch", None)
        stack.enter_context(model.tiercache.passes("exact"))
        yield


@dataclass(frozen=True)
class _Pending:
    """Squares of a block, token by token, until the residual stream behind it is known.

    Attributes:
        losses: [2, tokens], errors of the whole block at int3 and int4.
        output: [tokens], of the block itself.
        curves: [scorers, ranks, precisions, ordered tokens, points].
        some: which tokens have curves.
    """

    losses: Tensor
    output: Tensor
    curves: Tensor
    some: slice


class Collector:
    """Adds to `sums` what the blocks of a model show, which is attached in mixed mode."""

    def __init__(self, model: Any, sums: Sums) -> None:
        self._model, self.sums = model, sums
        self._blocks: Sequence[MixedBlock] = model.tiercache.mixed.blocks
        self._activation = mixed_plan.activation_of(model)
        self._pending: dict[int, _Pending] = {}
        self._inward = self._blocks[0].sizes.inward

    def run(self, window: Tensor) -> None:
        """One window of tokens."""
        with ExitStack() as stack:
            stack.enter_context(watching(self._model, self._see))
            for place, block in enumerate(self._blocks):
                name = layer_name(block.planes.block.outward)
                if name is not None:
                    layer = self._model.get_submodule(name)
                    stack.enter_context(layer.register_forward_hook(partial(self._note, place)))
            self._model(input_ids=window[None].to(self._model.device), use_cache=False)
        for place in list(self._pending):
            self._finish(place, self._pending[place].output)

    def _note(self, place: int, _layer: nn.Module, _arguments: Any, output: Any) -> None:
        """The residual stream behind a block's layer."""
        if place in self._pending:
            stream = output[0] if isinstance(output, tuple) else output
            squares = _squares(stream.detach().float().reshape(-1, stream.shape[-1]))
            self._finish(place, squares.to(self._pending[place].output.device))

    def _finish(self, place: int, stream: Tensor) -> None:
        """Errors relative to the residual stream [tokens], squared."""
        pending, sums = self._pending.pop(place), self.sums
        sums["losses"][place, :2] += _sum(pending.losses / stream.clamp_min(_TINY))
        sums["own_losses"][place, :2] += _sum(pending.losses / pending.output.clamp_min(_TINY))
        relative = pending.curves / stream[pending.some].clamp_min(_TINY)[:, None]
        sums["curves"][place] += relative.double().sum(dim=3).cpu().numpy()

    def _see(self, place: int, seen: Seen) -> None:
        """A block's turn, while its planes are at hand."""
        block, sums = self._blocks[place], self.sums
        if not sums["chunks"][place]:
            self._norms(place)
        norms = torch.from_numpy(sums["norms"][place]).to(seen.x.device, torch.float32)
        hidden = seen.hidden.float()
        truth = hidden.abs() * norms
        ordered = truth.argsort(dim=1, descending=True, stable=True)
        self._count(place, truth, ordered, hidden)
        values = [made_at(block, seen.x, precision) for precision in RANKS]
        losses = torch.stack(
            [self._lost(block, made, precision, seen) for made, precision in zip(values, RANKS, strict=True)]
        )
        step = max(1, len(truth) // _ORDERED)
        some = slice(0, len(truth), step)
        curves = torch.zeros(*sums["curves"].shape[1:4], len(truth[some]), POINTS, device=truth.device)
        sums["ordered"][place] += len(truth[some])
        x, true, exact = seen.x[some], truth[some], hidden[some]
        parts = [[value[some] for value in made] for made in values]
        for s, name in enumerate(scorers(self._inward)):
            for r, rank in enumerate(RANKS):
                guess = self._guess(block, x, name, rank, parts[r], norms)
                sums["thresholds"][place, s, r] += _quantiles(guess)
                for h, half in enumerate(HALVES):
                    sums["recall"][place, s, r, h] += recall(guess, true, half) * len(true)
                order = guess.argsort(dim=1, descending=True, stable=True)
                errors = self._errors(place, name, r, parts, exact, x.dtype)
                curves[s, r] = torch.stack([_curve(error.gather(1, order)) for error in errors])
        self._pending[place] = _Pending(losses, _squares(seen.output), curves, some)
        sums["chunks"][place] += 1
        sums["tokens"][place] += len(truth)

    def _norms(self, place: int) -> None:
        """Squared lengths of the down columns at each precision, and how each lies to its best, some rows at a time."""
        squares, dots, norms = [], [], []
        planes = self._blocks[place].planes
        for _, parts in planes.chunks(slice(-1, None)):
            for piece in _pieces(parts[-1]):
                room = torch.empty(1 + len(RANKS), piece.rows, piece.columns, device=piece.scales.device)
                best, *rough = (
                    restored(piece.at(PRECISION_NAMES[precision]), planes.output_factors, out)
                    for precision, out in zip((TOP, *RANKS), room, strict=True)
                )
                norms.append(best.norm(dim=1))
                squares.append(torch.stack([_squares(made) for made in rough]))
                dots.append(torch.stack([(made * best).sum(dim=1) for made in rough]))
        self.sums["norms"][place] = torch.cat(norms).cpu().numpy()
        self.sums["squares"][place] = torch.cat(squares, dim=1).cpu().numpy()
        self.sums["dots"][place] = torch.cat(dots, dim=1).cpu().numpy()

    def _count(self, place: int, truth: Tensor, ordered: Tensor, hidden: Tensor) -> None:
        """What only the truth is needed for."""
        sums, neurons = self.sums, truth.shape[1]
        counts = [max(1, round(half * neurons)) for half in HALVES]
        among = torch.zeros_like(truth).scatter_(1, ordered[:, : counts[-1]], 1.0)
        among *= truth > 0  # where more than half are exactly zero, the rest of the half is nobody
        sums["frequency"][place] += among.sum(dim=0, dtype=torch.float64).cpu().numpy()
        sums["zeros"][place] += float((hidden == 0).float().mean(dim=1).sum())
        self._pair(place, among)
        trace = Trace(neurons, [counts], [ordered[:, : counts[-1]].cpu().numpy()])
        pairs = max(0, len(truth) - 1)
        sums["neighbours"][place] += pairs
        for h, half in enumerate(HALVES):
            sums["overlap"][place, h] += trace.adjacent_overlap(h)[0][0] * pairs
            if pairs:
                sums["previous"][place, h] += recall(previous(truth), truth[1:], half) * pairs
            for window, share in trace.union_sizes(UNIONS, h).items():
                at = UNIONS.index(window)
                sums["unions"][place, h, at] += share[0] * (len(truth) - window + 1)
                sums["union_runs"][place, at] += (len(truth) - window + 1) / len(HALVES)

    def _pair(self, place: int, among: Tensor) -> None:
        """Co-activation of the neurons that the first chunk found important most often."""
        sums = self.sums
        if not sums["chunks"][place]:
            often = among.sum(dim=0).argsort(descending=True, stable=True)[:PAIRED]
            sums["pair_of"][place] = often.cpu().numpy()
        chosen = among[:, torch.from_numpy(sums["pair_of"][place]).long().to(among.device)]
        sums["pairs"][place] += (chosen.T @ chosen).double().cpu().numpy()
        sums["pair_frequency"][place] += chosen.sum(dim=0, dtype=torch.float64).cpu().numpy()

    def _hidden(self, values: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """What the model makes of inward products, in its own dtype."""
        made = self._activation(values[0].to(dtype))
        return made if len(values) == 1 else made * values[1].to(dtype)

    def _lost(self, block: MixedBlock, values: Sequence[Tensor], precision: int, seen: Seen) -> Tensor:
        """What each token's output is off by, squared, with everything at a precision."""
        lost = []
        for start in range(0, len(seen.x), _SLICE):
            here = slice(start, start + _SLICE)
            made = block.down(self._hidden([value[here] for value in values], seen.x.dtype), precision)
            lost.append(_squares(made - seen.output[here]))
        return torch.cat(lost)

    def _guess(
        self, block: MixedBlock, x: Tensor, name: str, rank: int, values: Sequence[Tensor], norms: Tensor
    ) -> Tensor:
        """Scores [tokens, neurons] of a scorer that has `rank` planes; `values` are the inward products with them."""
        if SCORERS[name].channels < 1:
            values = made_at(block, largest(x, SCORERS[name].channels), rank)
        parts = needed(name, self._inward)
        known = [value if part in parts else None for part, value in enumerate(values)]
        return scores(known, self._activation, norms)

    def _errors(
        self, place: int, name: str, r: int, values: Sequence[Sequence[Tensor]], exact: Tensor, dtype: torch.dtype
    ) -> list[Tensor]:
        """What each neuron's share of the output is off by, squared, if it is skipped, or has 1 or 2 planes.

        Rows that the ranking has read with more planes than the precision has keep those products.
        """
        sums, parts = self.sums, needed(name, self._inward)
        norms = torch.from_numpy(sums["norms"][place]).to(exact.device, torch.float32)
        found = [(exact * norms).square()]
        for precision in range(len(RANKS)):
            mixed = [values[max(precision, r) if part in parts else precision][part] for part in range(self._inward)]
            made = self._hidden(mixed, dtype).float()
            dots = torch.from_numpy(sums["dots"][place, precision]).to(exact.device, torch.float32)
            squares = torch.from_numpy(sums["squares"][place, precision]).to(exact.device, torch.float32)
            error = found[0] - 2 * exact * made * dots + made.square() * squares
            found.append(error.clamp_min(0))
        return found


def made_at(block: MixedBlock, x: Tensor, precision: int) -> list[Tensor]:
    """All inward products at a precision, of any number of tokens; within the block's turn."""
    pieces = [block.matmuls(piece, precision) for piece in x.split(MAX_TOKENS)]
    return [torch.cat(same) for same in zip(*pieces, strict=True)]


def _pieces(planes: Planes) -> Iterator[Planes]:
    """Rows of a matrix, as many at a time as may be decoded."""
    step = max(1, _DECODED_BYTES // (4 * planes.columns))
    for at in range(0, planes.rows, step):
        some = slice(at, at + step)
        yield replace(planes, planes=tuple(plane[some] for plane in planes.planes), scales=planes.scales[some])


def _curve(sorted_errors: Tensor) -> Tensor:
    """Errors of the first so many neurons together: [tokens, neurons] -> [tokens, points]."""
    total = torch.nn.functional.pad(sorted_errors.cumsum(dim=1), (1, 0))
    at = torch.linspace(0, sorted_errors.shape[1], POINTS, dtype=torch.float64, device=total.device)
    low = at.floor().long()
    high = (low + 1).clamp_max(sorted_errors.shape[1])
    part = (at - low).to(total.dtype)
    return total[:, low] * (1 - part) + total[:, high] * part


def _quantiles(values: Tensor) -> np.ndarray:
    """Of all scores."""
    taken = values.reshape(-1).sort().values
    at = [min(len(taken) - 1, int(quantile * len(taken))) for quantile in QUANTILES]
    return taken[at].double().cpu().numpy()


def _squares(rows: Tensor) -> Tensor:
    return rows.square().sum(dim=-1)


def _sum(per_token: Tensor) -> np.ndarray:
    return per_token.double().sum(dim=1).cpu().numpy()
