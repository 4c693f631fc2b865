"""Turns one planned unit into the bytes of its files, a chunk of whole rows at a time.

It reads the unit's tensors from the checkpoint, at most one feed-forward block at once. It encodes them and puts the
rows of the unit's matrices side by side. It does not know where the bytes go.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch

from tiercache.errors import QuantizationError
from tiercache.quant import gptq, hadamard
from tiercache.quant.gptq import LayerMoments
from tiercache.quant.planes import Planes, encode
from tiercache.quant.tune import CodedPiece
from tiercache.store.checkpoint import Checkpoint
from tiercache.store.format import PLANE_FILES, SCALE_FILE
from tiercache.store.header import DTYPES, TensorRef
from tiercache.store.layout import Part, UnitPlan
from tiercache.store.manifest import plain_unit
from tiercache.store.reader import Buffer, Reader, aligned_buffer

_CHUNK_WEIGHTS = 1 << 20  # encoded at once: bounds the fp32 copies

ReadTensor = Callable[[str], torch.Tensor]
"""Reads a parameter of the checkpoint, by its name."""


def load(reader: Reader, ref: TensorRef) -> torch.Tensor:
    """A tensor of the checkpoint, in fresh memory."""
    unit, weight = plain_unit(0, "", ref)
    slot = aligned_buffer(unit.slot_bytes)
    reader.read(unit.pieces, slot).wait()
    return weight.view(torch.from_numpy(slot))


def rounded_chunks(unit: UnitPlan, read: ReadTensor, group: int) -> Iterator[dict[str, Buffer]]:
    """The unit's bytes for each file, each weight rounded by itself; then the factors of a down matrix's outputs."""
    if unit.dense:
        (part,), (name,) = unit.parts, unit.sizes
        yield {name: read(part.parameter).flatten().view(torch.uint8).numpy()}
        return
    matrices = _matrices(unit, read)
    for some in _slices(unit):
        made = []
        for part, rows, factors in matrices:
            with _named(part):
                made.append(encode(hadamard.stored(rows[some], factors), group, first_row=part.first + some.start))
        yield _side_by_side(made)
    if (factors := matrices[-1][2]) is not None:
        yield _factors(factors)


def calibrated(unit: UnitPlan, read: ReadTensor, group: int, moments: LayerMoments) -> list[CodedPiece]:
    """The unit's parts with codes that GPTQ chose; `moments` are of the modules' inputs."""
    found = []
    for place, (part, rows, factors) in enumerate(_matrices(unit, read)):
        module = next(member.module for member in unit.members if place in member.own)
        with _named(part):
            if factors is None:
                inputs = moments.of(module, group)
                planes, factors = gptq.quantize_rows(rows, inputs, group), inputs.factors
            else:
                planes = gptq.quantize_columns(rows, moments.of(module, None), group, factors)
        found.append(CodedPiece(part.parameter, part.first, part.transposed, planes, factors))
    return found


def coded_chunks(unit: UnitPlan, parts: list[CodedPiece]) -> Iterator[dict[str, Buffer]]:
    """As `rounded_chunks`, of parts whose codes are chosen; factors of the unit's inputs, if any, lie before down's."""
    whole = [part.planes for part in parts]
    for some in _slices(unit):
        yield _side_by_side(
            [replace(one, planes=tuple(p[some] for p in one.planes), scales=one.scales[some]) for one in whole]
        )
    if unit.scaled:
        yield _factors(parts[0].factors)
    if len(parts) > 1:
        yield _factors(parts[-1].factors)


def _matrices(unit: UnitPlan, read: ReadTensor) -> list[tuple[Part, torch.Tensor, torch.Tensor | None]]:
    """The unit's parts, their rows as they will lie, and the factors of a down matrix's columns."""
    tensors = {name: read(name) for name in dict.fromkeys(part.parameter for part in unit.parts)}
    found = []
    for place, part in enumerate(unit.parts):
        whole = tensors[part.parameter].T if part.transposed else tensors[part.parameter]
        rows = whole[part.first : part.first + unit.rows]
        is_down = 0 < place == len(unit.parts) - 1
        found.append((part, rows, _output_factors(rows) if is_down else None))
    return found


def _slices(unit: UnitPlan) -> Iterator[slice]:
    """Rows that are encoded together."""
    step = max(1, _CHUNK_WEIGHTS // (unit.columns * len(unit.parts)))
    for low in range(0, unit.rows, step):
        yield slice(low, min(unit.rows, low + step))


@contextmanager
def _named(part: Part) -> Iterator[None]:
    """Within, errors name the parameter."""
    try:
        yield
    except QuantizationError as error:
        turned = " (transposed)" if part.transposed else ""
        raise QuantizationError(f"{part.parameter}{turned}: {error}") from error


def _output_factors(stored: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each column, fp32; 1 where it is zero, so that nothing is divided by it.

    What is not finite is left to the encoder, which says where it stands.
    """
    largest = stored.abs().amax(dim=0).float()
    return largest.where((largest > 0) & largest.isfinite(), 1.0)


def _side_by_side(parts: list[Planes]) -> dict[str, Buffer]:
    """Planes and scales of equal numbers of rows, interleaved row by row."""
    files: dict[str, Buffer] = {}
    for plane, name in enumerate(PLANE_FILES):
        files[name] = _flat(torch.stack([one.planes[plane] for one in parts], dim=1))
    files[SCALE_FILE] = _flat(torch.stack([one.scales for one in parts], dim=1).view(torch.uint8))
    return files


def _factors(factors: torch.Tensor | None) -> dict[str, Buffer]:
    assert factors is not None
    return {SCALE_FILE: _flat(factors.view(torch.uint8))}


def _flat(tensor: torch.Tensor) -> Buffer:
    return np.ascontiguousarray(tensor.numpy()).reshape(-1)


def weight_bytes(unit: UnitPlan, checkpoint: Checkpoint) -> int:
    """Bytes of the checkpoint that the unit is made from."""
    if unit.dense:
        return checkpoint.tensors[unit.parts[0].parameter].nbytes
    itemsize = {name: DTYPES[checkpoint.tensors[name].dtype].itemsize for name in {p.parameter for p in unit.parts}}
    return sum(unit.rows * unit.columns * itemsize[part.parameter] for part in unit.parts)
