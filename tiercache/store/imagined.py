"""The plane store that a model's configuration would have, without a file of it: for plans made before a download.

Units, offsets and bytes are those that a conversion would write uncompressed, by the same `layout`.
"""

from pathlib import Path

import torch
import transformers

from tiercache.model import meta_model
from tiercache.quant.planes import PLANE_BITS
from tiercache.store import layout
from tiercache.store.catalog import Contents, Extent, UnitRecord
from tiercache.store.checkpoint import Checkpoint
from tiercache.store.format import FILES, VERSION, align
from tiercache.store.header import TensorRef
from tiercache.store.planestore import PlaneStore
from tiercache.store.writer import record_of

_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
_NOWHERE = Path("nowhere")


def imagined_checkpoint(config: transformers.PretrainedConfig, dtype: torch.dtype) -> Checkpoint:
    """A checkpoint that says what tensors it has, and has no files."""
    model = meta_model.build(config, dtype)
    refs, end = {}, 0
    for name, parameter in model.named_parameters():
        refs[name] = TensorRef(_NOWHERE, end, parameter.nbytes, _DTYPES[dtype], tuple(parameter.shape))
        end += parameter.nbytes
    return Checkpoint(_NOWHERE, config, dtype, refs)


def imagined_store(config: transformers.PretrainedConfig, dtype: torch.dtype, *, group: int = 64) -> PlaneStore:
    """The store of such a checkpoint, calibrated and uncompressed."""
    checkpoint = imagined_checkpoint(config, dtype)
    ends = dict.fromkeys(FILES, 0)
    records: list[UnitRecord] = []
    for unit in layout.plan(checkpoint, group, scaled=True):
        extents = {name: Extent(ends[name], nbytes, "") for name, nbytes in unit.sizes.items()}
        ends |= {name: align(ends[name] + nbytes) for name, nbytes in unit.sizes.items()}
        records.append(record_of(unit, checkpoint.tensors, extents))
    meta = {"version": VERSION, "group": group, "plane_bits": list(PLANE_BITS), "files": {}, "units": len(records)}
    return PlaneStore(_NOWHERE, config, dtype, Contents(meta, tuple(records)))
