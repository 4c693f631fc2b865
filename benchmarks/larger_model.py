"""A trained toy made as large as one likes without changing what it says.

It gets further hidden features that are always zero, further neurons whose down columns are zero, and behind its layers
further ones whose outputs are. What meets them is random, and is read, moved and multiplied like any other weight, at
every precision; what it adds is nothing. So a model that really predicts can be larger than memory on a machine where
no large one can be downloaded.

Knows Llama checkpoints; nothing of tiers.
"""

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tiercache.errors import UsageError
from tiercache.progress import bar

_INTO_HIDDEN = ("o_proj", "down_proj")  # their outputs are hidden features
_NEURONS = ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Size:
    """What a model is widened to.

    Attributes:
        hidden: features; the model's own times a power of 4, so that its norms are scaled without rounding.
        neurons: of each feed-forward block; a multiple of 64, which keeps the groups of the codes apart.
        layers: of the model.
    """

    hidden: int
    neurons: int
    layers: int

    def __str__(self) -> str:
        return f"{self.hidden}x{self.neurons}x{self.layers}"

    @classmethod
    def parse(cls, text: str) -> "Size":
        """`Size.parse("4096x16384x8")`.

        Raises:
            UsageError: not three numbers.
        """
        parts = text.split("x")
        if len(parts) != 3 or not all(part.isdigit() for part in parts):
            raise UsageError(f"size {text!r} must be HIDDENxNEURONSxLAYERS, such as 4096x16384x8")
        return cls(*(int(part) for part in parts))


def widen(checkpoint: Path, folder: Path, size: Size, seed: int = 0, *, show_progress: bool | None = None) -> Path:
    """Write the checkpoint at another size; an equal one that is there is kept.

    Args:
        checkpoint: of a Llama model, in one file.
        folder: where to.
        size: of the whole, the model's own included.
        seed: of what is random.

    Raises:
        UsageError: the checkpoint is of another kind, or cannot have this size.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama" or not (checkpoint / "model.safetensors").is_file():
        raise UsageError(f"{checkpoint} is no Llama checkpoint in one file; name one")
    _check(config, size)
    stamp = {"of": checkpoint.name, "seed": seed, **size.__dict__}
    marker = folder / "widened.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == stamp:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shards = _shards(load_file(checkpoint / "model.safetensors"), config["num_hidden_layers"], size.layers)
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    with bar(f"widening {checkpoint.name}", len(shards), show=show_progress) as advance:
        for place, held in shards.items():
            file = f"model-{place}.safetensors"
            wide = {
                name: _enlarged(name, tensor, config["hidden_size"], size, generator) for name, tensor in held.items()
            }
            save_file(wide, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(wide, file)
            advance(1)
    for path in checkpoint.iterdir():
        if path.suffix == ".json":
            shutil.copyfile(path, folder / path.name)
    config["rms_norm_eps"] *= config["hidden_size"] / size.hidden  # the mean is over more features
    config |= {"hidden_size": size.hidden, "intermediate_size": size.neurons, "num_hidden_layers": size.layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    marker.write_text(json.dumps(stamp), encoding="utf-8")
    return folder


def _check(config: dict[str, Any], size: Size) -> None:
    own = Size(config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"])
    times = size.hidden / own.hidden
    if times not in {4.0**power for power in range(9)}:
        raise UsageError(f"hidden={size.hidden} must be the model's own {own.hidden} times a power of 4")
    if size.neurons < own.neurons or size.neurons % 64 or size.layers < own.layers:
        raise UsageError(
            f"neurons={size.neurons} must be a multiple of 64 and no less than the model's own {own.neurons}, "
            f"layers={size.layers} no less than {own.layers}"
        )


def _shards(tensors: dict[str, Tensor], own: int, layers: int) -> dict[str, dict[str, Tensor]]:
    """The parameters by layer, those of idle layers included."""
    shards: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        shards.setdefault(place, {})[name] = tensor
    for layer in range(own, layers):
        idle = {}
        for name, tensor in shards["0"].items():
            adds = any(f".{part}." in name for part in _INTO_HIDDEN)
            idle[name.replace(".layers.0.", f".layers.{layer}.")] = torch.zeros_like(tensor) if adds else tensor
        shards[str(layer)] = idle
    return shards


def _enlarged(name: str, tensor: Tensor, hidden: int, size: Size, generator: torch.Generator) -> Tensor:
    """One parameter at the new size."""
    part = name.split(".")[-2]
    if tensor.ndim == 1:  # a norm: its input is that much larger, for the mean is over more features
        scaled = tensor * math.sqrt(hidden / size.hidden)
        return torch.cat([scaled, tensor.new_ones(size.hidden - hidden)])
    if part == "embed_tokens":
        return _padded(tensor, tensor.shape[0], size.hidden)
    if part in _INTO_HIDDEN:
        return _padded(tensor, size.hidden, size.neurons if part == "down_proj" else tensor.shape[1])
    rows = size.neurons if part in _NEURONS else tensor.shape[0]
    wide = torch.randn(rows, size.hidden, generator=generator).mul_(tensor.float().std()).to(tensor.dtype)
    wide[: tensor.shape[0], :hidden] = tensor
    return wide


def _padded(tensor: Tensor, rows: int, columns: int) -> Tensor:
    wide = tensor.new_zeros(rows, columns)
    wide[: tensor.shape[0], : tensor.shape[1]] = tensor
    return wide
