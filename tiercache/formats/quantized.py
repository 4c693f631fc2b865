"""A safetensors folder whose config.json says that its weights are quantised: GPTQ, AWQ or compressed-tensors.

It runs in the dtype that config.json names: its makers chose it, and the scales are stored in it.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers

from tiercache.errors import StoreError, UnsupportedModelError
from tiercache.formats import awq, compressed_tensors, gptq
from tiercache.formats.packed import PackedSource
from tiercache.store import identity
from tiercache.store.header import DTYPES, TensorRef, read_checkpoint, small_files
from tiercache.store.reader import StoredTensor

_METHODS: dict[str, ModuleType] = {"gptq": gptq, "awq": awq, "compressed-tensors": compressed_tensors}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class QuantizedFolder(PackedSource):
    """A folder with `quantization_config` in its config.json, which is `settings`."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.place, self.title, self._settings = folder, _title(folder), settings
        method = settings.get("quant_method")
        if method not in _METHODS:
            raise UnsupportedModelError(
                f"{folder} is already quantised, by {method!r}, which tiercache does not read; name the 16- or 32-bit "
                f"checkpoint, or one of GGUF, {', '.join(_METHODS)}"
            )
        self._format = _METHODS[method]
        try:
            self._format.check(settings, str(folder))
        except (AttributeError, TypeError) as error:
            raise StoreError(
                f"{folder / 'config.json'}: its quantization_config cannot be read ({error}); download it again"
            ) from error
        self._files = read_checkpoint(folder)

    @cached_property
    def digest(self) -> str:
        found = hashlib.sha256(identity.of_files(self._files).encode())
        for path in small_files(self.place):
            found.update(path.name.encode() + b"\0" + path.read_bytes())
        return found.hexdigest()

    def describe(self, folder: Path) -> None:
        for path in small_files(self.place):
            shutil.copyfile(path, folder / path.name)
        config = json.loads((self.place / "config.json").read_bytes())
        del config["quantization_config"]
        if not (config.get("dtype") or config.get("torch_dtype")):
            config["dtype"] = str(self._scale_dtype()).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def tensors(self, model: transformers.PreTrainedModel) -> dict[str, StoredTensor]:
        dtype = _NAMES[model.dtype]
        found: dict[str, StoredTensor] = {}
        packed: dict[str, dict[str, TensorRef]] = {}
        for name, ref in self._files.items():
            module, _, part = name.rpartition(".")
            if part in self._format.PARTS:
                packed.setdefault(module, {})[part] = ref
            else:
                found[name] = ref
        for module, stored in packed.items():
            found[f"{module}.weight"] = self._format.tensor(f"{self.place}: {module}", stored, self._settings, dtype)
        return found

    def _scale_dtype(self) -> torch.dtype:
        scales = (ref.dtype for name, ref in sorted(self._files.items()) if name.endswith(("scales", "weight_scale")))
        return next((DTYPES[dtype] for dtype in scales if dtype in DTYPES), torch.float16)


def _title(folder: Path) -> str:
    """The folder's name; of a Hub's snapshot, which is named by a hash, the model's."""
    return folder.parent.parent.name.rpartition("--")[2] if folder.parent.name == "snapshots" else folder.name


def settings_of(folder: Path) -> Mapping[str, Any] | None:
    """How the weights of a folder are quantised, as its config.json says; None where it says nothing of that.

    A config.json that cannot be read says nothing here: whoever reads the configuration will complain.
    """
    try:
        settings = json.loads((folder / "config.json").read_bytes()).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return None
    if settings is None:
        return None
    if not isinstance(settings, dict):
        raise StoreError(f"{folder / 'config.json'}: its quantization_config is no object; download it again")
    return settings
