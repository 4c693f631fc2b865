"""Plane stores: every weight at every precision, exact sizes, and each way a disk or a user can go wrong."""

import errno
import fcntl
import hashlib
import json
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiercache
from profiler import probe
from tiercache.errors import (
    EnvironmentUnsupportedError,
    QuantizationError,
    StoreError,
    TiercacheError,
    UsageError,
)
from tiercache.quant import hadamard, planes
from tiercache.store import catalog, journal
from tiercache.store.checkpoint import Checkpoint
from tiercache.store.convert import convert
from tiercache.store.format import BLOCK_BYTES, FILES, PLANE_FILES, SCALE_FILE, VERSION, align
from tiercache.store.manifest import Manifest, PlaneWeight
from tiercache.store.planestore import PlaneStore
from tiercache.store.reader import Reader, aligned_buffer

MakeCheckpoint = Callable[..., Path]
Copy = Callable[..., Path]
NOBODY = 65534

OUTWARD = ("down_proj", "fc2", "dense_4h_to_h", "mlp.c_proj")  # stored transposed: their groups run along neurons


@pytest.fixture
def copy(plane_store: MakeCheckpoint, tmp_path: Path) -> Copy:
    """`copy(name)`: a store that the test may break."""

    def make(name: str = "llama", **options: Any) -> Path:
        return Path(shutil.copytree(plane_store(name, **options), tmp_path / "store"))

    return make


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file below a folder and its SHA-256."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def slots_of(manifest: Manifest) -> dict[int, torch.Tensor]:
    """The slot of every unit, read from the store."""
    slots = {}
    with Reader() as reader:
        for key, unit in enumerate(manifest.units):
            slot = aligned_buffer(unit.slot_bytes)
            reader.read(unit.pieces, slot).wait()
            slots[key] = torch.from_numpy(slot)
    return slots


def as_outputs_by_inputs(name: str, parameter: torch.Tensor) -> torch.Tensor:
    """GPT-2 stores its matrices the other way round."""
    return parameter.T if ".c_" in name else parameter


def expected(module: str, parameter: torch.Tensor, precision: str, group: int) -> torch.Tensor:
    """A parameter as it comes back from the codes: quantised by rows, or along its neurons if it is outward."""
    matrix = as_outputs_by_inputs(module, parameter)
    outward = module.endswith(OUTWARD)
    stored = (matrix.T if outward else matrix).contiguous()
    factors = stored.abs().amax(dim=0).float() if outward else None
    back = torch.empty_like(stored)
    hadamard.restored(planes.encode(hadamard.stored(stored, factors), group).at(precision), factors, back)
    return as_outputs_by_inputs(module, back.T if module.endswith(OUTWARD) else back)


# ---------------------------------------------------------------- what is in it

STORES = [(name, 64, "off") for name in architectures.CONFIGS]
STORES += [(name, group, "on") for name in ("llama", "phi3", "gpt2") for group in (32, 128)]


@pytest.mark.parametrize(("name", "group", "compress"), STORES)
def test_every_weight_at_every_rung(
    plane_store: MakeCheckpoint, checkpoint: MakeCheckpoint, name: str, group: int, compress: str
) -> None:
    store = PlaneStore.open(plane_store(name, group, compress))
    model = Checkpoint.open(checkpoint(name)).model()
    original = dict(_resident(checkpoint(name)).named_parameters(remove_duplicate=False))
    head = next(module for module, child in model.named_modules() if child is model.get_output_embeddings())
    for precision in planes.PRECISIONS:
        manifest = store.manifest(precision)
        slots = slots_of(manifest)
        for module, weight in manifest.weights.items():
            assert isinstance(weight, PlaneWeight)
            parameter = original[f"{module}.weight"].detach()
            found = torch.empty_like(parameter)
            weight.decode_into(slots[weight.unit], found)
            wanted = expected(module, parameter, "int8" if module == head else precision, group)
            assert torch.equal(found, wanted), f"{module} at {precision}"
        module, table = manifest.embedding
        assert torch.equal(table.view(slots[table.unit]), original[f"{module}.weight"])
        _check_complete(manifest, original)


