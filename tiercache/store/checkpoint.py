"""The original checkpoint, in place: which file bytes hold which parameter of the transformers model.

Resolves a folder or Hub id, builds the model without weights, and maps file names to parameter names with
transformers' own conversion table (a key in a file need not be the parameter's name). Reads no weights. Where weights
are packed (`tiercache.formats`), a parameter is what is computed from its bytes.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tiercache.compat import WeightRenaming, get_model_conversion_mapping
from tiercache.errors import StoreError, TiercacheError, UnsupportedModelError, UsageError
from tiercache.formats.description import described, source_of
from tiercache.formats.packed import loss
from tiercache.formats.unpacked import unpacked
from tiercache.model import meta_model
from tiercache.store.header import DTYPES, TensorRef, read_checkpoint
from tiercache.store.identity import fingerprint, of_files
from tiercache.store.reader import PackedTensor, StoredTensor

_PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint and what it means.

    Attributes:
        folder, config: where it lies, and its transformers configuration.
        dtype: what its parameters are run in, as `from_pretrained` would choose.
        tensors: the file bytes of each parameter, by parameter name, or what they are computed from; tied parameters
            under the name transformers keeps (the token embedding's).
    """

    folder: Path
    config: transformers.PretrainedConfig
    dtype: torch.dtype
    tensors: Mapping[str, StoredTensor]

    @classmethod
    def open(cls, path_or_id: str | Path) -> "Checkpoint":
        """Read the headers of a folder's or Hub repository's checkpoint, or of a GGUF file.

        Raises UsageError where there is no such folder or repository, StoreError where files or tensors are missing or
        cut short, UnsupportedModelError for what tiercache does not run.
        """
        folder = resolve(path_or_id)
        config = meta_model.read_config(folder)
        meta_model.refuse_experts(config)
        packed = source_of(folder)
        plain = read_checkpoint(folder) if packed is None else {}
        dtype = _run_dtype(config, plain)
        try:
            model = meta_model.build(config, dtype)
        except TiercacheError:
            raise
        except Exception as error:  # transformers checks the values of a configuration in many places and ways
            raise StoreError(
                f"{folder / 'config.json'} describes no model that can be built ({error}); download it again"
            ) from error
        files: Mapping[str, StoredTensor] = plain if packed is None else packed.tensors(model)
        return cls(folder, config, dtype, _by_parameter(model, files, folder))

    def model(self) -> transformers.PreTrainedModel:
        """The model without weights, with the generation defaults that lie beside the checkpoint."""
        return meta_model.with_defaults(self.config, self.dtype, self.folder)

    def identity(self) -> str:
        """A hash of what the checkpoint holds: names, dtypes, shapes, and a sample of each tensor's bytes.

        It stays the same when the files are copied, sharded otherwise or downloaded again.
        """
        stored: dict[str, TensorRef] = {}
        for name, ref in self.tensors.items():
            parts = ref.parts() if isinstance(ref, PackedTensor) else {"": ref}
            stored |= {f"{name} {part}".rstrip(): own for part, own in parts.items()}
        return of_files(stored)

    @property
    def loss(self) -> str:
        """What quantising has cost the weights before, in words; empty for a checkpoint that nobody quantised."""
        return loss(self.tensors.values())

    def in_place(self, *, show_progress: bool | None = None) -> "Checkpoint":
        """The same with every tensor as it lies in a file; packed ones are unpacked into `folder` first, once.

        Raises:
            EnvironmentUnsupportedError: the disk lacks the room.
            StoreError: what is packed is damaged.
        """
        if not any(isinstance(ref, PackedTensor) for ref in self.tensors.values()):
            return self
        refs = unpacked(self.folder, self.tensors, self.dtype, show_progress=show_progress)
        return replace(self, tensors=dict(refs))

    def refs(self) -> dict[str, TensorRef]:
        """Where each parameter lies; of a checkpoint that is `in_place`."""
        return {name: ref for name, ref in self.tensors.items() if isinstance(ref, TensorRef)}


