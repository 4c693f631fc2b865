"""Random matrices laid out in memory as a tier's slots hold them, as many as it takes to overflow every cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tiercache.bench.shapes import GROUP, LEVELS
from tiercache.bench.timing_device import Effort, TimingDevice, working_set_bytes
from tiercache.quant.planes import PRECISIONS, Planes, plane_widths, scale_row_bytes
from tiercache.store.format import align
from tiercache.store.manifest import PlaneWeight

_POOL_BYTES = 1 << 24
_STRIDE = 1_000_003  # how far on in the pool the next piece begins


@dataclass(frozen=True)
class Pool:
    """Random bytes that all matrices repeat, each from another place: enough for timing, and made once.

    Attributes:
        codes: uint8.
        scales: the bytes of fp16 lo and step, for weights within about +-0.07.
    """

    codes: Tensor
    scales: Tensor

    @classmethod
    def make(cls, seed: int) -> "Pool":
        """From a seed."""
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randint(0, 256, (_POOL_BYTES,), dtype=torch.uint8, generator=generator)
        spread = 1 + 0.1 * torch.rand(_POOL_BYTES >> 4, 2, generator=generator)
        scales = (spread * torch.tensor([-0.0625, 0.125 / LEVELS])).half()
        return cls(codes, scales.flatten().view(torch.uint8))


def make(
    device: TimingDevice, effort: Effort, pool: Pool, layout: tuple[int, int, int], precision: str
) -> list[tuple[Planes, ...]]:
    """Copies of a unit at a precision, each as the planes of its parts.

    Args:
        device: whose memory they take.
        effort: how much of it.
        pool: what they are filled with.
        layout: rows, columns, and how many matrices lie side by side in a row.
        precision: of the planes.
    """
    rows, columns, parts = layout
    widths = list(plane_widths(columns, GROUP, PRECISIONS[precision]))
    *plane_at, scale_at = _offsets(widths, rows * parts)
    end = scale_at + rows * parts * scale_row_bytes(columns, GROUP)
    unit_bytes = align(end)
    places = (0,) * len(widths), tuple(plane_at), scale_at
    weights = [
        PlaneWeight(rows, columns, GROUP, parts, *places, own=(part,), transposed=False) for part in range(parts)
    ]
    count = max(1, -(-working_set_bytes(device, effort) // unit_bytes))
    memory = device.memory(count * unit_bytes)
    made = []
    for number, slot in enumerate(memory.split(unit_bytes)):
        for place, at in enumerate(plane_at):
            _fill(slot[at : at + rows * parts * widths[place]], pool.codes, _STRIDE * (3 * number + place))
        _fill(slot[scale_at:end], pool.scales, 4 * _STRIDE * number)  # by whole pairs
        made.append(tuple(weight.part(slot, part) for part, weight in enumerate(weights)))
    return made


def nbytes(weight: Planes) -> int:
    """Codes and scales of one matrix at the precision held."""
    return sum(plane.numel() for plane in weight.planes) + weight.scales.nbytes


def some_rows(weight: Planes, rows: Tensor) -> Planes:
    """The given rows, in main memory."""
    planes = tuple(plane[rows.to(plane.device)].cpu() for plane in weight.planes)
    scales = weight.scales[rows.to(weight.scales.device)].cpu()
    return Planes(planes, scales, weight.columns, weight.group)


def one_group(weight: Planes, group: int) -> Planes:
    """The columns of one group, in main memory."""
    size, groups = weight.group, weight.scales.shape[1]

    def cut(plane: Tensor, width: int, begin: int = 0) -> Tensor:  # `width` bytes a group
        return plane[:, begin + width * group : begin + width * (group + 1)].cpu()

    first, *others = weight.planes  # the first has two bits of every group, then one bit of every group
    halves = torch.cat([cut(first, size // 4), cut(first, size // 8, groups * size // 4)], dim=1)
    widths = plane_widths(size, size, len(weight.planes))[1:]
    planes = (halves, *(cut(plane, width) for plane, width in zip(others, widths, strict=True)))
    return Planes(planes, weight.scales[:, group : group + 1].cpu(), size, size)


def _offsets(widths: list[int], rows: int) -> list[int]:
    """Where each piece of a slot begins, and where the slot ends."""
    at = [0]
    for width in widths:
        at.append(align(at[-1] + rows * width))
    return at


def _fill(target: Tensor, pool: Tensor, start: int) -> None:
    """Repeat the pool over `target`, from `start` on."""
    at, begin = 0, start % pool.numel()
    while at < target.numel():
        piece = pool[begin : begin + target.numel() - at]
        target[at : at + piece.numel()].copy_(piece)
        at, begin = at + piece.numel(), 0