def _resident(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def _check_complete(manifest: Manifest, original: dict[str, torch.nn.Parameter]) -> None:
    """Every parameter is somewhere, and what is not quantised is unchanged."""
    with Reader() as reader:
        for name, ref in manifest.dense.items():
            slot = aligned_buffer(align(ref.nbytes) + BLOCK_BYTES)
            unit = _plain(ref)
            reader.read(unit.pieces, slot).wait()
            plain = slot[unit.pieces[0].at :][: ref.nbytes].tobytes()
            assert plain == original[name].detach().contiguous().view(torch.uint8).numpy().tobytes(), name
    weights = {f"{module}.weight" for module in (*manifest.weights, manifest.embedding[0])}
    held = {id(original[name]) for name in {*manifest.dense, *weights}}
    assert held == {id(parameter) for parameter in original.values()}
    assert sum(unit.slot_bytes % BLOCK_BYTES for unit in manifest.units) == 0


def _plain(ref: Any) -> Any:
    from tiercache.store.manifest import plain_unit

    return plain_unit(0, "", ref)[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_files_lie_as_the_format_says(plane_store: MakeCheckpoint, checkpoint: MakeCheckpoint, name: str) -> None:
    """Read with numpy alone: the feed-forward parts of each neuron side by side, planes in files of their own."""
    folder = plane_store(name)
    original = dict(_resident(checkpoint(name)).named_parameters())
    ffns = [record for record in catalog.read(folder / "catalog.mdb").records if record.name.endswith(" neurons")]
    assert len(ffns) == 3
    for layer, record in enumerate(ffns):
        parts = _ffn_parts(name, original, layer)  # each [neurons, hidden]
        assert (record.rows, record.columns, record.parts) == (*parts[0].shape, len(parts))
        factors = parts[-1].detach().abs().amax(dim=0).float()
        coded = [planes.encode(hadamard.stored(part.detach())) for part in parts[:-1]]
        coded.append(planes.encode(hadamard.stored(parts[-1].detach(), factors)))
        for place, file in enumerate(PLANE_FILES):
            extent = record.extents[file]
            assert extent.offset % BLOCK_BYTES == 0
            stored = np.fromfile(folder / file, np.uint8, extent.nbytes, offset=extent.offset)
            wanted = torch.stack([code.planes[place] for code in coded], dim=1)  # [neurons, parts, bytes]
            assert stored.tobytes() == wanted.numpy().tobytes()
        scales = np.fromfile(
            folder / SCALE_FILE,
            np.float16,
            record.extents[SCALE_FILE].nbytes // 2,
            offset=record.extents[SCALE_FILE].offset,
        )
        pairs = torch.stack([code.scales for code in coded], dim=1).numpy().tobytes()
        assert scales.tobytes() == pairs + factors.numpy().tobytes()


def _ffn_parts(name: str, original: dict[str, torch.nn.Parameter], layer: int) -> list[torch.Tensor]:
    if name == "gpt2":
        block = f"transformer.h.{layer}.mlp"
        return [original[f"{block}.c_fc.weight"].T, original[f"{block}.c_proj.weight"]]
    block = f"model.layers.{layer}.mlp"
    down = original[f"{block}.down_proj.weight"].T
    if name == "phi3":
        return [*original[f"{block}.gate_up_proj.weight"].chunk(2), down]
    return [original[f"{block}.gate_proj.weight"], original[f"{block}.up_proj.weight"], down]


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_a_dry_run_is_exact_and_writes_nothing(
    plane_store: MakeCheckpoint, checkpoint: MakeCheckpoint, tmp_path: Path, name: str
) -> None:
    report = convert(checkpoint(name), tmp_path / "deep" / "store", compress="off", dry_run=True)
    assert not list(tmp_path.iterdir())
    assert report.store_bytes == sum(path.stat().st_size for path in plane_store(name).iterdir())
    assert report.free_bytes > 0
    tensors = load_file(checkpoint(name) / "model.safetensors")
    assert report.source_bytes >= sum(tensor.nbytes for tensor in tensors.values())


def test_a_dry_run_beside_what_may_not_be_read(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))

    (tmp_path / "store.partial").mkdir()
    monkeypatch.setattr(journal, "read", refused)
    with pytest.raises(EnvironmentUnsupportedError, match="Permission denied"):
        convert(checkpoint("llama"), tmp_path / "store", dry_run=True)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_compression_changes_no_byte(plane_store: MakeCheckpoint, name: str) -> None:
    plain, packed = (PlaneStore.open(plane_store(name, compress=compress)) for compress in ("off", "on"))
    assert any(extent.frames for record in packed.contents.records for extent in record.extents.values())
    for precision in planes.PRECISIONS:
        one, other = plain.manifest(precision), packed.manifest(precision)
        assert one.weights == other.weights
        for key, slot in slots_of(one).items():
            assert _payload(one, key, slot) == _payload(other, key, slots_of(other)[key])


def _payload(manifest: Manifest, key: int, slot: torch.Tensor) -> bytes:
    pieces = manifest.units[key].pieces
    return b"".join(slot[piece.at : piece.at + piece.nbytes].numpy().tobytes() for piece in pieces)


@pytest.mark.parametrize(("gbps", "some"), [(1e-6, True), (1e6, False)])
def test_auto_compresses_where_the_disk_is_slow(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gbps: float, some: bool
) -> None:
    monkeypatch.setattr(probe, "folder_read", lambda folder, **_: probe.ReadRoof(gbps, 1, 1, True))
    report = convert(checkpoint("llama"), tmp_path / "store", compress="auto")
    assert report.compression is not None
    assert any(row["used"] for row in report.compression.values()) == some
    assert report.store_bytes == sum(path.stat().st_size for path in (tmp_path / "store").iterdir())
    PlaneStore.open(tmp_path / "store").verify()


def test_frames_are_cut_and_joined_again(
    plane_store: MakeCheckpoint, checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With frames of 4 KB in place of 4 MiB, a tiny model has several to an extent."""
    for module in ("writer", "format"):
        monkeypatch.setattr(f"tiercache.store.{module}.FRAME_BYTES", 4000)
    convert(checkpoint("llama"), tmp_path / "store", compress="on")
    store = PlaneStore.open(tmp_path / "store")
    store.verify()
    assert max(len(extent.frames) for record in store.contents.records for extent in record.extents.values()) == 3
    one, other = store.manifest("int8"), PlaneStore.open(plane_store("llama")).manifest("int8")
    slots = slots_of(one), slots_of(other)
    for key in slots[0]:
        assert _payload(one, key, slots[0][key]) == _payload(other, key, slots[1][key])


def test_a_store_knows_its_model(plane_store: MakeCheckpoint, checkpoint: MakeCheckpoint) -> None:
    store = PlaneStore.open(plane_store("llama"))
    assert store.dtype == torch.float32
    assert store.contents.meta["identity"] == Checkpoint.open(checkpoint("llama")).identity()
    assert type(store.model()).__name__ == "LlamaForCausalLM"
    told = store.describe()
    assert (told["group"], told["version"], told["neurons"]) == (64, VERSION, 3 * 104)
    assert told["pass_bytes"]["int3"] < told["pass_bytes"]["int4"] < told["pass_bytes"]["int8"]
    json.dumps(told)


# ---------------------------------------------------------------- verify


def flip(path: Path, at: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << bit]))


@contextmanager
def flipped(path: Path, at: int, bit: int = 0) -> Iterator[None]:
    flip(path, at, bit)
    yield
    flip(path, at, bit)


def places(folder: Path, file: str, rng: random.Random) -> set[int]:
    """Random places in a file, the ends of its extents, and places in its padding."""
    size = (folder / file).stat().st_size
    found = {0, size - 1, *(rng.randrange(size) for _ in range(12))}
    for record in catalog.read(folder / "catalog.mdb").records[:6]:
        if file in record.extents:
            extent = record.extents[file]
            end = extent.offset + extent.stored_bytes
            found |= {extent.offset, end - 1, min(end, size - 1), rng.randrange(end, align(end) + 1) % size}
    return found


@pytest.mark.parametrize("compress", ["off", "on"])
@pytest.mark.parametrize("file", FILES)
def test_verify_finds_a_flipped_bit_anywhere(copy: Copy, file: str, compress: str) -> None:
    folder = copy(compress=compress)
    rng = random.Random(file)
    checked = PlaneStore.open(folder).verify()
    assert checked.extents > 20
    for at in places(folder, file, rng):
        with (
            flipped(folder / file, at, rng.randrange(8)),
            pytest.raises(StoreError, match=r": 1 of \d+ ") as raised,
        ):
            PlaneStore.open(folder).verify()
        assert file in str(raised.value)
    assert PlaneStore.open(folder).verify() == checked


def test_reading_a_compressed_store_finds_a_flipped_bit_too(copy: Copy) -> None:
    """A frame with a checksum costs four bytes; without one a flipped bit makes other weights, unless verify is run."""
    folder = copy(compress="on")
    manifest = PlaneStore.open(folder).manifest("int8")
    pieces = [piece for unit in manifest.units for piece in unit.pieces if piece.compressed]
    rng = random.Random(2)
    with Reader() as reader:
        slot = aligned_buffer(align(max(piece.at + piece.nbytes for piece in pieces)))
        for piece in rng.sample(pieces, 30):
            at = piece.offset + rng.randrange(12, piece.stored_bytes)
            with flipped(piece.path, at, rng.randrange(8)), pytest.raises(StoreError, match="is corrupt"):
                reader.read([piece], slot).wait()


def test_a_store_without_its_catalogue_is_no_checkpoint(copy: Copy) -> None:
    folder = copy()
    (folder / "catalog.mdb").unlink()
    told = pytest.raises(StoreError, match=r"planes and no catalog.mdb.*convert the checkpoint again")
    with told, tiercache.offload(folder, precision="int8", dram="64MiB"):
        pass


def _open_with(pipe: Connection, folder: Path, changes: list[tuple[int, int]], lengths: list[int]) -> None:
    """In a child, for LMDB maps its file: with a bit flipped, or cut to a length, is the catalogue noticed?"""
    path = folder / "catalog.mdb"
    good, raw = catalog.read(path), path.read_bytes()
    damaged: list[tuple[str, bytes]] = [(f"cut to {length} bytes", raw[:length]) for length in lengths]
    for at, bit in changes:
        bad = bytearray(raw)
        bad[at] ^= 1 << bit
        damaged.append((f"bit {bit} of byte {at} flipped", bytes(bad)))
    for what, content in damaged:
        pipe.send((what, "the process died"))
        path.write_bytes(content)
        try:
            store = PlaneStore.open(folder)
            store.verify()
            outcome = "fine" if store.contents == good else "other records, unnoticed"
        except StoreError:
            outcome = "noticed"
        except Exception as error:
            outcome = repr(error)
        pipe.send((what, outcome))
    pipe.close()


def outcomes(start_child: Callable[..., Any], *arguments: Any) -> dict[str, list[str]]:
    """What became of each damaged catalogue, by outcome."""
    process, pipe = start_child(_open_with, *arguments)
    last: dict[str, str] = {}
    try:
        while True:
            what, outcome = pipe.recv()
            last[what] = outcome
    except EOFError:
        process.join()
    found: dict[str, list[str]] = {}
    for what, outcome in last.items():
        found.setdefault(outcome, []).append(what)
    return found


def test_a_flipped_bit_in_the_catalogue_is_noticed_or_harmless(copy: Copy, start_child: Callable[..., Any]) -> None:
    folder = copy()
    size = (folder / "catalog.mdb").stat().st_size
    rng = random.Random(0)
    changes = [(rng.randrange(size), rng.randrange(8)) for _ in range(100)]
    found = outcomes(start_child, folder, changes, [])
    assert found.keys() <= {"fine", "noticed"}, found
    assert len(found["noticed"]) > 20


def test_a_flipped_bit_in_the_catalogue_s_structure_kills_nobody(copy: Copy, start_child: Callable[..., Any]) -> None:
    """The headers of LMDB's pages: flags, bounds of the free space, the first pointers to nodes."""
    folder = copy()
    size = (folder / "catalog.mdb").stat().st_size
    rng = random.Random(1)
    changes = [(page + rng.randrange(8, 24), rng.randrange(8)) for page in range(0, size, 4096) for _ in range(9)]
    found = outcomes(start_child, folder, changes, [])
    assert found.keys() <= {"fine", "noticed"}, found


@pytest.mark.parametrize("length", [0, 1, 100, 4096])
def test_a_truncated_catalogue_is_noticed(copy: Copy, start_child: Callable[..., Any], length: int) -> None:
    assert outcomes(start_child, copy(), [], [length]).keys() == {"noticed"}


@pytest.mark.parametrize("cut_bytes", [1, 4096, 8192, 16_384, 28_672])
def test_a_catalogue_without_its_end_is_noticed(copy: Copy, start_child: Callable[..., Any], cut_bytes: int) -> None:
    folder = copy()
    size = (folder / "catalog.mdb").stat().st_size
    assert outcomes(start_child, folder, [], [size - cut_bytes]).keys() == {"noticed"}


@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(36_864), b"\xff" * 36_864])
def test_a_catalogue_of_garbage_is_noticed(copy: Copy, content: bytes) -> None:
    folder = copy()
    (folder / "catalog.mdb").write_bytes(content)
    with pytest.raises(StoreError, match=r"catalog\.mdb"):
        PlaneStore.open(folder)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("change_bytes", [-BLOCK_BYTES, -1, 1, None])
