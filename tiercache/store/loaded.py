"""A model that is in memory already: whether its parameters can be used in place, and which checkpoint it is."""

import torch
import transformers

from tiercache.errors import UsageError
from tiercache.model import meta_model
from tiercache.store.header import DTYPES
from tiercache.store.source import fingerprint
from tiercache.tiers.device import on_host


def check(model: transformers.PreTrainedModel) -> None:
    """Refuse models whose parameters are not plain tensors in main memory.

    Raises:
        UsageError: offloaded already, by tiercache or by accelerate, or with parameters elsewhere.
        UnsupportedModelError: a mixture of experts.
    """
    if hasattr(model, "tiercache"):
        raise UsageError("this model is offloaded already; leave that context before opening it again")
    if getattr(model, "hf_device_map", None) or any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise UsageError(
            "accelerate holds this model's weights (device_map); load it without device_map, or give its path"
        )
    for name, parameter in model.named_parameters():
        if not on_host(parameter.device) or not parameter.is_contiguous():
            raise UsageError(
                f"{name} lies on {parameter.device} or in a strided view; give a model in main memory, or its path"
            )
    meta_model.refuse_experts(model.config)


def identity(model: transformers.PreTrainedModel) -> str:
    """What `Source.identity` would say of the same model saved as a checkpoint."""
    slots = {name: parameter.data.view(-1).view(torch.uint8).numpy() for name, parameter in model.named_parameters()}
    names = {dtype: name for name, dtype in DTYPES.items()}
    described = {
        name: (names[parameter.dtype], tuple(parameter.shape), parameter.nbytes)
        for name, parameter in model.named_parameters()
    }
    return fingerprint(described, lambda name, offset, nbytes: slots[name][offset : offset + nbytes].tobytes())
