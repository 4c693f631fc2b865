"""What the tests of the CUDA kernels are made of: matrices, bundles, activations, and what noise they may show."""

from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tiercache.quant.codes import CELL
from tiercache.quant.planes import PRECISIONS as RUNG_PLANES
from tiercache.quant.planes import Planes, decode, encode

PRECISIONS = tuple(RUNG_PLANES)
# Of the sum of the magnitudes of what is added up; the contract's own bound is 1e-4.
NOISE = 3e-6
REACH = 16 * CELL + 3  # steps that codes reach over


def matrix(rows: int, columns: int, group: int, precision: str, seed: int = 0) -> Planes:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return encode(values * 0.05 + 0.01, group).at(precision)


def strided(weight: Planes, gap: int) -> Planes:
    """The same matrix as a bundle: a row's planes and scales side by side, each `gap` bytes after the one before."""
    parts = [*weight.planes, weight.scales.flatten(1).view(torch.uint8)]
    starts, end = [], 0
    for part in parts:
        starts.append(end + gap)
        end = starts[-1] + part.shape[1]
    starts[-1] += starts[-1] % 2  # fp16 stands at even bytes
    pitch = starts[-1] + parts[-1].shape[1]
    block = torch.full((weight.rows, pitch), 0xA5, dtype=torch.uint8)
    views = [block[:, at : at + part.shape[1]].copy_(part) for at, part in zip(starts, parts, strict=True)]
    scales = views[-1].view(torch.float16).unflatten(1, (-1, 2))
    return replace(weight, planes=tuple(views[:-1]), scales=scales)


def dense(weight: Planes, rows: Tensor | None = None) -> Tensor:
    values = decode(weight, torch.float32)
    return values if rows is None else values[rows.long()]


def spans(weight: Planes, rows: Tensor | None = None) -> Tensor:
    """A bound of what is added up for each weight: the group's |lo| and its range, [rows, columns]."""
    lo, step = weight.scales.float().unbind(-1)
    values = (lo.abs() + REACH * step).repeat_interleave(weight.group, 1)[:, : weight.columns]
    return values if rows is None else values[rows.long()]


def assert_close(found: Tensor, wanted: Tensor, magnitude: Tensor) -> None:
    worst = (
        ((found.double() - wanted.double()).abs() - NOISE * magnitude.double() - 1e-30).max() if found.numel() else 0
    )
    assert worst <= 0, f"off by {float((found - wanted).abs().max())} of {float(magnitude.max())}"


def selection(draw: Any, rows: int) -> Tensor | None:
    if draw(st.booleans()):
        return None
    kind = draw(st.sampled_from((torch.int32, torch.int64)))
    return torch.tensor(draw(st.lists(st.integers(0, rows - 1), max_size=50)), dtype=kind)


def activations(tokens: int, features: int, kind: torch.dtype, seed: int) -> Tensor:
    """Of mixed sizes and not in one piece."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(features, tokens + 3, generator=random).T[1 : tokens + 1]
    return (x * torch.rand(tokens, 1, generator=random).mul(6).exp()).to(kind)
