"""Where each tensor of a safetensors checkpoint lies in its files; reads headers, never data.

The safetensors library hands out tensors but not their offsets, which direct reads need; the format's own
description (8-byte little-endian length, JSON, one contiguous buffer) is all that is relied on here.
Names the small files beside them, too.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from tiercache.errors import StoreError, permissions_named

DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""What weights may be computed in."""

INTEGERS: dict[str, torch.dtype] = {"I8": torch.int8, "I32": torch.int32, "I64": torch.int64}
"""What packed weights are stored in (`tiercache.formats`)."""

_SMALL = ("*.json", "*.jinja", "*.model", "*.txt")
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


@dataclass(frozen=True)
class TensorRef:
    """One tensor as it lies in a file; `dtype` is the header's name for it, such as "BF16"."""

    path: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


def read_checkpoint(folder: Path) -> dict[str, TensorRef]:
    """Every tensor of a single or sharded checkpoint, by its name in the files; raises StoreError for a damaged one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return _read_sharded(folder, index)
    single = folder / "model.safetensors"
    if single.is_file():
        return read_file(single)
    raise StoreError(
        f"{folder} holds no model.safetensors and no model.safetensors.index.json; "
        "save the model with save_pretrained(...), which writes safetensors"
    )


def small_files(folder: Path) -> list[Path]:
    """What a checkpoint's folder holds besides weights, by name: configuration, tokenizer, chat template."""
    found = {path for pattern in _SMALL for path in folder.glob(pattern)}
    return sorted(path for path in found if not path.name.endswith(".safetensors.index.json"))


def _read_sharded(folder: Path, index: Path) -> dict[str, TensorRef]:
    with permissions_named(index):
        text = index.read_bytes()
    try:
        weight_map = dict(json.loads(text)["weight_map"])
        if not weight_map or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise ValueError("no map of names to files")
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{index} is no index of a sharded checkpoint ({error!r}); download it again") from error
    found: dict[str, TensorRef] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise StoreError(f"{folder} lacks the shard {shard} that its index names; download it again")
        found |= read_file(folder / shard)
    if missing := sorted(set(weight_map) - set(found)):
        raise StoreError(
            f"{folder}: the index names {len(missing)} tensors that no shard holds, first {missing[0]!r}; "
            "download the checkpoint again"
        )
    return found


def read_file(path: Path) -> dict[str, TensorRef]:
    """Every tensor of one safetensors file; checks that the header describes exactly the bytes that are there."""
    size = path.stat().st_size
    with permissions_named(path), path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise StoreError(f"{path} is no safetensors file or is cut short: {size} bytes; download it again")
        try:
            header = dict(json.loads(file.read(length)))
        except (ValueError, TypeError) as error:
            raise StoreError(f"{path}: its header is no JSON object ({error}); download it again") from error
    header.pop("__metadata__", None)
    base = 8 + length
    found = {name: _tensor(path, base, name, entry) for name, entry in header.items()}
    end = base
    for ref in sorted(found.values(), key=lambda ref: (ref.offset, ref.nbytes)):
        if ref.offset != end:
            raise StoreError(f"{path}: its tensors leave holes or overlap at byte {end}; download it again")
        end += ref.nbytes
    if end != size:
        raise StoreError(f"{path} has {size} bytes, its header describes {end}; download it again")
    return found


def _tensor(path: Path, base: int, name: str, entry: dict[str, object]) -> TensorRef:
    try:
        dtype, shape, offsets = str(entry["dtype"]), entry["shape"], entry["data_offsets"]
        begin, end = (int(offset) for offset in offsets)  # type: ignore[attr-defined]
        dimensions = tuple(int(n) for n in shape)  # type: ignore[attr-defined]
        if min((begin, end - begin, *dimensions)) < 0:
            raise ValueError("below zero")
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path}: the header's entry for {name!r} cannot be read ({error!r})") from error
    known = (DTYPES | INTEGERS).get(dtype)
    if known is not None:
        expected = known.itemsize * math.prod(dimensions)
        if end - begin != expected:
            raise StoreError(
                f"{path}: {name!r} should take {expected} bytes, the header gives it {end - begin}; download it again"
            )
    return TensorRef(path, base + begin, end - begin, dtype, dimensions)
