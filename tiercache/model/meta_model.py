"""A transformers model without weights: what a checkpoint is, before a byte of it is read.

Builds the real class on the meta device and names its parts. Knows nothing of files' bytes, stores or tiers.
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode

from tiercache.compat import Conv1D
from tiercache.errors import StoreError, UnsupportedModelError, permissions_named

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.")

# FFN modules by the names transformers gives them: which parameter holds a neuron in its rows
# (`rows`, several for gated FFNs, `fused` when one parameter stacks gate over up) and which in its columns.
_FFNS = (
    (("gate_proj", "up_proj"), "down_proj", False),  # Llama, Mistral, Qwen, Gemma
    (("gate_up_proj",), "down_proj", True),  # Phi-3
    (("fc1",), "fc2", False),  # OPT
    (("c_fc",), "c_proj", False),  # GPT-2
    (("dense_h_to_4h",), "dense_4h_to_h", False),  # Falcon, GPT-NeoX
)

_DRAWING = ("normal_", "uniform_", "kaiming_uniform_")  # of torch.nn.init and of transformers, which has its own

Model = transformers.PreTrainedModel


@dataclass(frozen=True)
class Matrix:
    """The weight of one linear map.

    Attributes:
        name: the parameter's name in the model.
        module: the name of the module that multiplies by it.
        rows, columns: output and input features.
        transposed: stored [columns, rows], as GPT-2's Conv1D does.
        layer: index of its decoder layer; None for the language-model head.
    """

    name: str
    module: str
    rows: int
    columns: int
    transposed: bool
    layer: int | None


@dataclass(frozen=True)
class Ffn:
    """The matrices of one feed-forward block; neuron i is row i of each `inward` part and column i of `outward`."""

    inward: tuple[Matrix, ...]
    outward: Matrix
    fused: bool

    @property
    def neurons(self) -> int:
        """How many neurons the block has."""
        return self.outward.columns


class _EmptyOnMeta(TorchFunctionMode):
    """`torch.empty`, with which layers make their weights, takes no memory, and no numbers are drawn for them.

    Even memory that is given back at once costs: the C library then keeps blocks of that size for later. And torch
    draws random numbers for tensors without data in Python, slower than for some with data.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty:
            return func(*args, **{**(kwargs or {}), "device": "meta"})
        if getattr(func, "__name__", "") in _DRAWING:
            target = args[0] if args else kwargs["tensor"]
            if target.is_meta:
                return target
        return func(*args, **(kwargs or {}))


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within it new parameters land on the meta device while buffers, which are computed, stay real."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:  # a tied parameter stays the same object
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=False)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def read_config(folder: Path) -> transformers.PretrainedConfig:
    """The configuration that lies in `folder`; code that a repository brings along is never run.

    Raises:
        StoreError: there is none, or it cannot be read.
        UnsupportedModelError: of a kind that transformers does not know.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise StoreError(f"{folder} has no config.json, so it is no transformers checkpoint; name its folder")
    with permissions_named(file):
        text = file.read_bytes()
    try:
        kind = json.loads(text).get("model_type")
    except (ValueError, AttributeError) as error:
        raise StoreError(f"{file} cannot be read ({error}); download it again") from error
    try:
        config: transformers.PretrainedConfig = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        return config
    except Exception as error:  # transformers checks the values in many places and ways
        if kind in transformers.CONFIG_MAPPING:
            raise StoreError(f"{file} holds values that make no model ({error}); download it again") from error
        raise UnsupportedModelError(
            f"transformers {transformers.__version__} does not know the model type {kind!r}; use a newer transformers, "
            "or another model"
        ) from error


def build(config: transformers.PretrainedConfig, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The causal language model of `config`: parameters on meta, buffers real, ready for evaluation.

    Raises:
        UnsupportedModelError: a mixture of experts, or no causal language model of that type.
    """
    refuse_experts(config)
    try:
        with _parameters_on_meta():
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:
        raise UnsupportedModelError(
            f"transformers has no causal language model for {config.model_type!r}: {error}"
        ) from error
    model.requires_grad_(False)
    return model.eval()  # type: ignore[no-any-return]


def with_defaults(config: transformers.PretrainedConfig, dtype: torch.dtype, folder: Path) -> Model:
    """`build`, named after `folder` and with the generation defaults that lie there."""
    model = build(config, dtype)
    model.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def refuse_experts(config: transformers.PretrainedConfig) -> None:
    """Raise `UnsupportedModelError` for a mixture of experts."""
    text = config.get_text_config()
    for name in _EXPERTS:
        count = getattr(text, name, None)
        if isinstance(count, int) and count > 1:
            raise UnsupportedModelError(
                f"{config.model_type} is a mixture of experts ({name}={count}), which tiercache does not run yet; "
                "use a dense model of the same family"
            )


def layer_of(name: str) -> int | None:
    """Index of the decoder layer a parameter or module belongs to."""
    match = _LAYER.search(name + ".")
    return int(match[1]) if match else None


def matrices(model: nn.Module) -> list[Matrix]:
    """Every linear map inside a decoder layer, and the language-model head, in the model's own order."""
    kept = {id(parameter): name for name, parameter in model.named_parameters()}  # a tied one under one name
    found = []
    for name, module in model.named_modules():
        layer = layer_of(name)
        if layer is None and not is_head(model, module):
            continue
        if isinstance(module, nn.Linear):
            rows, columns = module.out_features, module.in_features
        elif isinstance(module, Conv1D):
            columns, rows = module.weight.shape
        else:
            continue
        found.append(Matrix(kept[id(module.weight)], name, rows, columns, isinstance(module, Conv1D), layer))
    return found


def is_head(model: nn.Module, module: nn.Module) -> bool:
    """Whether `module` is the model's language-model head."""
    head = model.get_output_embeddings() if isinstance(model, transformers.PreTrainedModel) else None
    return module is head


def ffns(found: Iterable[Matrix]) -> list[Ffn]:
    """The feed-forward blocks among matrices, recognised by the names transformers gives their parts."""
    by_module = {matrix.module: matrix for matrix in found if matrix.layer is not None}
    blocks = []
    for module, outward in by_module.items():
        parent, _, leaf = module.rpartition(".")
        for rows, columns, fused in _FFNS:
            inward = [by_module.get(f"{parent}.{row}") for row in rows]
            if leaf == columns and all(inward):
                parts = tuple(matrix for matrix in inward if matrix is not None)
                blocks.append(Ffn(parts, outward, fused))
    return blocks


def embedding(model: transformers.PreTrainedModel) -> tuple[str, str]:
    """Names of the token embedding's module and of its parameter."""
    found = model.get_input_embeddings()
    module = next(name for name, child in model.named_modules() if child is found)
    return module, next(name for name, parameter in model.named_parameters() if parameter is found.weight)
