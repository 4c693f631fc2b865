"""Which nested quantisation loses least: the experiment behind `tiercache/planes.py`.

Compares, at each rung, nested codes (truncated, rounded once or twice; middle or least-squares levels; groups
of 32, 64, 128; 16- or 8-bit scales) with direct quantisation at that width: squared error on Gaussian and on
pico weights, and what pico then says on held-out text. Run from the repository's root:

    python -m examples.pico.rungs --checkpoint examples/pico/checkpoint --json /tmp/rungs.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from tiercache.planes import RUNGS, decode, encode

from .perplexity import heldout_tokens

BITS = {"int2": 2, "int4": 4, "int8": 8}
_FIXED_GAIN = {2: 17 / 16, 4: 65 / 64, 8: 1.0}
_WINDOW = 512
_TEMPERATURE = 0.8  # of the acceptance figure, as in reference/prototype.md


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to quantise.

    scheme: the codes. Nested: planes (planes.py), truncate, round, double, clip; one code per width: direct,
    direct-clip. fit: the reconstruction. middle; a gain, see `_fitted`: fixed, least, unbiased; or group: lo
    and step anew for each rung, which costs their bits again.
    """

    name: str
    scheme: str = "planes"
    fit: str = "middle"
    group: int = 64
    scale_bits: int = 16

    def bits(self, rung: str) -> float:
        """Bits per weight that a pass at `rung` reads, scales included."""
        return BITS[rung] + 2 * self.scale_bits / self.group

    def rebuild(self, weight: Tensor, rung: str) -> Tensor:
        """`weight` [rows, columns] in fp32, quantised and back."""
        if self.scheme == "planes":
            return decode(encode(weight, self.group).at(rung), torch.float32)
        columns = weight.shape[1]
        ragged = -columns % self.group
        padded = torch.cat([weight, weight[:, -1:].expand(-1, ragged)], dim=1)
        values = padded.unflatten(1, (-1, self.group))  # [rows, groups, group]
        return _SCHEMES[self.scheme](values, BITS[rung], self).flatten(1)[:, :columns]


VARIANTS = (
    Variant(name="nested (planes.py's choice)"),
    Variant(name="nested, group 32", group=32),
    Variant(name="nested, group 128", group=128),
    Variant(name="nested, 8-bit scales", scheme="truncate", scale_bits=8),
    Variant(name="nested, 8-bit scales, group 32", scheme="truncate", scale_bits=8, group=32),
    Variant(name="nested, levels spread by 1/16, 1/64", scheme="truncate", fit="fixed"),
    Variant(name="nested, unbiased gain", scheme="truncate", fit="unbiased"),
    Variant(name="nested, unbiased gain, group 32", scheme="truncate", fit="unbiased", group=32),
    Variant(name="nested, unbiased gain, group 128", scheme="truncate", fit="unbiased", group=128),
    Variant(name="nested, least-squares gain", scheme="truncate", fit="least"),
    Variant(name="nested, least squares per group", scheme="truncate", fit="group"),
    Variant(name="nested, int8 rounded, then truncated", scheme="round"),
    Variant(name="nested, rounded twice", scheme="double"),
    Variant(name="nested, rounded twice, unbiased gain", scheme="double", fit="unbiased"),
    Variant(name="nested, range clipped for int4", scheme="clip"),
    Variant(name="direct", scheme="direct"),
    Variant(name="direct, group 32", scheme="direct", group=32),
    Variant(name="direct, group 128", scheme="direct", group=128),
    Variant(name="direct, best clipping", scheme="direct-clip"),
)


# Codes. Each takes values [rows, groups, group] and returns them rebuilt at `bits`.


def _truncate(values: Tensor, bits: int, variant: Variant) -> Tensor:
    lo, step = _stored(values.amin(-1, True), values.amax(-1, True), 256, variant.scale_bits)
    return _cut(values, lo, step, bits, variant)


