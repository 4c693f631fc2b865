"""How far 16-bit fixed point may lie from the reference, from first principles, and matrices laid out as in a slot.

The arithmetic is told in tiercache/kernels/cpu/source/planes.h. Rounding an activation to a multiple of the group's
largest / 32639 is off by half of that; the half is .52 here, for the quotients that are rounded are themselves off by
five roundings (32639 * 5 * 2**-24 < .01). Every fp32 operation is off by at most ULP of its result; none of them
exceeds what the sums would be were all terms positive.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tiercache.kernels.activation import activate
from tiercache.quant.planes import Planes, decode, num_groups, plane_row_bytes, scale_row_bytes
from tiercache.store.manifest import PlaneWeight

ULP = 2.0**-24
SUBNORMAL = 2.0**-120  # of an integer below 2**29 times a scale that underflows: half of 2**-149 of it
FULL = 32639
TINY = float(torch.tensor(1e-30))  # below it activations count as zero
BLOCK, SLICE = 64, 512
REACH = 12 * 15 + 15  # the largest code, in steps
# How much an activation grows per unit at most; relu2 is not bounded, see `ffn`.
SLOPES = {"silu": 1.1, "gelu": 1.13, "gelu_tanh": 1.13, "relu": 1.0, "identity": 1.0}


def chosen(weight: Planes, rows: Tensor | None) -> Planes:
    """The selected rows of a matrix."""
    if rows is None:
        return weight
    planes = tuple(plane[rows.long()] for plane in weight.planes)
    return replace(weight, planes=planes, scales=weight.scales[rows.long()])


def matmul(x: Tensor, weight: Planes) -> Tensor:
    """Of W x, for x fp64 [tokens, columns]: [tokens, rows]."""
    lo, step = (_spread(part, weight) for part in weight.scales.double().unbind(-1))  # [rows, columns]
    size = _parts(x.abs(), weight)  # [tokens, parts, columns of a part]
    largest = size.amax(-1)
    rounding = torch.where(largest < TINY, largest, 0.52 * largest / FULL)  # of each activation
    quantised = rounding @ _parts(decode(weight, torch.float32).double().abs(), weight).sum(-1).T
    floats = (size.shape[1] + 16) * ULP * (x.abs() @ (lo.abs() + REACH * step).T + quantised)
    return quantised + floats + size.shape[1] * SUBNORMAL


def matmul_transposed(x: Tensor, weight: Planes) -> Tensor:
    """Of x W, for x fp64 [tokens, rows]: [tokens, columns]."""
    lo, step = (_spread(part, weight) for part in weight.scales.double().unbind(-1))  # [rows, columns]
    codes = _codes(weight)
    quantised, reach = x.new_zeros(len(x), weight.columns), x.abs() @ (lo.abs() + REACH * step)
    for first in range(0, weight.rows, BLOCK):
        block = slice(first, first + BLOCK)
        largest = x[:, block].abs().amax(1, keepdim=True)  # [tokens, 1]
        folded = 0.52 * largest / FULL * (step[block].amax(0) * codes[block].sum(0))
        lost = largest * (step[block] * codes[block]).sum(0)
        quantised += torch.where(largest < 2 * TINY, lost, folded)
    slices, blocks = -(-weight.rows // SLICE), -(-weight.rows // BLOCK)
    return quantised + (BLOCK + slices + 26) * ULP * (reach + quantised) + blocks * SUBNORMAL


def ffn(x: Tensor, inward: Sequence[Planes], down: Planes, activation: str) -> Tensor:
    """Of down(act(gate x) * up x), for x fp64 [tokens, hidden]: the same shape."""
    exact = [x @ decode(weight, torch.float32).double().T for weight in inward]
    error = [matmul(x, weight) + ULP * value.abs() for weight, value in zip(inward, exact, strict=True)]
    gate = activate(activation, exact[0])
    slope = 2 * exact[0].abs() + error[0] if activation == "relu2" else SLOPES[activation]
    wrong = slope * error[0] + 16 * ULP * torch.maximum(exact[0].abs(), gate.abs())
    hidden = gate.abs()
    for value, off in zip(exact[1:], error[1:], strict=True):
        wrong = wrong * (value.abs() + off) + hidden * off
        hidden = hidden * value.abs()
    wrong += ULP * (hidden + wrong)
    return matmul_transposed(hidden + wrong, down) + wrong @ decode(down, torch.float32).double().abs()


def bundle(matrices: Sequence[Planes], offset: int = 0) -> list[Planes]:
    """The same matrices row beside row, as the parts of a unit lie in a slot that begins at any byte."""
    rows, columns, group = matrices[0].rows, matrices[0].columns, matrices[0].group
    widths = [plane_row_bytes(columns, group, plane) for plane in range(len(matrices[0].planes))]
    at = [0]
    for width in [*widths, scale_row_bytes(columns, group)]:
        at.append(at[-1] + rows * len(matrices) * width)
    slot = torch.frombuffer(bytearray(at[-1] + offset), dtype=torch.uint8, offset=offset)
    laid = []
    for part, matrix in enumerate(matrices):
        place = (len(matrices), (0,) * len(widths), tuple(at[:-2]), at[-2])
        here = PlaneWeight(rows, columns, group, *place, own=(part,), transposed=False).part(slot, part)
        for target, source in zip([*here.planes, here.scales], [*matrix.planes, matrix.scales], strict=True):
            target.copy_(source)
        laid.append(here)
    return laid


def _codes(weight: Planes) -> Tensor:
    """Codes with their unknown bits at the middle: [rows, columns]."""
    plain = torch.tensor([0.0, 1.0]).half().expand(weight.rows, weight.scales.shape[1], 2)
    return decode(Planes(weight.planes, plain, weight.columns, weight.group), torch.float32).double()


def _parts(values: Tensor, weight: Planes) -> Tensor:
    """[n, columns] -> [n, parts, columns of a part], padded with zeros: groups, or the halves of groups of 128."""
    groups = num_groups(weight.columns, weight.group)
    padded = torch.nn.functional.pad(values, (0, groups * weight.group - weight.columns))
    if weight.group < 128:
        return padded.reshape(-1, groups, weight.group)
    return padded.reshape(-1, groups, 4, 2, 16).transpose(2, 3).reshape(-1, 2 * groups, 64)


def _spread(values: Tensor, weight: Planes) -> Tensor:
    """[rows, groups] -> [rows, columns]."""
    return values.repeat_interleave(weight.group, dim=1)[:, : weight.columns]
