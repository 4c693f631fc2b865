"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them: 2, 4 or 8 bits, with or without reordered inputs.

Of a linear map of `inputs` by `outputs` they hold

    qweight   int32 [inputs * bits / 32, outputs]   codes, packed along the inputs
    qzeros    int32 [groups, outputs * bits / 32]   zero points, packed along the outputs
    scales    [groups, outputs]
    g_idx     int32 [inputs]                        the group of each input; with act-order not in sequence

The first version of the format stores zero points less one. It is taken from whole words, as GPTQModel does, so that a
borrow from the next number is given back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tiercache.errors import StoreError, UnsupportedModelError
from tiercache.formats.integers import Codes, IntegerTensor, check_matrices, check_shapes, unpacked, words_for
from tiercache.store.header import TensorRef
from tiercache.store.reader import Reader, StoredTensor, load

PARTS = ("qweight", "qzeros", "scales", "g_idx")
_BITS = (2, 4, 8)


@dataclass(frozen=True)
class GptqTensor(IntegerTensor):
    """A matrix of a GPTQ checkpoint; `less_one` where zero points are stored less one."""

    bits: int
    group: int
    less_one: bool

    @property
    def encoding(self) -> str:
        return f"GPTQ int{self.bits}"

    def parts(self) -> dict[str, TensorRef]:
        version = "v1" if self.less_one else "v2"
        return {f"{part} {self.bits} {self.group} {version}": ref for part, ref in self.stored.items()}

    def codes(self, reader: Reader) -> Codes:
        words = load(reader, self.stored["qweight"])
        zeros = load(reader, self.stored["qzeros"])
        if self.less_one:
            zeros = zeros + sum(1 << shift for shift in range(0, 32, self.bits))  # wraps around, as it did
        if "g_idx" in self.stored:
            group_of = load(reader, self.stored["g_idx"]).long()
        else:
            group_of = torch.arange(self.shape[1]) // self.group
        return Codes(
            lambda low, high: unpacked(words[:, low:high].T, self.bits)[:, : self.shape[1]],
            unpacked(zeros, self.bits)[:, : self.shape[0]].T,
            load(reader, self.stored["scales"]).T,
            group_of,
        )


def check(settings: Mapping[str, Any], where: str) -> None:
    """Refuse variants of the format that are not read; raises UnsupportedModelError."""
    bits, layout = settings.get("bits"), settings.get("checkpoint_format", "gptq")
    packed = settings.get("pack_dtype", "int32")
    if type(bits) is not int or bits not in _BITS or layout not in ("gptq", "gptq_v2") or packed != "int32":
        raise UnsupportedModelError(
            f"{where} is GPTQ of {bits} bits in the layout {layout!r}, packed in {packed}; tiercache reads 2, 4 and 8 "
            "bits of 'gptq' and 'gptq_v2' in int32: name such a one, or the 16-bit checkpoint"
        )


def tensor(where: str, stored: dict[str, TensorRef], settings: Mapping[str, Any], dtype: str) -> StoredTensor:
    """The matrix of which `stored` are the parts.

    Raises:
        StoreError: they contradict one another.
    """
    check_matrices(where, stored, ("qweight", "qzeros", "scales"))
    if settings.get("desc_act") and "g_idx" not in stored:
        raise StoreError(f"{where} lacks g_idx, the order of its inputs; download it again")
    bits: int = settings["bits"]
    outputs = stored["qweight"].shape[-1]
    inputs = stored["qweight"].shape[0] * 32 // bits
    groups = stored["scales"].shape[0]
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        "qweight": ("I32", (words_for(inputs, bits), outputs)),
        "qzeros": ("I32", (groups, words_for(outputs, bits))),
        "scales": ("", (groups, outputs)),
    }
    if "g_idx" in stored:
        wanted["g_idx"] = ("I32", (inputs,))
    check_shapes(where, stored, wanted)
    size = settings.get("group_size", -1)
    group = size if isinstance(size, int) and size > 0 else inputs
    if "g_idx" not in stored and -(-inputs // group) != groups:
        raise StoreError(
            f"{where}: {inputs} inputs in groups of {group} have {-(-inputs // group)} scales, {groups} are there; "
            "group_size in its config.json is another checkpoint's: download both again"
        )
    return GptqTensor(dtype, (outputs, inputs), stored, bits, group, settings.get("checkpoint_format") != "gptq_v2")