def test_a_file_of_another_length_is_noticed_at_once(copy: Copy, file: str, change_bytes: int | None) -> None:
    path = copy() / file
    if change_bytes is None:
        path.unlink()
    else:
        os.truncate(path, path.stat().st_size + change_bytes)
    with pytest.raises(StoreError, match=rf"{file} has \d+ bytes, the catalogue describes \d+"):
        PlaneStore.open(path.parent)


def test_another_model_s_configuration_is_noticed(copy: Copy, checkpoint: MakeCheckpoint) -> None:
    folder = copy()
    shutil.copy(checkpoint("qwen2") / "config.json", folder)
    with pytest.raises(StoreError, match=r"config\.json"):
        PlaneStore.open(folder)


OTHER_CONFIGS = [{"hidden_size": 64}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}]


def _change_config(folder: Path, change: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))


@pytest.mark.parametrize("change", OTHER_CONFIGS)
def test_verify_finds_another_configuration_of_the_same_family(copy: Copy, change: dict[str, Any]) -> None:
    folder = copy()
    _change_config(folder, change)
    with pytest.raises(StoreError, match=r"config\.json"):
        PlaneStore.open(folder).verify()


@pytest.mark.parametrize("change", OTHER_CONFIGS)
def test_opening_finds_another_configuration_of_the_same_family(copy: Copy, change: dict[str, Any]) -> None:
    """Another base of the rotary embedding makes plausible, wrong text: too cheap to check to be left to verify."""
    folder = copy()
    _change_config(folder, change)
    with pytest.raises(StoreError, match=r"config\.json"):
        PlaneStore.open(folder)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_verify_finds_a_changed_file_beside_the_weights(copy: Copy, name: str) -> None:
    folder = copy()
    (folder / name).write_text((folder / name).read_text() + "\n")
    with pytest.raises(StoreError, match=name):
        PlaneStore.open(folder).verify()


