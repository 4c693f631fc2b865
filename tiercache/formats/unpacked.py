"""Writes a packed checkpoint's weights once as a plain safetensors file, which tiers can read in place.

Tensor by tensor, so one of them is in memory. The file appears when it is whole; what was interrupted begins again.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from tiercache.config.sizes import human
from tiercache.errors import EnvironmentUnsupportedError
from tiercache.progress import bar, note
from tiercache.store.folders import clear_io_errors, locked
from tiercache.store.header import DTYPES, TensorRef, read_file
from tiercache.store.reader import Reader, StoredTensor, load

WEIGHTS_FILE = "model.safetensors"
_PARTIAL = "model.safetensors.partial"
_ALIGNMENT = 4096  # of the first tensor, for direct reads


def unpacked(
    folder: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype, *, show_progress: bool | None
) -> dict[str, TensorRef]:
    """Where each tensor lies, in `dtype`, in a safetensors file of `folder`, which is written if it is not there.

    Raises:
        EnvironmentUnsupportedError: the disk lacks the room.
        StoreError: what is packed is damaged.
    """
    file = folder / WEIGHTS_FILE
    with clear_io_errors(folder), locked(folder, None):  # another process may be at it: wait
        if not file.is_file():
            _write(file, tensors, dtype, show_progress)
    return read_file(file)


def _write(file: Path, tensors: Mapping[str, StoredTensor], dtype: torch.dtype, show: bool | None) -> None:
    name = next(name for name, known in DTYPES.items() if known == dtype)
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        nbytes = dtype.itemsize * torch.Size(tensor.shape).numel()
        header[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    _check_space(file, 8 + len(text) + end)
    note(f"unpacking the weights once, {human(end)} of {name}, into {file}", show=show)
    partial = file.with_name(_PARTIAL)
    try:
        with (
            partial.open("wb", buffering=0) as out,
            Reader() as reader,
            bar(f"unpacking {file.parent.name}", end, show=show) as advance,
        ):
            out.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                view = load(reader, tensor).to(dtype).contiguous().view(-1).view(torch.uint8).numpy().data
                advance(view.nbytes)
                while view.nbytes:
                    view = view[out.write(view) :]
            os.fsync(out.fileno())
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)


def _check_space(file: Path, nbytes: int) -> None:
    missing = nbytes - shutil.disk_usage(file.parent).free
    if missing > 0:
        raise EnvironmentUnsupportedError(
            f"the unpacked weights will take {human(nbytes)} in {file.parent}, its disk lacks {human(missing)} "
            f"({missing} bytes); free some space, set TIERCACHE_HOME to a folder on another disk, or ask for precision "
            "'int8', 'int4' or 'int3', which need no unpacking"
        )