def identity_in_memory(model: transformers.PreTrainedModel) -> str:
    """What `Checkpoint.identity` would say of the same model saved as a checkpoint."""
    slots = {name: parameter.data.view(-1).view(torch.uint8).numpy() for name, parameter in model.named_parameters()}
    names = {dtype: name for name, dtype in DTYPES.items()}
    described = {
        name: (names[parameter.dtype], tuple(parameter.shape), parameter.nbytes)
        for name, parameter in model.named_parameters()
    }
    return fingerprint(described, lambda name, offset, nbytes: slots[name][offset : offset + nbytes].tobytes())


def resolve(path_or_id: str | Path) -> Path:
    """The folder of a checkpoint; a Hub id is looked up in the local cache and downloaded if need be.

    Of a GGUF file, and of a checkpoint whose weights are quantised, it is the folder in the cache that describes it.
    """
    found = _found(path_or_id)
    return described(found) or found


def _found(path_or_id: str | Path) -> Path:
    """The folder or GGUF file that was named."""
    name = str(path_or_id)
    path = Path(name).expanduser()
    if name and (path.is_dir() or (path.is_file() and path.suffix == ".gguf")):
        return path
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise UsageError(
            f"{name!r} is neither a folder nor a Hub id such as 'org/model', and no GGUF file; check the path"
        )
    try:
        return Path(snapshot_download(name, allow_patterns=list(_PATTERNS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            f"{name!r} is no folder here and could not be had from the Hub ({type(error).__name__}); "
            "check the spelling and the network, or name a local folder"
        ) from error


def _run_dtype(config: transformers.PretrainedConfig, files: Mapping[str, TensorRef]) -> torch.dtype:
    """The configured dtype, else that of the checkpoint's first floating-point tensor, as transformers chooses."""
    configured = getattr(config, "dtype", None)
    if isinstance(configured, torch.dtype):
        return configured
    return next((DTYPES[ref.dtype] for ref in files.values() if ref.dtype in DTYPES), torch.float32)


def _by_parameter(
    model: transformers.PreTrainedModel, files: Mapping[str, StoredTensor], folder: Path
) -> dict[str, StoredTensor]:
    """Map the checkpoint's names to the parameters of `model`; each must be there, in its shape."""
    parameters = dict(model.named_parameters())  # tied ones once, under the first name
    aliases = _aliases(model)
    found: dict[str, StoredTensor] = {}
    for key, ref in files.items():
        name = _parameter_name(model, key, parameters.keys() | aliases.keys())
        name = aliases.get(name, name)
        if name in parameters and (name not in found or key == name):
            found[name] = ref
    for name, parameter in parameters.items():
        if name not in found:
            raise StoreError(f"{folder} lacks the tensor {name!r}; the checkpoint is incomplete: download it again")
        ref = found[name]
        if ref.shape != tuple(parameter.shape):
            raise StoreError(
                f"{folder}: {name!r} has shape {list(ref.shape)}, the configuration asks for "
                f"{list(parameter.shape)}; config.json is another model's"
            )
        if ref.dtype not in DTYPES:
            raise UnsupportedModelError(
                f"{folder}: {name!r} is stored as {ref.dtype}; tiercache reads {', '.join(DTYPES)}: convert it first"
            )
    return found


def _aliases(model: transformers.PreTrainedModel) -> dict[str, str]:
    """Names of tied parameters, each with the name that `named_parameters` keeps."""
    kept = {id(parameter): name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: kept[id(parameter)] for name, parameter in every if kept[id(parameter)] != name}


def _parameter_name(model: transformers.PreTrainedModel, key: str, known: set[str]) -> str:
    """The parameter that a checkpoint's key names, by transformers' renamings and the base-model prefix."""
    name = key
    for transform in get_model_conversion_mapping(model):
        renamed, pattern = transform.rename_source_key(name)
        if pattern is not None and not isinstance(transform, WeightRenaming):
            raise UnsupportedModelError(
                f"{model.config.model_type}: transformers rebuilds {key!r} while loading, which reading in place "
                "cannot do; load the model once and save it again with save_pretrained(...)"
            )
        name = renamed
    prefix = model.base_model_prefix
    candidates = (name, re.sub(rf"^{re.escape(prefix)}\.", "", name, count=1), f"{prefix}.{name}")
    return next((candidate for candidate in candidates if candidate in known), name)
