"""Finds out what the user named: a checkpoint, a plane store, or a model in memory; opens it without weights.

Answers for the three kinds of source, so that nobody else asks which one it is. Knows nothing of budgets.
"""

import hashlib
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from tiercache.config.cache_folder import made_folder
from tiercache.config.environment import home_folder
from tiercache.config.options import OffloadConfig, of_planes
from tiercache.engine.compute_dtype import DTYPES, compute_dtype, name_of
from tiercache.errors import StoreError, UsageError
from tiercache.model import meta_model
from tiercache.model.binding import weight_of
from tiercache.model.card_attention import Capability
from tiercache.model.embedding import EmbeddingRows, FileRows, TableRows
from tiercache.model.pass_hooks import refuse_closed
from tiercache.progress import note
from tiercache.store.checkpoint import Checkpoint, identity_in_memory, resolve
from tiercache.store.convert import convert
from tiercache.store.folders import scratch
from tiercache.store.format import BLOCK_BYTES, CATALOG_FILE, VERSION
from tiercache.store.manifest import Manifest
from tiercache.store.manifests import check_in_memory, checkpoint_manifest, memory_manifest
from tiercache.store.planestore import DECIDING, PlaneStore
from tiercache.store.reader import Reader, load
from tiercache.tiers.device import on_host
from tiercache.tiers.stack import TierStack

Model = transformers.PreTrainedModel


