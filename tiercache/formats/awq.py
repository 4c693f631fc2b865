"""AWQ checkpoints in the layout for matrix products ("gemm"), as AutoAWQ and llm-awq's successors write them: 4 bits.

Of a linear map of `inputs` by `outputs` they hold

    qweight   int32 [inputs, outputs / 8]    codes, packed along the outputs
    qzeros    int32 [groups, outputs / 8]    zero points, packed likewise
    scales    [groups, outputs]

A word's eight numbers are outputs 0, 2, 4, 6, 1, 3, 5, 7 of it, the lowest bits first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tiercache.errors import UnsupportedModelError
from tiercache.formats.integers import Codes, IntegerTensor, check_matrices, check_shapes, group_size, unpacked
from tiercache.store.header import TensorRef
from tiercache.store.reader import Reader, StoredTensor, load

PARTS = ("qweight", "qzeros", "scales")
_BITS, _IN_A_WORD = 4, 8
_PLACES = [0, 4, 1, 5, 2, 6, 3, 7]  # of outputs 0 to 7 in their word


@dataclass(frozen=True)
class AwqTensor(IntegerTensor):
    """A matrix of an AWQ checkpoint."""

    @property
    def encoding(self) -> str:
        return "AWQ int4"

    def codes(self, reader: Reader) -> Codes:
        words = load(reader, self.stored["qweight"])
        scales = load(reader, self.stored["scales"]).T
        group = self.shape[1] // scales.shape[1]
        return Codes(
            lambda low, high: _in_order(words[:, low // _IN_A_WORD : high // _IN_A_WORD]).T,
            _in_order(load(reader, self.stored["qzeros"])).T,
            scales,
            torch.arange(self.shape[1]) // group,
        )


def _in_order(words: torch.Tensor) -> torch.Tensor:
    """The numbers of words along the last dimension, in the order of the outputs."""
    numbers: torch.Tensor = unpacked(words, _BITS).unflatten(-1, (-1, _IN_A_WORD))
    return numbers[..., _PLACES].flatten(-2)


def check(settings: Mapping[str, Any], where: str) -> None:
    """Refuse variants of the format that are not read; raises UnsupportedModelError."""
    bits, layout = settings.get("bits", settings.get("w_bit")), str(settings.get("version", "gemm")).lower()
    if bits != _BITS or layout != "gemm" or not settings.get("zero_point", True):
        raise UnsupportedModelError(
            f"{where} is AWQ of {bits} bits in the layout {layout!r}; tiercache reads 4 bits with zero points in 'gemm'"
            ": name such a one, or the 16-bit checkpoint"
        )


def tensor(where: str, stored: dict[str, TensorRef], settings: Mapping[str, Any], dtype: str) -> StoredTensor:
    """The matrix of which `stored` are the parts.

    Raises:
        StoreError: they contradict one another.
    """
    check_matrices(where, stored, ("qweight", "qzeros", "scales"))
    inputs, outputs = stored["qweight"].shape[0], stored["scales"].shape[-1]
    groups = stored["scales"].shape[0]
    packed = -(-outputs // _IN_A_WORD)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "qweight": ("I32", (inputs, packed)),
        "qzeros": ("I32", (groups, packed)),
        "scales": ("", (groups, packed * _IN_A_WORD)),
    }
    check_shapes(where, stored, wanted)
    group_size(inputs, groups, where)
    return AwqTensor(dtype, (outputs, inputs), stored)
