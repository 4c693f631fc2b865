"""Weights as small integers with a scale and a zero point for each group: what GPTQ, AWQ and compressed-tensors share.

A weight is (code - zero) * scale. The product is rounded once, to the dtype that the checkpoint names; kernels that
multiply in that dtype get the same bits, for codes and zeros are exact in it.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tiercache.errors import StoreError
from tiercache.store.header import DTYPES, TensorRef
from tiercache.store.reader import PackedTensor, Reader

_CHUNK_WEIGHTS = 1 << 21  # dequantised at once: bounds the fp32 copies


@dataclass(frozen=True)
class Codes:
    """A matrix as integers, before anything is multiplied.

    Attributes:
        rows: codes of the rows from `low` up to `high`; integers [rows, inputs].
        zeros, scales: of each output and group; integers and floating point, [outputs, groups].
        group_of: which group an input belongs to; [inputs].
    """

    rows: Callable[[int, int], torch.Tensor]
    zeros: torch.Tensor
    scales: torch.Tensor
    group_of: torch.Tensor


@dataclass(frozen=True)
class IntegerTensor(PackedTensor):
    """A matrix of small integers; `stored` are its parts, by the last word of their names."""

    stored: dict[str, TensorRef]

    def parts(self) -> dict[str, TensorRef]:
        return self.stored

    @abstractmethod
    def codes(self, reader: Reader) -> Codes:
        """Read the parts."""

    def load(self, reader: Reader) -> torch.Tensor:
        found = self.codes(reader)
        groups = found.scales.shape[1]
        named = torch.unique(found.group_of)
        path = next(iter(self.stored.values())).path
        if int(named[0]) < 0 or int(named[-1]) >= groups:
            raise StoreError(f"{path}: a matrix names groups beyond its {groups}; download it again")
        if len(named) < groups:
            raise StoreError(
                f"{path}: a matrix has scales for {groups} groups, its inputs belong to {len(named)} of them; download "
                "it again, or name the 16-bit checkpoint"
            )
        made = torch.empty(self.shape, dtype=DTYPES[self.dtype])
        step = max(8, _CHUNK_WEIGHTS // self.shape[1] // 8 * 8)  # whole words, where outputs are packed
        for low in range(0, self.shape[0], step):
            high = min(self.shape[0], low + step)
            zeros = found.zeros[low:high].float()[:, found.group_of]
            scales = found.scales[low:high].float()[:, found.group_of]
            made[low:high] = found.rows(low, high).float().sub_(zeros).mul_(scales)
        return made


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The unsigned numbers in int32 words, the lowest bits first; [..., words] becomes [..., words * 32 // bits]."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    numbers = (words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return numbers.flatten(-2).to(torch.uint8)


def words_for(count: int, bits: int) -> int:
    """How many int32 words so many numbers take."""
    return -(-count * bits // 32)


def group_size(inputs: int, groups: int, where: str) -> int:
    """Inputs of a group, where all are equally large; raises StoreError where they cannot be."""
    if groups < 1 or inputs % groups:
        raise StoreError(f"{where}: {groups} groups do not divide {inputs} inputs; download it again")
    return inputs // groups


def check_matrices(where: str, stored: dict[str, TensorRef], needed: tuple[str, ...]) -> None:
    """Refuse a matrix of which a part is missing, empty or no matrix itself; raises StoreError."""
    for part in needed:
        shape = stored[part].shape if part in stored else ()
        if len(shape) != 2 or 0 in shape:
            raise StoreError(f"{where}: {part} is {list(shape) or 'missing'}, no matrix; download it again")


def check_shapes(where: str, stored: dict[str, TensorRef], wanted: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Refuse parts of another dtype or shape than `wanted`; "" as dtype stands for any that weights are computed in.

    Raises:
        StoreError: they contradict one another.
    """
    for part, (dtype, shape) in wanted.items():
        ref = stored[part]
        if ref.shape != shape or ref.dtype not in ((dtype,) if dtype else DTYPES):
            raise StoreError(
                f"{where}: {part} is {ref.dtype} {list(ref.shape)}, which does not go with its other parts "
                f"({dtype or 'a float'} {list(shape)}); download it again"
            )
