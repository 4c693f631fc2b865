"""What calibrating a checkpoint will take: seconds, from what this machine does in a second, and memory.

Knows planned units and arithmetic; runs a few small samples and none of the model.
"""

import timeit
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from tiercache.quant import tune
from tiercache.quant.gptq import CHUNK_BYTES, CHUNK_WEIGHTS, REFINEMENTS, STATES, Moments, quantize_rows
from tiercache.store.layout import UnitPlan

_FP32 = 4
_SAMPLE = 768  # rows and columns of the matrices of a sample: tens of milliseconds
_INPUTS, _FEW, _MANY = 128, 64, 2048  # inputs, and outputs, of the two matrices that are quantised as samples


@dataclass(frozen=True)
class ConversionRates:
    """What this machine does in a second.

    Attributes:
        flops: floating-point operations of a matrix product, fp32.
        code_s: seconds for a weight's codes, refinements included, products left out.
        input_s: seconds for what is done once for each input of a matrix: small operations.
    """

    flops: float
    code_s: float
    input_s: float

    @classmethod
    def measure(cls) -> "ConversionRates":
        """Run small samples, each three times; the fastest counts."""
        a = torch.rand(_SAMPLE, _SAMPLE)
        flops = 2 * _SAMPLE**3 / _fastest(lambda: a @ a)
        few, many = (_fastest(partial(_quantize, torch.randn(rows, _INPUTS))) for rows in (_FEW, _MANY))
        code_s = max(0.0, many - few) / ((_MANY - _FEW) * _INPUTS)
        return cls(flops, code_s, max(0.0, few / _INPUTS - _FEW * code_s))


def _quantize(weight: torch.Tensor) -> None:
    quantize_rows(weight, Moments.of(torch.eye(_INPUTS), 64), 64)


def _fastest(work: Callable[[], object]) -> float:
    return min(timeit.repeat(work, number=1, repeat=4)[1:])  # the first one warms up


def seconds(units: Iterable[UnitPlan], tokens: int, window: int, steps: int, rates: ConversionRates) -> float:
    """How long taking a text through the model's units and choosing their codes takes, reading and writing left out.

    `window` is the tokens of a pass, `steps` those of learned rounding in each layer.
    """
    flops = choosing = 0.0
    learned = len(tune.LEARNED) * tune.passes(tokens // window, steps) * window
    seen: set[tuple[int | None, int]] = set()
    for unit in units:
        for outputs, inputs in _matrices(unit):
            weights = outputs * inputs
            flops += 2 * weights * tokens  # the layer's own product
            passes = 1 + 2 * (1 + REFINEMENTS)  # GPTQ's errors reach half of the inputs, a refinement's all of them
            flops += passes * STATES * weights * inputs
            choosing += rates.code_s * weights + rates.input_s * inputs * -(-weights // CHUNK_WEIGHTS)
            if unit.layer is not None:
                flops += 2 * weights * learned
            if (unit.layer, inputs) not in seen:  # q, k and v have one Hessian, gate and up another
                seen.add((unit.layer, inputs))
                flops += 2 * inputs**2 * tokens + 4 / 3 * inputs**3
    return flops / rates.flops + choosing


def memory_bytes(units: Iterable[UnitPlan], tokens: int, window: int, *, tuned: bool = False) -> int:
    """The most memory that a calibrated conversion takes: the larger of a layer's pass and of one of its matrices.

    `tokens` and `window` are those of `seconds`; `tuned`: rounding is learned besides.
    """
    layers: dict[int | None, list[UnitPlan]] = {}
    for unit in units:
        if not unit.dense:
            layers.setdefault(unit.layer, []).append(unit)
    return max(
        (_layer_bytes(some, tokens, window, tuned and layer is not None) for layer, some in layers.items()), default=0
    )


def _layer_bytes(units: list[UnitPlan], tokens: int, window: int, tuned: bool) -> int:
    matrices = [shape for unit in units for shape in _matrices(unit)]
    width = min(inputs for _, inputs in matrices)  # of the hidden states
    hessians = _FP32 * sum(inputs**2 for inputs in {inputs for _, inputs in matrices})
    hidden = _FP32 * tokens * width
    activations = 2 * _FP32 * window * sum({outputs for outputs, _ in matrices} | {inputs for _, inputs in matrices})
    passing = _FP32 * sum(outputs * inputs for outputs, inputs in matrices) + activations
    quantising = max(_matrix_bytes(unit, outputs, inputs) for unit in units for outputs, inputs in _matrices(unit))
    if not tuned:
        return hidden + hessians + max(passing, quantising)
    weights = sum(outputs * inputs for outputs, inputs in matrices)
    most = max(outputs * inputs for outputs, inputs in matrices)
    learning = passing + activations + tune.BYTES * weights + tune.PIECE_BYTES * most
    return 2 * hidden + max(hessians + passing, hessians + quantising + 2 * weights, learning)


def _matrix_bytes(unit: UnitPlan, outputs: int, inputs: int) -> int:
    """The unit's weights and planes, one matrix's codes, its states, and what the inverse Hessian takes in passing."""
    weights = outputs * inputs
    states = CHUNK_BYTES * min(weights, CHUNK_WEIGHTS)
    return 4 * unit.rows * unit.columns * len(unit.parts) + 2 * weights + states + 4 * _FP32 * inputs**2


def _matrices(unit: UnitPlan) -> Iterator[tuple[int, int]]:
    """Outputs and inputs of each matrix of a unit; a block's last one lies transposed."""
    if unit.dense:
        return
    for place in range(len(unit.parts)):
        outward = place > 0 and place == len(unit.parts) - 1
        yield (unit.columns, unit.rows) if outward else (unit.rows, unit.columns)
