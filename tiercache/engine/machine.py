"""The device that computes and the kernels that multiply by planes there. Knows options; nothing of models."""

import warnings
from dataclasses import dataclass

import torch

from tiercache.config.options import OffloadConfig, of_planes, refuse_unknown_device
from tiercache.engine.compute_dtype import capability_of
from tiercache.errors import EnvironmentUnsupportedError
from tiercache.kernels.contract import Kernels
from tiercache.kernels.reference import ReferenceKernels
from tiercache.kernels.select import select, will_compile
from tiercache.model.card_attention import Capability
from tiercache.progress import note
from tiercache.tiers.device import on_gpu, on_host


@dataclass(frozen=True)
class Machine:
    """Where a model runs.

    Attributes:
        device: what computes.
        kernels: multiply by planes, by the type of device; empty where each weight is decoded first.
    """

    device: torch.device
    kernels: dict[str, Kernels]

    @property
    def is_gpu(self) -> bool:
        """Whether the device has memory of its own."""
        return not on_host(self.device)

    @property
    def capability(self) -> Capability | None:
        """The GPU's compute capability; None where the CPU computes."""
        return capability_of(self.device)

    @property
    def kernels_name(self) -> str:
        """The name of what multiplies by planes, for statistics."""
        return self.kernels[self.device.type].name if self.kernels else "decode"

    @classmethod
    def of(cls, config: OffloadConfig, *, must_multiply: bool, show: bool | None) -> "Machine":
        """The machine that the options ask for.

        Args:
            config: the options.
            must_multiply: by planes, slowly where there are no fast kernels; otherwise weights are decoded there.
            show: whether notes may be printed.

        Raises:
            EnvironmentUnsupportedError: no such device, or kernels="fast" where there are none.
        """
        device = resolve_device(config.device)
        return cls(device, kernels_for(config, device, must_multiply, show))


def resolve_device(name: str) -> torch.device:
    """The device that was asked for; "auto" is the first GPU if torch can use one.

    Raises:
        UsageError: it is no name of a device.
        EnvironmentUnsupportedError: it is not there.
    """
    refuse_unknown_device(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if on_gpu(device):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise EnvironmentUnsupportedError(
                f"device={name!r}, but torch {torch.__version__} sees {count} GPUs; run 'tiercache doctor', or ask for "
                "device='cpu'"
            )
        torch.cuda.init()  # memory statistics are refused before it
        return torch.device("cuda", device.index or 0)
    return device


def kernels_for(
    config: OffloadConfig, device: torch.device, must_multiply: bool, show: bool | None
) -> dict[str, Kernels]:
    """Kernels for a device, and for the CPU beside it. Warns where there are none and none were ruled out."""
    if not of_planes(config.precision) or config.kernels == "decode":
        return {}
    if will_compile():
        note("compiling the kernels for this processor, once; it takes about half a minute", show=show)
    found: dict[str, Kernels] = {}
    try:
        found[device.type] = select(device)
        if not on_host(device):
            found["cpu"] = select(torch.device("cpu"))
    except EnvironmentUnsupportedError as error:
        if config.kernels == "fast" and not found:
            raise
        lost = "nothing is multiplied in DRAM" if found else "every matrix is decoded before it is multiplied"
        warnings.warn(f"{lost}, which is slow: {error}", stacklevel=7)
        if must_multiply:
            found = {"cpu": ReferenceKernels(), device.type: ReferenceKernels(device)} | found
    return found