@pytest.mark.parametrize("content", [None, "", "{nope"])
def test_a_store_without_a_configuration(copy: Copy, content: str | None) -> None:
    path = copy() / "config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(StoreError, match=r"config\.json"):
        PlaneStore.open(path.parent)


@pytest.mark.parametrize("version", [0, VERSION + 1, None])
def test_another_version_is_named(copy: Copy, version: int | None) -> None:
    folder = copy()
    contents = catalog.read(folder / "catalog.mdb")
    catalog.write(folder / "catalog.mdb", {**contents.meta, "version": version}, list(contents.records))
    with pytest.raises(StoreError, match=f"version {version}, this tiercache reads {VERSION}"):
        PlaneStore.open(folder)


def test_a_folder_that_is_no_store(tmp_path: Path, checkpoint: MakeCheckpoint) -> None:
    for folder in (tmp_path, checkpoint("llama")):
        with pytest.raises(StoreError, match=r"has no catalog\.mdb, so it is no finished plane store"):
            PlaneStore.open(folder)
    with pytest.raises(UsageError, match=r"is no folder.*tiercache convert"):
        PlaneStore.open(tmp_path / "nowhere")


def test_the_catalogue_is_the_same_every_time(plane_store: MakeCheckpoint, tmp_path: Path) -> None:
    contents = catalog.read(plane_store("llama") / "catalog.mdb")
    catalog.write(tmp_path / "catalog.mdb", contents.meta, list(contents.records))
    assert (tmp_path / "catalog.mdb").read_bytes() == (plane_store("llama") / "catalog.mdb").read_bytes()
    assert catalog.read(tmp_path / "catalog.mdb") == contents


