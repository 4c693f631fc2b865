"""Which dtype a model computes in: what was asked for, or what the card computes in at full speed.

Knows dtypes and compute capabilities, measured or told; nothing of models or memory.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from tiercache.config.options import ComputeDtype
from tiercache.model.card_attention import Capability
from tiercache.tiers.device import on_gpu

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
)
_FP16_FROM, _BF16_FROM = (7, 0), (8, 0)  # 5.2 has no fp16, 6.1 has it at a 64th of fp32; bf16 came with 8.0


def capability_of(device: torch.device) -> Capability | None:
    """The compute capability of a GPU; None of the CPU."""
    return torch.cuda.get_device_capability(device) if on_gpu(device) else None


def compute_dtype(asked: ComputeDtype, stored: torch.dtype, capability: Capability | None) -> torch.dtype:
    """The dtype that a model computes in.

    "auto" keeps the checkpoint's dtype wherever the device has it at full speed, so that nothing is rounded without
    need: on the CPU, of fp32, of fp16 from 7.0, of bf16 from 8.0. Before 7.0 both are computed in fp32, which holds
    them exactly; on 7.0 and 7.5 bf16 is computed in fp16.

    Args:
        asked: the option.
        stored: the checkpoint's dtype.
        capability: of the card; None where the CPU computes.
    """
    if asked != "auto":
        return DTYPES[asked]
    if capability is None or stored not in (torch.float16, torch.bfloat16):
        return stored
    if capability < _FP16_FROM:
        return torch.float32
    return torch.float16 if capability < _BF16_FROM else stored


def name_of(dtype: torch.dtype) -> str:
    """As the option names it; torch's name where it has none."""
    return next((name for name, known in DTYPES.items() if known == dtype), str(dtype).removeprefix("torch."))
