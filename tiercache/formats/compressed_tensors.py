"""compressed-tensors checkpoints, as llm-compressor writes them: integers of 4 or 8 bits, packed or one a byte.

Of a linear map of `inputs` by `outputs` they hold, packed ("pack-quantized"),

    weight_packed       int32 [outputs, inputs * bits / 32]   codes plus 2^(bits-1), packed along the inputs
    weight_scale        [outputs, groups]                     one group: a scale for each output; [1]: for the matrix
    weight_zero_point   int32 [outputs * bits / 32, groups]   plus 2^(bits-1), packed along the outputs; may be missing
    weight_shape        int64 [2]                             outputs, inputs
    weight_g_idx        int [inputs]                          the group of each input, with act-order; may be missing

or, not packed ("int-quantized", "naive-quantized"), the codes as int8 `weight` and zero points as int8.

Such a checkpoint may ask for activations that are quantised as well. These are left as they are, which loses less.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tiercache.errors import StoreError, UnsupportedModelError
from tiercache.formats.integers import (
    Codes,
    IntegerTensor,
    check_matrices,
    check_shapes,
    group_size,
    unpacked,
    words_for,
)
from tiercache.store.header import DTYPES, TensorRef
from tiercache.store.reader import Reader, StoredTensor, load

PARTS = ("weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
_FORMATS = ("pack-quantized", "int-quantized", "naive-quantized")
_BITS = (4, 8)


@dataclass(frozen=True)
class CompressedTensor(IntegerTensor):
    """A matrix of a compressed-tensors checkpoint; `bits` as it is packed, 0 where it has a byte for each weight."""

    bits: int

    @property
    def encoding(self) -> str:
        return f"compressed-tensors int{self.bits or 8}"

    def codes(self, reader: Reader) -> Codes:
        outputs, inputs = self.shape
        scales = load(reader, self.stored["weight_scale"])
        scales = scales.expand(outputs, 1) if scales.numel() == 1 else scales.reshape(outputs, -1)
        group_of = torch.arange(inputs) // (inputs // scales.shape[1])
        if "weight_g_idx" in self.stored:
            named = load(reader, self.stored["weight_g_idx"]).long()
            group_of = group_of if int(named.min()) == -1 else named  # -1: in sequence
        stored = load(reader, self.stored["weight_packed" if self.bits else "weight"])
        return Codes(
            lambda low, high: self._unpacked(stored[low:high])[:, :inputs],
            self._zeros(reader).expand(outputs, scales.shape[1]),
            scales,
            group_of,
        )

    def _unpacked(self, rows: torch.Tensor) -> torch.Tensor:
        return unpacked(rows, self.bits) if self.bits else rows

    def _zeros(self, reader: Reader) -> torch.Tensor:
        """Zero points, with the same offset as the codes."""
        ref = self.stored.get("weight_zero_point")
        if ref is None:
            return torch.tensor([[1 << (self.bits - 1) if self.bits else 0]])
        zeros = load(reader, ref)
        if ref.dtype == "I32":
            return unpacked(zeros.T, self.bits).T[: self.shape[0]]
        offset = 1 << (self.bits - 1) if self.bits else 0
        return (zeros.int() + offset).reshape(-1, 1 if zeros.dim() < 2 else zeros.shape[1])


def check(settings: Mapping[str, Any], where: str) -> None:
    """Refuse variants of the format that are not read; raises UnsupportedModelError, TypeError where nobody can be."""
    schemes = _schemes(settings)
    formats = {str(settings.get("format"))} | {str(scheme["format"]) for scheme in schemes if scheme.get("format")}
    formats -= {"mixed-precision"} if len(formats) > 1 else set()
    kinds = {f"{(scheme.get('weights') or {}).get('type', 'int')}" for scheme in schemes}
    sparse = (settings.get("sparsity_config") or {}).get("format", "dense")
    if not formats <= set(_FORMATS) or kinds - {"int"} or sparse != "dense" or settings.get("transform_config"):
        what = f"{', '.join(sorted(formats))} of {', '.join(sorted(kinds)) or 'unknown'} weights"
        raise UnsupportedModelError(
            f"{where} is compressed-tensors, {what} (sparsity: {sparse}, transforms: "
            f"{'some' if settings.get('transform_config') else 'none'}); tiercache reads {', '.join(_FORMATS)} of "
            "integers, dense and not transformed: name such a one, or the 16-bit checkpoint"
        )


def tensor(where: str, stored: dict[str, TensorRef], settings: Mapping[str, Any], dtype: str) -> StoredTensor:
    """The matrix of which `stored` are the parts; as it is where it was not quantised.

    Raises:
        StoreError: they contradict one another.
    """
    if "weight_scale" not in stored and "weight" in stored:
        return stored["weight"]
    holder = "weight" if "weight_packed" not in stored else "weight_packed"
    check_matrices(where, stored, (holder,))
    needed = {"weight_scale", *(("weight_shape",) if holder == "weight_packed" else ()), *_promised(settings)}
    if missing := needed - stored.keys():
        raise StoreError(f"{where} lacks {min(missing)}; download it again")
    if holder == "weight":
        bits, shape = 0, stored["weight"].shape
        wanted = {"weight": ("I8", shape)}
    else:
        rows, words = stored["weight_packed"].shape
        shape = _shape(where, stored["weight_shape"])
        bits = next((bits for bits in _BITS if words_for(shape[1], bits) == words), 0)
        if not bits or shape[0] != rows:
            raise StoreError(
                f"{where}: {rows} rows of {words} words hold no matrix of {list(shape)} in 4 or 8 bits; download it "
                "again"
            )
        wanted = {"weight_packed": ("I32", (rows, words))}
    groups = _check_scale(where, stored["weight_scale"], shape)
    if (zero := stored.get("weight_zero_point")) is not None:
        packed = ("I32", (words_for(shape[0], bits or 8), groups))
        wanted["weight_zero_point"] = packed if bits and zero.dtype == "I32" else ("I8", stored["weight_scale"].shape)
    if (order := stored.get("weight_g_idx")) is not None:
        wanted["weight_g_idx"] = ("I64" if order.dtype == "I64" else "I32", (shape[1],))
    check_shapes(where, stored, wanted)
    group_size(shape[1], groups, where)
    return CompressedTensor(dtype, shape, stored, bits)


def _promised(settings: Mapping[str, Any]) -> set[str]:
    """Parts that every matrix has, as the settings say, beside those without which there is none."""
    weights = [scheme.get("weights") or {} for scheme in _schemes(settings)]
    promised = set()
    if weights and not any(scheme.get("symmetric", True) for scheme in weights):
        promised.add("weight_zero_point")
    if weights and all(scheme.get("actorder") in ("group", "dynamic", True) for scheme in weights):
        promised.add("weight_g_idx")
    return promised


def _schemes(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How groups of matrices are quantised; raises TypeError where that is no object of objects."""
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict) or not all(isinstance(scheme, dict) for scheme in groups.values()):
        raise TypeError("config_groups is no object of objects")
    return list(groups.values())


def _check_scale(where: str, scale: TensorRef, shape: tuple[int, ...]) -> int:
    """The number of groups of a row."""
    whole = scale.shape in ((1,), (1, 1), ())
    if scale.dtype not in DTYPES or not (whole or (len(scale.shape) == 2 and scale.shape[0] == shape[0])):
        raise StoreError(f"{where}: its scales are {scale.dtype} {list(scale.shape)}; download it again")
    return 1 if whole else scale.shape[1]


def _shape(where: str, ref: TensorRef) -> tuple[int, int]:
    """The two numbers that a tensor holds."""
    if ref.dtype not in ("I64", "I32") or ref.shape != (2,):
        raise StoreError(f"{where}: weight_shape is {ref.dtype} {list(ref.shape)}; download it again")
    with ref.path.open("rb") as file:
        file.seek(ref.offset)
        outputs, inputs = np.frombuffer(file.read(ref.nbytes), "<i8" if ref.dtype == "I64" else "<i4")
    return int(outputs), int(inputs)