# ---------------------------------------------------------------- permissions


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that other users may enter, unlike `tmp_path`."""
    folder = Path(tempfile.mkdtemp(prefix="tiercache-test-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    subprocess.run(["chmod", "-R", "u+w", folder], check=True)
    shutil.rmtree(folder)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")


def _as_nobody(function: Callable[..., Any], *arguments: Any) -> Any:
    """Root may write anywhere; nobody may not."""
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    return function(*arguments)


def _use(folder: Path) -> int:
    with pytest.raises(PermissionError):
        (folder / "new").touch()
    store = PlaneStore.open(folder)
    assert slots_of(store.manifest("int4"))
    return store.verify().extents


def _convert(*arguments: Any, **options: Any) -> int:
    return convert(*arguments, **options).resumed_bytes


def read_only(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    for path in target.iterdir():
        path.chmod(0o444)
    target.chmod(0o555)
    return target


@as_root
def test_a_read_only_store_will_do(
    plane_store: MakeCheckpoint, checkpoint: MakeCheckpoint, public_folder: Path, in_child: Callable[..., Any]
) -> None:
    folder = read_only(plane_store("llama"), public_folder / "store")
    assert in_child(_as_nobody, _use, folder) > 20
    model = read_only(checkpoint("llama"), public_folder / "model")
    before = fingerprint(public_folder)
    assert in_child(_as_nobody, _convert_off, model, folder) == 0  # done already
    assert fingerprint(public_folder) == before


def _convert_off(checkpoint: Path, store: Path) -> int:
    return convert(checkpoint, store, compress="off").resumed_bytes


@as_root
def test_a_target_that_may_not_be_written(
    checkpoint: MakeCheckpoint, public_folder: Path, in_child: Callable[..., Any]
) -> None:
    model = read_only(checkpoint("llama"), public_folder / "model")
    with pytest.raises(EnvironmentUnsupportedError, match=r"cannot write .*Permission denied; name a folder"):
        in_child(_as_nobody, _convert_off, model, public_folder / "deep" / "store")
    assert [path.name for path in public_folder.iterdir()] == ["model"]


@as_root
@pytest.mark.parametrize("name", ["model-00001-of-*.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_checkpoint_that_may_not_be_read(
    checkpoint: MakeCheckpoint, public_folder: Path, in_child: Callable[..., Any], name: str
) -> None:
    model = read_only(checkpoint("llama", shard="60KB"), public_folder / "model")
    (file,) = model.glob(name)
    file.chmod(0o400)
    with pytest.raises(EnvironmentUnsupportedError, match=rf"{file.name}.*[Pp]ermission"):
        in_child(_as_nobody, _convert_off, model, public_folder / "store")


@as_root
@pytest.mark.parametrize("name", ["plane-1.bin", "catalog.mdb", "config.json"])
def test_a_store_that_may_not_be_read(
    plane_store: MakeCheckpoint, public_folder: Path, in_child: Callable[..., Any], name: str
) -> None:
    folder = read_only(plane_store("llama"), public_folder / "store")
    (folder / name).chmod(0o400)
    with pytest.raises(EnvironmentUnsupportedError, match=rf"{name}.*[Pp]ermission"):
        in_child(_as_nobody, _use, folder)


@pytest.mark.parametrize("store", ["file/store", "store"])
def test_a_target_in_the_way_of_a_file(checkpoint: MakeCheckpoint, tmp_path: Path, store: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "store.partial").touch()
    with pytest.raises(UsageError, match=r"file|partial"):
        convert(checkpoint("llama"), tmp_path / store, compress="off")


# ---------------------------------------------------------------- converting twice


def test_the_same_again_does_nothing(copy: Copy, checkpoint: MakeCheckpoint) -> None:
    folder = copy()
    (folder / "journal.mdb").touch()  # what a kill between the rename and its removal leaves
    convert(checkpoint("llama"), folder, compress="off")
    assert not (folder / "journal.mdb").exists()
    before = fingerprint(folder.parent)
    report = convert(checkpoint("llama"), folder, compress="off")
    assert report.store_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert (report.seconds, fingerprint(folder.parent)) == (0, before)


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("llama", {"group": 32}, "group=64, this conversion has group=32"),
        ("llama", {"compress": "on"}, "compress='off'"),
        ("qwen2", {}, "identity="),
    ],
)
@pytest.mark.parametrize("unfinished", [False, True])
def test_another_conversion_into_the_same_folder_is_refused(
    copy: Copy, checkpoint: MakeCheckpoint, name: str, options: dict[str, Any], named: str, unfinished: bool
) -> None:
    folder = copy()
    if unfinished:
        _unfinish(folder)
    before = fingerprint(folder.parent)
    with pytest.raises(StoreError) as refused:
        convert(checkpoint(name), folder, **{"compress": "off", **options})
    assert named in str(refused.value)
    if unfinished:  # the journal was opened
        before.pop("store.partial/journal.mdb")
    after = fingerprint(folder.parent)
    after.pop("store.partial/journal.mdb", None)
    assert after == before


def _unfinish(folder: Path) -> None:
    """Make a finished store what it was two layers before the end."""
    partial = folder.rename(folder.with_name(folder.name + ".partial"))
    contents = catalog.read(partial / "catalog.mdb")
    (partial / "catalog.mdb").unlink()
    with catalog.environment(partial / "journal.mdb", readonly=False) as env:
        catalog.put(env, catalog.meta_values(contents.meta) | catalog.record_values(contents.records[:5]))


def test_an_unfinished_store_is_finished_and_can_be_started_over(
    copy: Copy, plane_store: MakeCheckpoint, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = copy()
    _unfinish(folder)
    assert convert(checkpoint("llama"), folder, compress="off").resumed_bytes > 0
    assert fingerprint(folder) == fingerprint(plane_store("llama"))
    _unfinish(folder)
    report = convert(checkpoint("llama"), folder, group=32, compress="off", restart=True)
    assert report.resumed_bytes == 0
    assert PlaneStore.open(folder).contents.meta["group"] == 32
    _unfinish(folder)
    (folder.with_name("store.partial") / "journal.mdb").write_bytes(bytes(64 << 10))
    options: dict[str, Any] = {"group": 32, "compress": "off"}
    with pytest.raises(StoreError, match="damaged"):
        convert(checkpoint("llama"), folder, dry_run=True, **options)
    assert convert(checkpoint("llama"), folder, restart=True, **options).seconds > 0, "what is damaged is discarded"


def test_a_checkpoint_with_another_configuration_is_another(
    copy: Copy, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    """The same weights with other rotary embeddings: the store would answer with the old ones."""
    folder = copy()
    model = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError):
        convert(model, folder, compress="off")


def test_a_folder_of_something_else_is_left_alone(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is no plane store"):
        convert(checkpoint("llama"), tmp_path, compress="off")
    with pytest.raises(UsageError, match="exists and is no plane store"):
        convert(checkpoint("llama"), tmp_path / "precious.txt", compress="off")
    assert fingerprint(tmp_path).keys() == {"precious.txt"}
    assert not tmp_path.with_name(tmp_path.name + ".partial").exists()


def test_an_empty_folder_is_filled(checkpoint: MakeCheckpoint, plane_store: MakeCheckpoint, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    convert(checkpoint("llama"), tmp_path / "store", compress="off")
    assert fingerprint(tmp_path / "store") == fingerprint(plane_store("llama"))


@pytest.fixture
def running_elsewhere(copy: Copy) -> Iterator[Path]:
    """A store that another conversion is writing."""
    folder = copy()
    _unfinish(folder)
    descriptor = os.open(folder.with_name("store.partial"), os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    yield folder
    os.close(descriptor)


@pytest.mark.parametrize("restart", [False, True])
def test_a_second_conversion_at_once_is_refused(
    running_elsewhere: Path, checkpoint: MakeCheckpoint, restart: bool
) -> None:
    before = fingerprint(running_elsewhere.parent)
    with pytest.raises(UsageError, match="another conversion is writing"):
        convert(checkpoint("llama"), running_elsewhere, compress="off", restart=restart)
    assert convert(checkpoint("llama"), running_elsewhere, compress="off", dry_run=True).resumed_bytes == 0
    assert fingerprint(running_elsewhere.parent) == before


@pytest.mark.parametrize("options", [{"group": 48}, {"group": 0}, {"compress": "zip"}, {"compress": True}])
def test_parameters_that_cannot_be_meant(checkpoint: MakeCheckpoint, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        convert(checkpoint("llama"), tmp_path / "store", **options)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- no space


def test_too_little_space_is_refused_before_anything_is_written(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need = convert(checkpoint("llama"), tmp_path / "store", compress="off", dry_run=True).store_bytes
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=need - 100_000))
    with pytest.raises(EnvironmentUnsupportedError, match=r"its disk lacks .*bytes\); free some space"):
        convert(checkpoint("llama"), tmp_path / "store", compress="off")
    assert not [path for path in tmp_path.rglob("*") if path.name in FILES]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """`small_disk(nbytes)`: a file system of that size; called again it is made larger or smaller."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(nbytes: int) -> Path:
        how = f"size={nbytes}" if not folder.is_mount() else f"remount,size={nbytes}"
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", how, "tmpfs", folder], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f"needs root and tmpfs: {done.stderr.strip()}")
        return folder

    yield resize
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def _lie_about_space(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the disk fills up in the middle, as when somebody else writes to it too."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))


@pytest.mark.parametrize(
    "tenths",
    [
        0.1,
        *(0.5, 2, 4, 8, 9.5, 9.9, 10.2, 10.6),
    ],
)
def test_a_disk_that_fills_up_keeps_what_is_done(
    checkpoint: MakeCheckpoint,
    plane_store: MakeCheckpoint,
    small_disk: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
    tenths: float,
) -> None:
    """Wherever it happens: in the journal, in the planes, in the copied files, in the catalogue."""
    whole = sum(path.stat().st_size for path in plane_store("llama").iterdir())
    store = small_disk(int(whole * tenths / 10)) / "store"
    _lie_about_space(monkeypatch)
    with pytest.raises(EnvironmentUnsupportedError, match="is full; what is done is kept"):
        convert(checkpoint("llama"), store, compress="off")
    assert not store.exists()
    small_disk(2 * whole)
    resumed = convert(checkpoint("llama"), store, compress="off").resumed_bytes
    assert resumed > 0 or tenths < 4
    assert fingerprint(store) == fingerprint(plane_store("llama"))
    assert [path.name for path in store.parent.iterdir()] == ["store"]


def test_measuring_the_disk_needs_no_more_space_than_there_is(
    checkpoint: MakeCheckpoint, small_disk: Callable[[int], Path]
) -> None:
    store = small_disk(8 << 20) / "store"  # the store takes half a MiB
    convert(checkpoint("llama"), store, compress="auto")


# ---------------------------------------------------------------- weights that cannot be quantised


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e6])
def test_weights_that_the_codes_cannot_hold(checkpoint: MakeCheckpoint, tmp_path: Path, value: float) -> None:
    _spoil(checkpoint, tmp_path, "model.layers.1.mlp.up_proj.weight", value)
    with pytest.raises(QuantizationError, match=r"row 100 holds"):
        convert(tmp_path / "model", tmp_path / "store", compress="off")
    assert not (tmp_path / "store").exists()


