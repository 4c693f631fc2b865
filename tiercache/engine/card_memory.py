"""What a card's memory holds beside tensors: context, cuBLAS's workspace, modules, graphs, and what rounding costs.

Constants, each with its source; what a card shows of them is in docs/budgets.md.
"""

import re

from profiler.hugepages import HUGE_PAGE_BYTES
from tiercache.config.environment import value, wants_cuda_graphs
from tiercache.kernels.cuda.runs import GRAPH_BYTES, GRAPHS_OF_A_HALF
from tiercache.model.card_attention import Capability

CONTEXT_BYTES = 287_047_680
"""Of CUDA and torch, kernels loaded when first used, as torch does it since 1.13 (measured in pytorch #86509).

A card that is at hand is asked what it has free when its context is there already, so this is of told cards alone.
"""

# torch's default, CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8, and 4 MiB of cublasLt's (24 GiB cards of 8.x; 1 MiB on others).
_WORKSPACE_BYTES = 2 * 4096 + 8 * 16 << 10
_LT_WORKSPACE_BYTES = 4 << 20
_WORKSPACE_CONFIG = re.compile(r"(:\d+:\d+)+")  # :KiB:number, of each size
# torch takes 32 MiB from Hopper on; 36 MiB were measured on an H200, with cublasLt's (docs/measured.md).
_WORKSPACE_OF_HOPPER_BYTES = 36 << 20
_HOPPER = (9, 0)
# A driver loads code in steps of 2 MiB, and took one for a kernel that was first used (an H100, docs/measured.md); this
# is for 16 of them, the library's own and cuBLAS's and torch's of a pass. Their sum was not measured.
_MODULES_BYTES = 16 * HUGE_PAGE_BYTES
# Slabs lie at multiples of 2 MiB, and torch asks the driver for multiples of 2 MiB: the tier's, the workspace's, and
# in mixed mode that of the neurons' slots.
_SLABS, _SLAB_BYTES = 3, 2 * HUGE_PAGE_BYTES


def card_reserve(capability: Capability | None, halves: int) -> dict[str, int]:
    """Bytes of a card beside tensors that every run takes of the HBM budget, by purpose.

    Args:
        capability: of the card; None where nobody told, and it is taken for the greediest.
        halves: fused halves of layers, which may be CUDA graphs.

    Raises:
        UsageError: TIERCACHE_CUDA_GRAPHS is neither 0 nor 1.
    """
    hopper = capability is None or capability >= _HOPPER
    return {
        "cuBLAS workspace": _workspace_bytes(hopper),
        "kernel modules": _MODULES_BYTES,
        "CUDA graphs": halves * GRAPHS_OF_A_HALF * GRAPH_BYTES if wants_cuda_graphs() else 0,
        "rounding of slabs": _SLABS * _SLAB_BYTES,
    }


def _workspace_bytes(hopper: bool) -> int:
    """What torch gives cuBLAS: as CUBLAS_WORKSPACE_CONFIG says, where it can be read (torch warns where it cannot)."""
    asked = value("CUBLAS_WORKSPACE_CONFIG") or ""
    if _WORKSPACE_CONFIG.fullmatch(asked):
        sizes = [int(each) for each in asked.split(":")[1:]]
        return (
            sum(size * count for size, count in zip(sizes[::2], sizes[1::2], strict=True)) * 1024 + _LT_WORKSPACE_BYTES
        )
    return _WORKSPACE_OF_HOPPER_BYTES if hopper else _WORKSPACE_BYTES + _LT_WORKSPACE_BYTES
