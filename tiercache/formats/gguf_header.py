"""What the header of a GGUF file says: its metadata, and where each tensor lies. Reads no weights.

The gguf package reads headers too, but it trusts the file: a count that is wrong makes it take all memory. It also
makes an array of every word of the vocabulary, which takes many seconds. The layout is that of
github.com/ggml-org/ggml/blob/master/docs/gguf.md: key-value pairs, then one entry for each tensor, then their bytes.
"""

import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import gguf

from tiercache.errors import StoreError, UnsupportedModelError, permissions_named
from tiercache.store.header import TensorRef

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_MAX_STRING, _MAX_ELEMENTS, _MAX_TENSORS, _MAX_DIMENSIONS = 16 << 20, 4 << 20, 1 << 20, 4
_KEPT = 4096  # elements of an array of numbers; of a longer one only the count is kept
_MAX_ALIGNMENT = 1 << 20  # writers choose 32, or a page; what lies before the tensors is hashed, padding too
# Words that end a turn or a text in the vocabularies of the architectures that are read, as llama.cpp has them too.
_END_WORDS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>")
_SHARD = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class Words:
    """What is kept of an array of strings.

    Attributes:
        count: how many there are.
        ends: where those stand that end a turn or a text in a vocabulary.
    """

    count: int
    ends: tuple[int, ...]


@dataclass(frozen=True)
class GgufHeader:
    """One GGUF file, or one that was split into several.

    Attributes:
        files: in the order of their numbers.
        metadata: of the first one; an array of strings as Words, a long one of numbers as its length.
        tensors: by GGUF's names; `dtype` is the name of their encoding, such as "Q4_K", and the shape is torch's.
        starts: where the tensors' bytes begin in each file.
    """

    files: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, TensorRef]
    starts: tuple[int, ...]

    @classmethod
    def read(cls, path: Path) -> "GgufHeader":
        """Read the headers of a file and of those that it was split into; `path` may be any of these.

        Raises:
            StoreError: damaged, cut short, or a part is missing.
            UnsupportedModelError: of a version or byte order that nobody writes any more.
        """
        files = shards(path)
        for file in files:
            if not file.is_file():
                raise StoreError(f"{file} is missing, one of the {len(files)} parts of {path.name}; download it again")
        read = [_read(file) for file in files]
        tensors: dict[str, TensorRef] = {}
        for file, (_, some, _) in zip(files, read, strict=True):
            if again := tensors.keys() & some.keys():
                raise StoreError(f"{file}: the tensor {min(again)!r} lies in another part too; download it again")
            tensors |= some
        metadata = read[0][0]
        promised = metadata.get("split.tensors.count", len(tensors))
        if metadata.get("split.count", 1) not in (0, 1, len(files)) or promised != len(tensors):
            raise StoreError(
                f"{files[0]} is one of {metadata.get('split.count')} parts with {promised} tensors; {len(files)} with "
                f"{len(tensors)} are here: download the others beside it, under their own names"
            )
        return cls(files, metadata, tensors, tuple(start for *_, start in read))


def shards(path: Path) -> tuple[Path, ...]:
    """The files that the one at `path` belongs to, by its name: itself, or NAME-00001-of-0000N.gguf and so on."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match[3])
    return tuple(path.with_name(f"{match[1]}-{number:05}-of-{match[3]}.gguf") for number in range(1, count + 1))


def title(path: Path) -> str:
    """A file's name without what GGUF adds to it."""
    match = _SHARD.fullmatch(path.name)
    return match[1] if match is not None else path.stem