def _clip(values: Tensor, bits: int, variant: Variant) -> Tensor:
    """Truncation inside the range that is best for int4: what lies outside is lost to int8 too."""

    def attempt(lo: Tensor, hi: Tensor, width: int) -> Tensor:
        return _cut(values, *_stored(lo, hi, 256, variant.scale_bits), width, variant)

    best = _best_shrink(values, lambda lo, hi: attempt(lo, hi, 4))
    return attempt(values.amin(-1, True) * best, values.amax(-1, True) * best, bits)


def _cut(values: Tensor, lo: Tensor, step: Tensor, bits: int, variant: Variant) -> Tensor:
    codes = ((values - lo) / step).floor().clamp(0, 255)
    cell = 2 ** (8 - bits)
    return _fitted(values, lo, step, (codes / cell).floor() * cell + cell / 2, bits, variant.fit)


def _round(values: Tensor, bits: int, variant: Variant) -> Tensor:
    """The 8-bit code is a rounded one; a lower rung truncates that code."""
    lo, step = _stored(values.amin(-1, True), values.amax(-1, True), 255, variant.scale_bits)
    codes = ((values - lo) / step).round().clamp(0, 255)
    cell = 2 ** (8 - bits)
    return _fitted(values, lo, step, (codes / cell).floor() * cell + (cell - 1) / 2, bits, variant.fit)


def _double(values: Tensor, bits: int, variant: Variant) -> Tensor:
    """Double Rounding: the 8-bit code is a rounded one, and a lower rung rounds that code again."""
    lo, step = _stored(values.amin(-1, True), values.amax(-1, True), 255, variant.scale_bits)
    codes = ((values - lo) / step).round().clamp(0, 255)
    cell = 2 ** (8 - bits)
    return _fitted(values, lo, step, (codes / cell).round().clamp(0, 2**bits - 1) * cell, bits, variant.fit)


def _direct(values: Tensor, bits: int, variant: Variant) -> Tensor:
    return _round_to_nearest(values, values.amin(-1, True), values.amax(-1, True), bits, variant.scale_bits)


def _direct_clip(values: Tensor, bits: int, variant: Variant) -> Tensor:
    def attempt(lo: Tensor, hi: Tensor) -> Tensor:
        return _round_to_nearest(values, lo, hi, bits, variant.scale_bits)

    best = _best_shrink(values, attempt)
    return attempt(values.amin(-1, True) * best, values.amax(-1, True) * best)


_SCHEMES: Mapping[str, Callable[[Tensor, int, Variant], Tensor]] = {
    "truncate": _truncate,
    "clip": _clip,
    "round": _round,
    "double": _double,
    "direct": _direct,
    "direct-clip": _direct_clip,
}


def _round_to_nearest(values: Tensor, lo: Tensor, hi: Tensor, bits: int, scale_bits: int) -> Tensor:
    levels = 2**bits - 1
    lo, step = _stored(lo, hi, levels, scale_bits)
    return lo + step * ((values - lo) / step).round().clamp(0, levels)


