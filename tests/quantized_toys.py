"""Tiny GPTQ, AWQ and compressed-tensors checkpoints, packed number by number as the formats' own descriptions say.

Slow on purpose, and of no code that reads them. Codes, zero points and scales are random, and so are the weights that
they stand for.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
import torch
import transformers as tf
from safetensors.torch import save_file
from torch import nn

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Numbers:
    """A matrix of [outputs, inputs]: unsigned codes, and zero points and scales of each output and group of inputs."""

    codes: torch.Tensor
    zeros: torch.Tensor
    scales: torch.Tensor
    group_of: list[int]

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """Multiplied in `dtype`, as the formats' own kernels do."""
        made = torch.empty(self.codes.shape, dtype=dtype)
        for column, group in enumerate(self.group_of):
            difference = (self.codes[:, column] - self.zeros[:, group]).to(dtype)
            made[:, column] = difference * self.scales[:, group].to(dtype)
        return made


def numbers(
    shape: torch.Size, bits: int, groups: int, dtype: torch.dtype, *, symmetric: bool, ordered: bool = True
) -> Numbers:
    """Random ones; not `ordered`: inputs belong to groups in no order, as act-order leaves them."""
    outputs, inputs = shape
    middle = 1 << (bits - 1)
    zeros = torch.full((outputs, groups), middle)
    if not symmetric:
        zeros = torch.randint(1, 1 << bits, (outputs, groups))
    group_of = [column * groups // inputs for column in range(inputs)]
    if not ordered:
        group_of = [group_of[place] for place in torch.randperm(inputs).tolist()]
    scales = (torch.rand(outputs, groups) * 0.1 / middle + 0.001).to(dtype)
    return Numbers(torch.randint(0, 1 << bits, (outputs, inputs)), zeros, scales, group_of)


def words(rows: list[list[int]], bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Each row's numbers in int32 words, the lowest bits first; `order` says which number of a word comes next."""
    in_a_word = 32 // bits
    order = order or tuple(range(in_a_word))
    packed = []
    for row in rows:
        padded = row + [0] * (-len(row) % in_a_word)
        line = []
        for begin in range(0, len(padded), in_a_word):
            word = 0
            for place, number in enumerate(order):
                word |= padded[begin + number] << (bits * place)
            line.append(word - (1 << 32) if word >= 1 << 31 else word)
        packed.append(line)
    return torch.tensor(packed, dtype=torch.int32)


def gptq(found: Numbers, bits: int, *, version: int = 1, with_order: bool = True) -> Tensors:
    """Codes packed down the inputs, zero points along the outputs; version 1 stores these less one."""
    zeros = found.zeros - 1 if version == 1 else found.zeros
    made = {
        "qweight": words(found.codes.tolist(), bits).T.contiguous(),
        "qzeros": words(zeros.T.tolist(), bits),
        "scales": found.scales.T.contiguous(),
    }
    return made | ({"g_idx": torch.tensor(found.group_of, dtype=torch.int32)} if with_order else {})


def awq(found: Numbers) -> Tensors:
    """Codes and zero points packed along the outputs, in the order 0 2 4 6 1 3 5 7."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {
        "qweight": words(found.codes.T.tolist(), 4, order),
        "qzeros": words(found.zeros.T.tolist(), 4, order),
        "scales": found.scales.T.contiguous(),
    }


def packed_tensors(found: Numbers, bits: int, *, symmetric: bool, ordered: bool = True) -> Tensors:
    """compressed-tensors' "pack-quantized"; its signed numbers are stored with the middle added."""
    made = {
        "weight_packed": words(found.codes.tolist(), bits),
        "weight_scale": found.scales,
        "weight_shape": torch.tensor(found.codes.shape, dtype=torch.int64),
    }
    if not symmetric:
        made["weight_zero_point"] = words(found.zeros.T.tolist(), bits).T.contiguous()
    if not ordered:
        made["weight_g_idx"] = torch.tensor(found.group_of, dtype=torch.int32)
    return made


def whole_bytes(found: Numbers, *, symmetric: bool) -> Tensors:
    """compressed-tensors' "int-quantized": signed numbers, one a byte."""
    made = {"weight": (found.codes - 128).to(torch.int8), "weight_scale": found.scales}
    return made if symmetric else made | {"weight_zero_point": (found.zeros - 128).to(torch.int8)}


def save(
    name: str, folder: Path, dtype: torch.dtype, settings: dict[str, Any], pack: Any, **made: Any
) -> tf.PreTrainedModel:
    """Write the toy `name` with the matrices of its layers packed; returns the model with what these stand for."""
    return save_packed(architectures.build(name, dtype), folder, settings, pack, **made)


def save_packed(
    model: tf.PreTrainedModel, folder: Path, settings: dict[str, Any], pack: Any, **made: Any
) -> tf.PreTrainedModel:
    """The same of any model.

    `pack` takes Numbers and returns a matrix's tensors; `made` are arguments of `numbers`.
    """
    dtype = model.dtype
    torch.manual_seed(1)
    stored = {key: value.clone() for key, value in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del stored["lm_head.weight"]
    for module_name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers" in module_name:
            found = numbers(module.weight.shape, dtype=dtype, **made)
            module.weight.data = found.weight(dtype)
            del stored[f"{module_name}.weight"]
            stored |= {f"{module_name}.{part}": tensor for part, tensor in pack(found).items()}
    model.config.save_pretrained(folder)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {"dtype": str(dtype).removeprefix("torch."), "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return model