class _Cursor:
    """Reads a header's fields one after another, never past the end of the file."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.size, self.at = path, size, 0
        self._file = file
        self._elements = 0

    def refuse(self, why: str) -> StoreError:
        return StoreError(f"{self.path} is damaged at byte {self.at}: {why}; download it again")

    def take(self, count: int) -> bytes:
        if count > min(self.size - self.at, _MAX_STRING):
            raise self.refuse(f"{count} bytes should follow, the file has {self.size}")
        self.at += count
        data = self._file.read(count)
        if len(data) < count:
            raise self.refuse("it was cut short meanwhile")
        return data

    def skip(self, count: int) -> None:
        if count > self.size - self.at:
            raise self.refuse(f"{count} bytes should follow, the file has {self.size}")
        self.at += count
        self._file.seek(self.at)

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        try:
            return self.take(self.number("<Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.refuse("a name is no UTF-8") from error

    def value(self) -> Any:
        kind = self.number("<I")
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.refuse(f"there is no kind of value {kind}")
        of, count = self.number("<I"), self.number("<Q")
        self._elements += count
        if self._elements > _MAX_ELEMENTS or (of != _STRING and of not in _SCALARS):
            raise self.refuse(f"an array of {count} values of kind {of} is no model's")
        if of == _STRING:
            return Words(count, tuple(place for place in range(count) if self.text() in _END_WORDS))
        if count > _KEPT:
            self.skip(count * struct.calcsize(_SCALARS[of]))
            return count
        return [self.number(_SCALARS[of]) for _ in range(count)]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, TensorRef], int]:
    """Metadata, tensors, and where the tensors' bytes begin."""
    with permissions_named(path), path.open("rb") as file:
        cursor = _Cursor(path, file, os.fstat(file.fileno()).st_size)
        if cursor.size < 24 or cursor.take(4) != _MAGIC:
            raise StoreError(f"{path} is no GGUF file; check what was downloaded")
        version = cursor.number("<I")
        if version not in _VERSIONS:
            raise UnsupportedModelError(
                f"{path} has GGUF version {version}, or bytes in another order; name a file of version 2 or 3"
            )
        tensor_count, pair_count = cursor.number("<Q"), cursor.number("<Q")
        if max(tensor_count, pair_count) > _MAX_TENSORS:
            raise cursor.refuse(f"{tensor_count} tensors and {pair_count} settings are no model's")
        metadata: dict[str, Any] = {}
        for _ in range(pair_count):
            key = cursor.text()
            if key in metadata:
                raise cursor.refuse(f"{key!r} is set twice")
            metadata[key] = cursor.value()
        entries = [_entry(cursor) for _ in range(tensor_count)]
        return metadata, *_placed(cursor, metadata, entries)


def _entry(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """A tensor's name, shape in torch's order, kind of encoding, and offset behind the header."""
    name, count = cursor.text(), cursor.number("<I")
    if not 0 < count <= _MAX_DIMENSIONS:
        raise cursor.refuse(f"{name!r} has {count} dimensions")
    shape = tuple(cursor.number("<Q") for _ in range(count))
    return name, shape[::-1], cursor.number("<I"), cursor.number("<Q")


def _placed(
    cursor: _Cursor, metadata: dict[str, Any], entries: list[tuple[str, tuple[int, ...], int, int]]
) -> tuple[dict[str, TensorRef], int]:
    alignment = metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.refuse(f"an alignment of {alignment!r} bytes cannot be meant")
    start = -(-cursor.at // alignment) * alignment
    found: dict[str, TensorRef] = {}
    for name, shape, kind, offset in entries:
        if name in found:
            raise cursor.refuse(f"the tensor {name!r} is there twice")
        if kind not in gguf.GGMLQuantizationType._value2member_map_:
            raise UnsupportedModelError(
                f"{cursor.path}: {name!r} has encoding {kind}, which gguf does not know; update the gguf package, or "
                "name a file of Q8_0, Q4_K_M or the like"
            )
        encoding = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[encoding]
        if shape[-1] % block:
            raise cursor.refuse(f"{name!r} has rows of {shape[-1]} weights, {encoding.name} has blocks of {block}")
        nbytes = math.prod(shape) // block * block_bytes
        if start + offset + nbytes > cursor.size or not nbytes:
            raise cursor.refuse(f"{name!r} should end at byte {start + offset + nbytes}, the file has {cursor.size}")
        found[name] = TensorRef(cursor.path, start + offset, nbytes, encoding.name, shape)
    return found, start