def test_weights_that_the_codes_cannot_hold_are_named(
    checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tiercache.store.encode._CHUNK_WEIGHTS", 56 * 10 * 3)  # ten neurons at a time
    _spoil(checkpoint, tmp_path, "model.layers.1.mlp.up_proj.weight", float("nan"))
    with pytest.raises(QuantizationError) as raised:
        convert(tmp_path / "model", tmp_path / "store", compress="off")
    assert "model.layers.1.mlp.up_proj.weight" in str(raised.value)
    assert "row 100 " in str(raised.value)


def _spoil(checkpoint: MakeCheckpoint, tmp_path: Path, name: str, value: float) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[name][100, 3] = value
    save_file(tensors, tmp_path / "model" / "model.safetensors", {"format": "pt"})


def test_dense_tensors_may_hold_anything(checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """The embedding is kept as it is, so its infinities are the model's own business."""
    _spoil(checkpoint, tmp_path, "model.embed_tokens.weight", float("inf"))
    convert(tmp_path / "model", tmp_path / "store", compress="off")
    PlaneStore.open(tmp_path / "store").verify()


def test_every_error_is_one_of_ours() -> None:
    """The test file would pass a bare Exception off as one otherwise."""
    assert all(issubclass(kind, TiercacheError) for kind in (StoreError, UsageError, EnvironmentUnsupportedError))
