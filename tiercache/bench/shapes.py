"""Well-known model shapes, and checkpoints and stores of them with random weights, written at the disk's speed.

Weights repeat one seeded block of numbers: enough to be right about bytes and arithmetic, cheap to make.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from tiercache.errors import UsageError
from tiercache.model import meta_model
from tiercache.progress import bar
from tiercache.quant.planes import PLANE_BITS, num_groups
from tiercache.store import catalog, layout
from tiercache.store.format import CATALOG_FILE, SCALE_FILE, VERSION
from tiercache.store.imagined import imagined_checkpoint
from tiercache.store.layout import UnitPlan
from tiercache.store.reader import Buffer
from tiercache.store.writer import Writer

_POOL_WEIGHTS = 1 << 24
_STEP_ROWS = 4096
GROUP = 64
LEVELS = 196  # of int8: 12 * 15 + 15 is the largest code


@dataclass(frozen=True)
class Shape:
    """A Llama-like model's dimensions."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int = 32000

    def config(self) -> transformers.LlamaConfig:
        """As transformers wants it."""
        return transformers.LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=4096,
            dtype=torch.bfloat16,
        )


SHAPES = {
    "tiny": Shape(256, 704, 4, 4, 2, 2048),
    "llama-2-70b-4-layers": Shape(8192, 28672, 4, 64, 8),
    "tinyllama-1.1b": Shape(2048, 5632, 22, 32, 4),
    "llama-2-7b": Shape(4096, 11008, 32, 32, 32),
    "llama-2-13b": Shape(5120, 13824, 40, 40, 40),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-2-70b": Shape(8192, 28672, 80, 64, 8),
}


def find(name: str) -> Shape:
    """The shape called `name`.

    Raises:
        UsageError: there is none.
    """
    if name not in SHAPES:
        raise UsageError(f"unknown shape {name!r}; choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def make_checkpoint(shape: Shape, folder: Path, seed: int, *, show_progress: bool | None = None) -> Path:
    """A bf16 safetensors checkpoint of `shape` in `folder`, one shard a layer; an equal one that is there is kept."""
    stamp = {"shape": shape.__dict__, "seed": seed, "kind": "checkpoint"}
    if _is_there(folder, stamp):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    model = meta_model.build(shape.config(), torch.bfloat16)
    shards: dict[int, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        layer = meta_model.layer_of(name)
        shards.setdefault(0 if layer is None else layer + 1, {})[name] = parameter.shape
    pool = torch.from_numpy(np.random.default_rng(seed).standard_normal(_POOL_WEIGHTS, np.float32) * 0.02).bfloat16()
    weight_map: dict[str, str] = {}
    with bar(f"writing {folder.name}", 2 * model.num_parameters(), show=show_progress) as advance:
        for index, shapes in sorted(shards.items()):
            file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors"
            tensors = {name: _random(pool, size, place) for place, (name, size) in enumerate(shapes.items())}
            save_file(tensors, folder / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file)
            advance(sum(tensor.nbytes for tensor in tensors.values()))
    index_file = {"metadata": {"total_size": 2 * model.num_parameters()}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file), encoding="utf-8")
    shape.config().save_pretrained(folder)
    _stamp_file(folder).write_text(json.dumps(stamp), encoding="utf-8")
    return folder


def make_store(shape: Shape, folder: Path, seed: int, *, show_progress: bool | None = None) -> Path:
    """A plane store of `shape` with random codes, written without a checkpoint; an equal one that is there is kept."""
    stamp = {"shape": shape.__dict__, "seed": seed, "kind": "store"}
    if _is_there(folder, stamp):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = imagined_checkpoint(shape.config(), torch.bfloat16)
    units = layout.plan(checkpoint, GROUP)
    pool = np.random.default_rng(seed).integers(0, 256, _POOL_WEIGHTS, np.uint8)
    total = sum(sum(unit.sizes.values()) for unit in units)
    with Writer(folder, [], {}) as writer, bar(f"writing {folder.name}", total, show=show_progress) as advance:
        records = []
        for unit in units:
            records.append(writer.write(unit, checkpoint.tensors, _random_blocks(unit, pool)))
            advance(sum(unit.sizes.values()))
        writer.sync()
    meta = {"version": VERSION, "identity": f"random-{seed}", "model_type": "llama", "dtype": "bfloat16"}
    meta |= {
        "group": GROUP,
        "plane_bits": list(PLANE_BITS),
        "compress": "off",
        "compression": {},
        "files": {},
        "units": len(records),
    }
    catalog.write(folder / CATALOG_FILE, meta, records)
    shape.config().save_pretrained(folder)
    _stamp_file(folder).write_text(json.dumps(stamp), encoding="utf-8")
    return folder


def _random_blocks(unit: UnitPlan, pool: Buffer) -> Iterator[dict[str, Buffer]]:
    """Random codes; scales that put the weights into +-0.06; small numbers for what is dense; factors of 1."""
    if unit.dense:
        (name,) = unit.sizes
        ones = torch.full((unit.sizes[name] // 2,), 0.02, dtype=torch.bfloat16)
        yield {name: ones.view(torch.uint8).numpy()}
        return
    pairs = len(unit.parts) * num_groups(unit.columns, GROUP)
    lo_and_step = np.array([-0.0625, 0.125 / LEVELS], np.float16)
    for low in range(0, unit.rows, _STEP_ROWS):
        rows = min(_STEP_ROWS, unit.rows - low)
        planes = {name: nbytes // unit.rows for name, nbytes in unit.sizes.items() if name != SCALE_FILE}
        block = {name: np.resize(np.roll(pool, low), rows * width) for name, width in planes.items()}
        block[SCALE_FILE] = np.tile(lo_and_step, rows * pairs).view(np.uint8)
        yield block
    if len(unit.parts) > 1:  # a feed-forward block's factors follow its scales
        yield {SCALE_FILE: np.ones(unit.columns, np.float32).view(np.uint8)}


def _random(pool: torch.Tensor, size: torch.Size, place: int) -> torch.Tensor:
    """A tensor filled from the pool, from another place for each; norms are ones."""
    count = size.numel()
    if len(size) == 1:
        return torch.ones(size, dtype=pool.dtype)
    start = -place * 1_000_003 % pool.numel()
    repeats = -(-(start + count) // pool.numel())
    return (pool if repeats == 1 else pool.repeat(repeats))[start : start + count].reshape(size).clone()


def _stamp_file(folder: Path) -> Path:
    return folder / "bench.json"


def _is_there(folder: Path, stamp: dict[str, object]) -> bool:
    file = _stamp_file(folder)
    return file.is_file() and json.loads(file.read_text(encoding="utf-8")) == stamp
