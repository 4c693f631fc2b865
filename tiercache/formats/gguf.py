"""A GGUF file as a checkpoint: tensors dequantised one by one, tokenizer and chat template through transformers.

It runs in bf16, into which the blocks' fp32 values are rounded: as wide in range as the models that such files are made
of, and with an error (2^-9 of a weight) that is small beside the loss of the quantising. A file of F32 alone stays so.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from tiercache.compat import gguf_names
from tiercache.errors import StoreError, UnsupportedModelError
from tiercache.formats.gguf_config import ROPE_FACTORS, architecture, end_tokens, read_config
from tiercache.formats.gguf_header import GgufHeader, title
from tiercache.formats.packed import PackedSource
from tiercache.progress import note
from tiercache.store import identity
from tiercache.store.format import FileRange
from tiercache.store.header import DTYPES, TensorRef
from tiercache.store.reader import PackedTensor, Reader, StoredTensor, load_bytes

_CHUNK_WEIGHTS = 1 << 21  # dequantised at once: bounds the fp32 copies
_HASHED_BYTES = 1 << 20  # of a header at once
_SAME_BITS = {2: torch.int16, 4: torch.int32}
_PLAIN = ("F32", "BF16")  # encodings that lose nothing in bf16 or fp32
_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Array = np.ndarray[Any, Any]


class GgufSource(PackedSource):
    """A GGUF file, or one that was split."""

    def __init__(self, path: Path) -> None:
        self.header = GgufHeader.read(path)
        self.place, self.title = self.header.files[0], title(path)

    @cached_property
    def digest(self) -> str:
        found = hashlib.sha256(identity.of_files(self.header.tensors).encode())
        for file, start in zip(self.header.files, self.header.starts, strict=True):
            with file.open("rb") as opened:
                while piece := opened.read(min(_HASHED_BYTES, start - opened.tell())):
                    found.update(piece)
        return found.hexdigest()

    def describe(self, folder: Path) -> None:
        config = read_config(self.header)
        only_fp32 = all(ref.dtype == "F32" for ref in self.header.tensors.values())
        config.dtype = torch.float32 if only_fp32 else torch.bfloat16
        config.save_pretrained(folder)
        named = {f"{name}_token_id": getattr(config, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        known = {name: token for name, token in named.items() if token in range(config.vocab_size)}
        if ends := end_tokens(self.header, config):
            known["eos_token_id"] = ends
        transformers.GenerationConfig(**known).save_pretrained(folder)

    def describe_tokenizer(self, folder: Path, kept_in: Path) -> None:
        try:
            kind = transformers.PreTrainedTokenizerFast
            tokenizer = kind.from_pretrained(self.place.parent, gguf_file=self.place.name)
        except Exception as error:  # of a kind that transformers cannot rebuild, or none at all
            reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            note(
                f"{self.place.name} holds no tokenizer that transformers can read here ({reason}); put the original "
                f"checkpoint's tokenizer files into {kept_in}, or install what is missing there "
                "(pip install sentencepiece tiktoken protobuf) and name the file again"
            )
            return
        tokenizer.save_pretrained(folder)

    def tensors(self, model: transformers.PreTrainedModel) -> dict[str, StoredTensor]:
        names, undo = gguf_names(model, architecture(self.header))
        found: dict[str, StoredTensor] = {}
        for name, ref in self.header.tensors.items():
            if name == ROPE_FACTORS:  # read as part of the configuration
                continue
            if name not in names:
                raise UnsupportedModelError(
                    f"{ref.path} holds {name!r}, which {model.config.model_type} of transformers has no place for; "
                    "name the original checkpoint instead"
                )
            _check_encoding(name, ref)
            found[names[name]] = GgufTensor(_NAMES[model.dtype], ref.shape, ref, name, undo)
        return found


@dataclass(frozen=True)
class GgufTensor(PackedTensor):
    """One tensor of a GGUF file.

    Attributes:
        stored: its blocks, row by row.
        name: GGUF's.
        undo: takes that name and the values, and takes back what llama.cpp's converter has done to them. Matrices it
            only rearranges; of norms it also changes values.
    """

    stored: TensorRef
    name: str
    undo: Callable[[str, Array], Array]

    @property
    def encoding(self) -> str:
        """Such as "Q4_K"; empty where nothing was lost."""
        return "" if self.stored.dtype in _PLAIN or len(self.shape) == 1 else self.stored.dtype

    def parts(self) -> dict[str, TensorRef]:
        return {"": self.stored}

    def load(self, reader: Reader) -> torch.Tensor:
        dtype = DTYPES[self.dtype]
        rows = math.prod(self.shape[:-1])
        if rows == 1:
            values = self.undo(self.name, self._rows(reader, 0, 1).reshape(self.shape))
            return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
        made = torch.empty(self.shape, dtype=dtype)
        step = max(1, _CHUNK_WEIGHTS // self.shape[-1])
        for low in range(0, rows, step):
            high = min(rows, low + step)
            made[low:high] = torch.from_numpy(self._rows(reader, low, high))
        bits = made.view(_SAME_BITS[dtype.itemsize]).numpy()  # numpy has no bf16
        return torch.from_numpy(np.ascontiguousarray(self.undo(self.name, bits))).view(dtype)

    def _rows(self, reader: Reader, low: int, high: int) -> Array:
        """Rows of the stored matrix, fp32."""
        each = self.stored.nbytes // math.prod(self.shape[:-1])
        data = load_bytes(reader, FileRange(self.stored.path, self.stored.offset + low * each, (high - low) * each))
        with np.errstate(all="ignore"):  # what is not finite is found where it matters
            values: Array = gguf.dequantize(
                data.reshape(high - low, each), gguf.GGMLQuantizationType[self.stored.dtype]
            )
        return values


def _check_encoding(name: str, ref: TensorRef) -> None:
    """Refuse encodings that the gguf package cannot decode, and tensors that are no vectors or matrices."""
    encoding = gguf.GGMLQuantizationType[ref.dtype]
    if len(ref.shape) > 2:
        raise StoreError(f"{ref.path}: {name!r} has {len(ref.shape)} dimensions; download it again")
    _, block_bytes = gguf.GGML_QUANT_SIZES[encoding]
    try:
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), encoding)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"{ref.path}: {name!r} has encoding {ref.dtype}, which the gguf package does not decode; name a file of "
            "Q8_0, Q4_K_M or the like"
        ) from error
