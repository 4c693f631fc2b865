"""Random matrices laid out in memory as a tier's slots hold them, as many as it takes to overflow every cache."""

from itertools import accumulate

import torch
from torch import Tensor

from tiercache.bench.shapes import GROUP, LEVELS
from tiercache.bench.timing_device import Effort, TimingDevice, working_set_bytes
from tiercache.quant.planes import PRECISIONS, Planes, plane_widths, scale_row_bytes
from tiercache.store.format import align
from tiercache.store.manifest import PlaneWeight

_CODE_BYTES, _SCALES = 1 << 24, 1 << 20


def random_codes(seed: int) -> Tensor:
    """Random bytes that all matrices repeat: enough for timing, and made once."""
    return torch.randint(0, 256, (_CODE_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def make(
    device: TimingDevice, effort: Effort, codes: Tensor, layout: tuple[int, int, int], precision: str
) -> list[tuple[Planes, ...]]:
    """Copies of a unit at a precision, each as the planes of its parts.

    Args:
        device: whose memory they take.
        effort: how much of it.
        codes: what they are filled with.
        layout: rows, columns, and how many matrices lie side by side in a row.
        precision: of the planes.
    """
    rows, columns, parts = layout
    widths = plane_widths(columns, GROUP, PRECISIONS[precision])
    *plane_at, scale_at = accumulate((align(rows * parts * width) for width in widths), initial=0)
    end = scale_at + rows * parts * scale_row_bytes(columns, GROUP)
    places = (0,) * len(widths), tuple(plane_at), scale_at
    weights = [
        PlaneWeight(rows, columns, GROUP, parts, *places, own=(part,), transposed=False) for part in range(parts)
    ]
    unit_bytes = align(end)
    count = max(1, -(-working_set_bytes(device, effort) // unit_bytes))
    memory = device.memory(count * unit_bytes)
    slots = memory.split(unit_bytes)
    _fill(memory, codes)  # units are no multiple of its size, so that each begins elsewhere in it
    scales = _scales(codes)
    for slot in slots:
        _fill(slot[scale_at:end], scales)
    return [tuple(weight.part(slot, part) for part, weight in enumerate(weights)) for slot in slots]


def nbytes(weight: Planes) -> int:
    """Codes and scales of one matrix at the precision held."""
    return sum(plane.numel() for plane in weight.planes) + weight.scales.nbytes


def _scales(codes: Tensor) -> Tensor:
    """The bytes of fp16 lo and step, for weights within about +-0.07."""
    spread = 1 + codes[:_SCALES, None] / 2560
    return (spread * torch.tensor([-0.0625, 0.125 / LEVELS])).half().flatten().view(torch.uint8)


def _fill(target: Tensor, pattern: Tensor) -> None:
    """Repeat the pattern over `target`."""
    for piece in target.split(pattern.numel()):
        piece.copy_(pattern[: piece.numel()])