def _best_shrink(values: Tensor, attempt: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Per group, the factor on both ends of the range that leaves the least squared error."""
    lo, hi = values.amin(-1, True), values.amax(-1, True)
    shrinks = torch.linspace(1, 0.4, 13)
    errors = torch.stack([(attempt(lo * s, hi * s) - values).square().sum(-1, True) for s in shrinks])
    return shrinks[errors.argmin(0)]


def _fitted(values: Tensor, lo: Tensor, step: Tensor, levels: Tensor, bits: int, fit: str) -> Tensor:
    """lo + step * levels, the levels (in steps) first moved as `fit` says.

    A gain spreads them about the middle of the range, one factor per matrix. `least` makes |rebuilt - w|^2
    least, which shrinks the weights; `unbiased` makes <rebuilt, w> = <w, w>, so that W x keeps its length
    (the scale of EDEN, Vargaftik et al. 2022); `fixed` is that gain for Gaussian weights: nothing to store.
    """
    off, true = step * (levels - 128), values - lo - 128 * step
    if fit == "fixed":
        return lo + 128 * step + off * _FIXED_GAIN[bits]
    if fit == "least":
        return lo + 128 * step + off * (true * off).sum() / off.square().sum()
    if fit == "unbiased":
        return lo + 128 * step + off * (true * values).sum() / (off * values).sum()
    if fit == "group":
        mean, at = values.mean(-1, True), levels - levels.mean(-1, True)
        slope = (values * at).sum(-1, True) / at.square().sum(-1, True).clamp_min(1e-9)
        slope, base = _fp16(slope), _fp16(mean - slope * levels.mean(-1, True))
        return base + slope * levels
    return lo + step * levels


def _stored(lo: Tensor, hi: Tensor, levels: int, scale_bits: int) -> tuple[Tensor, Tensor]:
    """lo and step as they can be stored [rows, groups, 1]: rounded outwards, step never 0."""
    if scale_bits == 8:  # codes between a row's least and greatest lo, and up to its greatest step
        least, most = lo.amin(1, True), lo.amax(1, True)
        unit = ((most - least) / 255).clamp_min(1e-9)
        lo = least + unit * ((lo - least) / unit).floor()
        step = (hi - lo) / levels
        unit = (step.amax(1, True) / 255).clamp_min(1e-9)
        return lo, unit * (step / unit).ceil().clamp_min(1)
    lo = _fp16(lo - lo.abs() * 2**-11)
    return lo, _fp16((hi - lo) / levels * (1 + 2**-11)).clamp_min(2**-24)


def _fp16(x: Tensor) -> Tensor:
    return x.half().float()


# Weights: relative squared error.


def squared_error(matrices: list[Tensor], variant: Variant, rung: str) -> float:
    """sum |w - rebuilt|^2 / sum |w|^2 over fp32 matrices."""
    lost = sum(float((variant.rebuild(w, rung) - w).square().sum()) for w in matrices)
    return lost / sum(float(w.square().sum()) for w in matrices)


# Pico: what the model says.


@dataclass(frozen=True)
class Reading:
    """Held-out behaviour of one model against the source model."""

    perplexity: float
    kl: float  # nats, from the source model
    top1: float  # share of positions with the same greedy token
    acceptance: float  # sum of min(p, q) at temperature 0.8


class Yardstick:
    """A few thousand held-out tokens and the source model's logits on them."""

    def __init__(self, model: PreTrainedModel, tokens: Tensor, num_tokens: int) -> None:
        windows = max(1, num_tokens // _WINDOW)
        starts = torch.linspace(0, len(tokens) - _WINDOW - 1, windows).long()
        rows = torch.stack([tokens[s : s + _WINDOW + 1] for s in starts])  # [windows, 513], from all files
        self._model, self._inputs, self._targets = model, rows[:, :-1], rows[:, 1:].flatten()
        self._source = self._logits()

    def read(self) -> Reading:
        """Read the model as its weights stand now."""
        logits = self._logits()
        log_p, log_q = self._source.log_softmax(-1), logits.log_softmax(-1)
        p, q = ((x / _TEMPERATURE).softmax(-1) for x in (self._source, logits))
        return Reading(
            perplexity=float(functional.cross_entropy(logits, self._targets).exp()),
            kl=float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
            top1=float((logits.argmax(-1) == self._source.argmax(-1)).float().mean()),
            acceptance=float(torch.minimum(p, q).sum(-1).mean()),
        )

    @torch.inference_mode()
    def _logits(self) -> Tensor:
        parts = [self._model(part, use_cache=False).logits.float() for part in self._inputs.split(2)]
        return torch.cat(parts).flatten(0, 1)  # [tokens, vocabulary]


def layer_linears(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """All projections but the head, by name."""
    head = model.get_output_embeddings()
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}


def rebuilt(name: str, weight: Tensor, variant: Variant, rung: str, transpose_down: bool = True) -> Tensor:
    """One projection as the store keeps it: down transposed, so that a neuron's column is a row of groups."""
    if transpose_down and name.endswith("down_proj"):
        return variant.rebuild(weight.T.contiguous(), rung).T.contiguous()
    return variant.rebuild(weight, rung)


@contextmanager
def replaced(weights: Mapping[nn.Linear, Tensor]) -> Iterator[None]:
    """The linears with other weights; a tied head is untied meanwhile."""
    before = {linear: linear.weight for linear in weights}
    try:
        for linear, weight in weights.items():
            linear.weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for linear, parameter in before.items():
            linear.weight = parameter


def pico_readings(model: PreTrainedModel, yardstick: Yardstick) -> dict[str, Reading]:
    """`variant @ rung` -> reading: all variants (int8 once, as it loses nothing), down's groups, the head."""
    linears, head = layer_linears(model), model.get_output_embeddings()
    results = {"source": yardstick.read()}

    def layers(variant: Variant, rung: str, transpose_down: bool = True) -> dict[nn.Linear, Tensor]:
        return {m: rebuilt(n, m.weight.data, variant, rung, transpose_down) for n, m in linears.items()}

    def read(label: str, weights: Mapping[nn.Linear, Tensor]) -> None:
        with replaced(weights):
            results[label] = yardstick.read()

    for variant in VARIANTS:
        for rung in ("int2", "int4"):
            read(f"{variant.name} @ {rung}", layers(variant, rung))
    chosen = VARIANTS[0]
    read(f"{chosen.name} @ int8", layers(chosen, "int8"))
    for rung in RUNGS:
        read(f"nested, down grouped along its inputs @ {rung}", layers(chosen, rung, transpose_down=False))
        for head_rung in RUNGS:
            weights = layers(chosen, rung) | {head: chosen.rebuild(head.weight.data, head_rung)}
            read(f"nested, head at {head_rung} @ {rung}", weights)
    return results


# The table.


def print_errors(title: str, errors: Mapping[str, Mapping[str, float]]) -> None:
    """One line per variant: bits read per weight and relative squared error at each rung."""
    print(f"\n{title}: relative squared error (bits per weight, scales included)")
    print(f"{'':42s}" + "".join(f"{rung:>20s}" for rung in RUNGS))
    for variant in VARIANTS:
        cells = (f"{errors[variant.name][rung]:.3e} ({variant.bits(rung):.2f})" for rung in RUNGS)
        print(f"{variant.name:42s}" + "".join(f"{cell:>20s}" for cell in cells))


def print_readings(readings: Mapping[str, Reading]) -> None:
    """One line per model: perplexity, and agreement with the source model."""
    print(f"\n{'pico, held-out':50s}{'perplexity':>12s}{'KL':>9s}{'top-1':>8s}{'accept':>8s}")
    for rung in ("source", *RUNGS):
        for label, r in readings.items():
            if label == rung or label.endswith(f"@ {rung}"):
                print(f"{label:50s}{r.perplexity:12.3f}{r.kl:9.4f}{r.top1:8.3f}{r.acceptance:8.3f}")


def main() -> None:
    """Measure and print."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--checkpoint", type=Path, help="pico's folder; without it, Gaussian weights only")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens (default %(default)s)")
    parser.add_argument("--rows", type=int, default=1024, help="of the Gaussian matrix (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    print(f"torch {torch.__version__}, seed {args.seed}")
    gaussian = torch.randn(args.rows, 2048) * 0.02
    heavy = torch.distributions.StudentT(4.0).sample((args.rows, 2048)) * 0.02  # type: ignore[no-untyped-call]
    figures: dict[str, object] = {}

    def errors(title: str, matrices: list[Tensor]) -> None:
        table = {v.name: {rung: squared_error(matrices, v, rung) for rung in RUNGS} for v in VARIANTS}
        print_errors(title, table)
        figures[title] = table

    errors("Gaussian weights", [gaussian.bfloat16().float()])
    errors("Heavy-tailed weights (Student's t, 4 degrees)", [heavy.bfloat16().float()])
    if args.checkpoint:
        tokenizer = AutoTokenizer.from_pretrained(args.checkpoint)
        model = AutoModelForCausalLM.from_pretrained(args.checkpoint, dtype=torch.float32).eval()
        named = layer_linears(model).items()
        matrices = [m.weight.data.T.contiguous() if n.endswith("down_proj") else m.weight.data for n, m in named]
        errors("pico weights", matrices)
        readings = pico_readings(model, Yardstick(model, heldout_tokens(tokenizer), args.tokens))
        print_readings(readings)
        figures["pico"] = {label: asdict(reading) for label, reading in readings.items()}
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
