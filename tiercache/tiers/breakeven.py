"""Measures, on this machine and now, what it costs to copy planes to the device, and to multiply them in DRAM.

Knows slabs and kernels; the decision is `policies.offload`'s.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from policies import offload
from tiercache.kernels.contract import Kernels
from tiercache.quant.planes import PLANE_BITS, Planes, plane_row_bytes, plane_widths, scale_row_bytes
from tiercache.tiers.device import device_of
from tiercache.tiers.slab import Slab

_COLUMNS, _GROUP = 4096, 64
_BYTES = 48 << 20  # read once for each measurement: more than most caches hold
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128)
_REPEATS = 3


def measure_breakeven(kernels: Kernels, planes: int, device: torch.device) -> int:
    """Up to how many tokens a pass is faster with the CPU multiplying in DRAM than with copies to `device`.

    Takes up to 75 MB of main memory for as long as it measures, and 8 MB on `device`: call it before tiers are filled.

    `kernels` are the CPU's, and the weights have so many `planes`.
    """
    lower = Slab(_BYTES, torch.device("cpu"), pinned_for=device)
    try:
        weight = _matrix(lower.bytes, planes)
        used = weight.rows * _row_bytes(planes)
        link_s = _copy_seconds(lower.bytes[:used], device)
        product_s: dict[int, float] = {}
        for tokens in _TOKENS:
            product_s[tokens] = _matmul_seconds(kernels, weight, tokens)
            if product_s[tokens] >= link_s:
                break
        return offload.breakeven_tokens(link_s, product_s)
    finally:
        lower.close()


def _row_bytes(planes: int) -> int:
    return sum(plane_widths(_COLUMNS, _GROUP, planes)) + scale_row_bytes(_COLUMNS, _GROUP)


def _matrix(memory: torch.Tensor, planes: int) -> Planes:
    """A matrix that fills `memory`; its weights are zero, which takes as long as any others."""
    memory.zero_()
    rows, at, cut = memory.numel() // _row_bytes(planes), 0, []
    for p in range(min(planes, len(PLANE_BITS))):
        nbytes = rows * plane_row_bytes(_COLUMNS, _GROUP, p)
        cut.append(memory[at : at + nbytes].view(rows, -1))
        at += nbytes
    scales = memory[at : at + rows * scale_row_bytes(_COLUMNS, _GROUP)]
    return Planes(tuple(cut), scales.view(torch.float16).view(rows, -1, 2), _COLUMNS, _GROUP)


def _copy_seconds(source: torch.Tensor, device: torch.device) -> float:
    """Seconds to copy `source` to the device, in pieces as large as a unit's."""
    target = Slab(_BYTES // 8, device).bytes

    def copy() -> None:
        for piece in source.split(target.numel()):
            target[: piece.numel()].copy_(piece, non_blocking=True)
        device_of(device).synchronize()

    return _seconds(copy)


def _matmul_seconds(kernels: Kernels, weight: Planes, tokens: int) -> float:
    """Seconds of a matmul with `tokens`, quantizing the activations included."""
    floats: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    x, out = torch.ones(tokens, _COLUMNS, **floats), torch.zeros(tokens, weight.rows, **floats)
    return _seconds(lambda: kernels.matmul(kernels.quantize_activations(x, _GROUP), weight, out))


def _seconds(work: Callable[[], None]) -> float:
    """The median of a few, after one that does not count."""
    work()
    taken = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        work()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken)