@dataclass(frozen=True)
class Opened:
    """A model and where its weights are.

    Attributes:
        model: the model to offload; without weights unless it was given in memory.
        meta_model: the same model without weights.
        manifest: its parts.
        memory: bytes of the units, for a model in memory that is run as it is.
        given: the model is the caller's own.
        store: where its planes are, if it is run from planes.
        folder: of the checkpoint or store, where a tokenizer may be.
    """

    model: Model
    meta_model: Model
    manifest: Manifest
    memory: list[torch.Tensor] | None
    given: bool
    store: PlaneStore | None = None
    folder: Path | None = None

    def cut(self, precision: str, *, by_plane: bool, by_rows: bool) -> "Opened":
        """The same model with its matrices cut (see `PlaneStore.manifest`); as it is without a store."""
        if self.store is None:
            return self
        manifest = self.store.manifest(precision, cut=by_plane, by_rows=by_rows, model=self.meta_model)
        return replace(self, manifest=manifest)

    @property
    def row_bytes(self) -> int:
        """A row of the token embedding, in the wider of the file's dtype and the model's; none of the caller's own."""
        weight = self.manifest.embedding[1]
        return 0 if self.given else weight.shape[1] * max(weight.dtype.itemsize, self.model.dtype.itemsize)

    @property
    def table_unit(self) -> int | None:
        """The unit of the token embedding; None for the caller's own, which no tier holds."""
        return None if self.given else self.manifest.embedding[1].unit

    def staging_bytes(self, read_threads: int) -> int:
        """What reading its files takes, so many reads at once; nothing for weights that are in main memory."""
        if self.memory is not None:
            return 0
        pieces = [piece for unit in self.manifest.units for piece in unit.pieces]
        unit = self.manifest.units[self.manifest.embedding[1].unit]
        rows = FileRows.staging_bytes(unit.nbytes // self.manifest.embedding[1].shape[0])
        return Reader.staging_bytes(pieces, read_threads) + rows + BLOCK_BYTES

    def allocates_rest(self, device: torch.device) -> bool:
        """Whether parameters beside the matrices take memory where the model computes; the caller's own lie there."""
        return self.memory is None or not on_host(device)

    def rest(self) -> list[str]:
        """Names of the parameters that are neither multiplied by nor looked up in."""
        if self.manifest.dense:
            return list(self.manifest.dense)
        _, table = meta_model.embedding(self.meta_model)
        multiplied = {matrix.name for matrix in meta_model.matrices(self.meta_model)}
        return [name for name, _ in self.meta_model.named_parameters() if name not in multiplied and name != table]

    def dense(self, reader: Reader, device: torch.device) -> dict[str, torch.Tensor]:
        """The values of those parameters, on `device`, by name."""
        if self.given:  # the caller's own, but frozen: no gradient can be right when weights pass through
            multiplied = {f"{module}.weight" for module in (*self.manifest.weights, self.manifest.embedding[0])}
            named = self.model.named_parameters(remove_duplicate=False)
            return {name: parameter.data.to(device) for name, parameter in named if name not in multiplied}
        own = dict(self.meta_model.named_parameters())
        return {name: load(reader, ref).to(device, own[name].dtype) for name, ref in self.manifest.dense.items()}

    def table(self, stack: ExitStack, tiers: TierStack, device: torch.device) -> torch.Tensor | EmbeddingRows:
        """Where token embeddings are looked up: a tier, the caller's own table, or the file, which `stack` closes."""
        module, weight = self.manifest.embedding
        if self.given:
            table = weight_of(self.model.get_submodule(module)).data
            return table if on_host(device) else TableRows(table)
        found = tiers.table(weight)
        if found is None:
            (piece,) = self.manifest.units[weight.unit].pieces
            rows = FileRows(piece, weight.shape, weight.dtype)
            stack.callback(rows.close)
            return rows
        return found if found.device == device and found.dtype == self.model.dtype else TableRows(found)

    def closed(self) -> None:
        """The model is no longer offloaded: the caller's own goes on, another has lost its weights for good."""
        if not self.given:
            self.model.register_forward_pre_hook(refuse_closed)


def open_model(
    model_or_path: Model | str | Path,
    config: OffloadConfig,
    *,
    show_progress: bool | None,
    capability: Capability | None = None,
) -> Opened:
    """Open what was named at the precision that was asked for; converts first if a plane store is needed and missing.

    `capability` is the GPU's; None where the CPU computes.

    Raises:
        UsageError, StoreError, UnsupportedModelError: it cannot be run, or not like this.
    """
    if isinstance(model_or_path, transformers.PreTrainedModel):
        return _open_given(model_or_path, config, show_progress)
    if not isinstance(model_or_path, str | Path):
        raise UsageError(
            f"cannot offload a {type(model_or_path).__name__}; give a transformers model, a folder or a Hub id"
        )
    folder = resolve(model_or_path)
    if (folder / CATALOG_FILE).is_file():
        return _open_store(PlaneStore.open(folder), config, capability, show_progress)
    if folder.is_dir() and any(folder.glob("plane-*.bin")):
        raise StoreError(
            f"{folder} has planes and no {CATALOG_FILE}, which says what lies where; bring that file back, or convert "
            "the checkpoint again"
        )
    source = Checkpoint.open(folder)
    if source.loss:
        note(source.loss, show=show_progress)
    if of_planes(config.precision):
        return _open_store(_store_of(source, config, show_progress), config, capability, show_progress)
    _refuse_checks(config)
    source = source.in_place(show_progress=show_progress)
    source = replace(source, dtype=_computing(source.dtype, config, capability, show_progress))
    model = source.model()
    return Opened(model, model, checkpoint_manifest(source, model), None, False, folder=folder)


def default_store(source: Checkpoint, group: int = 64) -> Path:
    """Where the plane store of a checkpoint is kept when none is named."""
    digest = hashlib.sha256(source.identity().encode() + (source.folder / "config.json").read_bytes()).hexdigest()
    return home_folder() / "stores" / f"{source.folder.name}-{digest[:12]}-g{group}-v{VERSION}"


def _store_of(source: Checkpoint, config: OffloadConfig, show_progress: bool | None) -> PlaneStore:
    """The checkpoint's store, made now if it is not there; one of another checkpoint is refused."""
    folder = config.store or default_store(source)
    if not (folder / CATALOG_FILE).is_file():
        if config.store is None:
            made_folder(folder.parent)
        note(
            f"{config.precision} is read from a plane store, which is made first, at {folder}; interrupted, the same "
            "command goes on",
            show=show_progress,
        )
        convert(source.folder, folder, show_progress=show_progress)
    store = PlaneStore.open(folder)
    if store.contents.meta["identity"] != source.identity():
        raise StoreError(f"{folder} is the store of another checkpoint than {source.folder}; name another store")
    for name, digest in store.contents.meta["files"].items():
        file = source.folder / name
        if name in DECIDING and not (file.is_file() and hashlib.sha256(file.read_bytes()).hexdigest() == digest):
            raise StoreError(f"{file} has changed since {folder} was made; name another store, or remove that one")
    return store


def _computing(
    stored: torch.dtype, config: OffloadConfig, capability: Capability | None, show_progress: bool | None
) -> torch.dtype:
    """The dtype that a model computes in; says where that loses what the checkpoint has."""
    found = compute_dtype(config.compute_dtype, stored, capability)
    if config.compute_dtype == "auto" and capability is not None and found not in (stored, torch.float32):
        note(
            f"a card of capability {capability[0]}.{capability[1]} has no {name_of(stored)} at full speed; this model "
            f"is computed in {name_of(found)}, and where numbers leave its range, take compute_dtype='fp32'",
            show=show_progress,
        )
    return found


def _open_store(
    store: PlaneStore, config: OffloadConfig, capability: Capability | None, show_progress: bool | None
) -> Opened:
    if not of_planes(config.precision):
        raise UsageError(
            f"{store.folder} is a plane store, which holds no original weights; ask for precision='int8', 'int4' or "
            "'int3', or name the checkpoint (and the store as store=, --store, for its planes)"
        )
    if config.checks:
        store.verify(show_progress=show_progress)
    store = replace(store, dtype=_computing(store.dtype, config, capability, show_progress))
    model = store.model()
    manifest = store.manifest(config.precision, model=model)
    return Opened(model, model, manifest, None, False, store, store.folder)


def _open_given(model: Model, config: OffloadConfig, show_progress: bool | None) -> Opened:
    check_in_memory(model)
    if config.compute_dtype != "auto" and DTYPES[config.compute_dtype] != model.dtype:
        raise UsageError(
            f"this model in memory is {name_of(model.dtype)}, and compute_dtype={config.compute_dtype!r} would change "
            "it under its owner; cast it first (model.to(torch.float16)), or give its path"
        )
    bare = meta_model.build(model.config, model.dtype)
    if not of_planes(config.precision):
        _refuse_checks(config)
        manifest, slots = memory_manifest(model)
        return Opened(model, bare, manifest, slots, True)
    if config.store is None:
        raise UsageError(
            f"precision={config.precision!r} of a model in memory needs store=FOLDER to keep its planes in"
        )
    if not (config.store / CATALOG_FILE).is_file():
        config.store.parent.mkdir(parents=True, exist_ok=True)
        with scratch(config.store.parent) as folder:
            model.save_pretrained(folder)
            convert(folder, config.store, show_progress=show_progress)
    store = PlaneStore.open(config.store)
    if store.contents.meta["identity"] != identity_in_memory(model):
        raise StoreError(f"{config.store} is the store of another model than the one in memory; name another store")
    if config.checks:
        store.verify(show_progress=show_progress)
    return Opened(model, bare, store.manifest(config.precision, model=bare), None, True, store)


def _refuse_checks(config: OffloadConfig) -> None:
    """Options that need a plane store, at source precision."""
    if config.checks:
        raise UsageError(
            "checks=True needs checksums, which original weights have none of; convert, and name the store"
        )
    if config.store is not None:
        raise UsageError("store= is for precision 'int8', 'int4' or 'int3'; at 'source' the original weights are read")
