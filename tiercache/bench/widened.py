"""A trained toy made as large as one likes without changing what it says: its feed-forward blocks get further neurons
whose down columns are zero, and behind its layers come further ones whose outputs are.

The rest of them is random, and read, moved and multiplied like any other weight, at every rung; what they add is
nothing. So a model that really predicts can be larger than memory on a machine where no large one can be downloaded.

Knows Llama checkpoints; nothing of tiers.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tiercache.errors import UsageError
from tiercache.progress import bar

_OWN_PARTS = ("gate_proj", "up_proj", "down_proj")


def widen(
    checkpoint: Path, folder: Path, neurons: int, layers: int, seed: int = 0, *, show_progress: bool | None = None
) -> Path:
    """Write the checkpoint with `neurons` in each feed-forward block; an equal one that is there is kept.

    Args:
        checkpoint: of a Llama model, in one file.
        folder: where to.
        neurons: of each block, the model's own included; a multiple of 64 keeps the groups of the codes apart.
        layers: of the model, its own included.

    Raises:
        UsageError: the checkpoint has more neurons or layers already, or is of another kind.
    """
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] != "llama" or not (checkpoint / "model.safetensors").is_file():
        raise UsageError(f"{checkpoint} is no Llama checkpoint in one file; name one")
    own, own_layers = config["intermediate_size"], config["num_hidden_layers"]
    if neurons < own or neurons % 64 or layers < own_layers:
        raise UsageError(
            f"neurons={neurons} must be a multiple of 64 and no less than the model's own {own}, layers={layers} no "
            f"less than {own_layers}"
        )
    stamp = {"of": checkpoint.name, "neurons": neurons, "layers": layers, "seed": seed}
    marker = folder / "widened.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == stamp:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = load_file(checkpoint / "model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        place = name.split(".layers.")[1].split(".")[0] if ".layers." in name else "rest"
        shards.setdefault(place, {})[name] = tensor
    for layer in range(own_layers, layers):
        names = {name: name.replace(".layers.0.", f".layers.{layer}.") for name in shards["0"]}
        shards[str(layer)] = {new: _idle(name, shards["0"][name]) for name, new in names.items()}
    weight_map: dict[str, str] = {}
    with bar(f"widening {checkpoint.name}", len(shards), show=show_progress) as advance:
        for place, held in shards.items():
            file = f"model-{place}.safetensors"
            wide = {name: _widened(name, tensor, neurons - own, generator) for name, tensor in held.items()}
            save_file(wide, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(wide, file)
            advance(1)
    for path in checkpoint.iterdir():
        if path.suffix == ".json":
            shutil.copyfile(path, folder / path.name)
    config |= {"intermediate_size": neurons, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    marker.write_text(json.dumps(stamp), encoding="utf-8")
    return folder


def _widened(name: str, tensor: torch.Tensor, more: int, generator: torch.Generator) -> torch.Tensor:
    part = next((part for part in _OWN_PARTS if f".{part}." in name), None)
    if part is None or not more:
        return tensor
    if part == "down_proj":
        return torch.cat([tensor, tensor.new_zeros(tensor.shape[0], more)], dim=1)
    extra = torch.randn(more, tensor.shape[1], generator=generator) * tensor.float().std()
    return torch.cat([tensor, extra.to(tensor.dtype)])


def _idle(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A parameter of a layer that adds nothing."""
    return torch.zeros_like(tensor) if ".o_proj." in name or ".down_proj." in name else tensor
