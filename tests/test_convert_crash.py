"""Conversions killed at any moment end with the same bytes as one that ran through, and take little memory.

Children are killed for real (SIGKILL, or `_exit` between two system calls). That loses no written byte, as a power cut
may, so what the journal does not vouch for is overwritten with garbage before the next run.
"""

import fcntl
import hashlib
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers as tf
from safetensors.torch import save_file
from test_calibrate import with_tokenizer

from profiler import probe
from tiercache.errors import UsageError
from tiercache.model import meta_model
from tiercache.store import catalog
from tiercache.store.catalog import UnitRecord
from tiercache.store.convert import convert
from tiercache.store.format import FILES, align
from tiercache.store.journal import ConversionJournal
from tiercache.store.planestore import PlaneStore

TOKENS = 512  # of a calibration text
LAYERS = 12
StartChild = Callable[..., Any]


def fingerprint(folder: Path) -> dict[str, str]:
    """Every file of a folder and its SHA-256."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def saved(folder: Path, dtype: torch.dtype, **sizes: int) -> Path:
    """The checkpoint of a random llama."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(num_attention_heads=4, **sizes)
    tf.AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with many layers."""
    sizes = {"vocab_size": 64, "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": LAYERS}
    return saved(tmp_path_factory.mktemp("deep") / "model", torch.bfloat16, **sizes)


def unbroken(model: Path, compress: str, tune: int = 0) -> Path:
    """A conversion that ran through, beside the model; made once."""
    store = model.with_name(f"unbroken-{compress}-{tune}")
    if not store.exists():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as the children: sums of products depend on it
        convert(model, store, compress=compress, tokens=TOKENS, tune=tune)
        torch.set_num_threads(threads)
    return store


def spoil_what_is_not_vouched_for(partial: Path, rng: random.Random) -> None:
    """What a power cut may leave behind the last layer that the journal knows: anything."""
    if not (partial / "journal.mdb").exists() or (partial / "catalog.mdb").exists():
        return  # not begun, or whole
    with catalog.environment(partial / "journal.mdb", readonly=False) as env:
        records = catalog.contents(env, partial).records
    ends = {name: 0 for name in FILES if (partial / name).exists()}
    for record in records:
        for name, extent in record.extents.items():
            ends[name] = max(ends[name], align(extent.offset + extent.stored_bytes))
    for name, end in ends.items():
        assert (partial / name).stat().st_size >= end
        with (partial / name).open("r+b") as file:
            file.seek(end)
            file.write(rng.randbytes(rng.randrange(20_000)))


def check_between(store: Path) -> None:
    """After a kill the store is there and whole, or not there at all."""
    if store.exists():
        PlaneStore.open(store).verify()
    else:
        with pytest.raises(UsageError):
            PlaneStore.open(store)


# ---------------------------------------------------------------- at random moments


def _convert_and_tell(pipe: Connection, model: Path, store: Path, compress: str, tune: int) -> None:
    torch.set_num_threads(1)
    pipe.send("begin")
    pipe.send(convert(model, store, compress=compress, tokens=TOKENS, tune=tune).resumed_bytes)


TINY = {"vocab_size": 131, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer, so that codes are calibrated; their rounding may be learned besides."""
    folder = tmp_path_factory.mktemp("tiny")
    return with_tokenizer(saved(folder / "bare", torch.float32, **TINY, max_position_embeddings=128), folder / "model")


@pytest.fixture(scope="module")
def tiny_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bf16."""
    folder = tmp_path_factory.mktemp("tiny")
    return with_tokenizer(saved(folder / "bare", torch.bfloat16, **TINY, max_position_embeddings=128), folder / "model")


@pytest.mark.parametrize(
    ("name", "compress", "tune", "least"),
    [("deep", "off", 0, 5), ("deep", "on", 0, 3), ("tiny_bf16", "off", 0, 3), ("tiny", "off", 20, 3)],
)
def test_killed_at_random_moments(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    start_child: StartChild,
    name: str,
    compress: str,
    tune: int,
    least: int,
) -> None:
    deep = request.getfixturevalue(name)
    reference = fingerprint(unbroken(deep, compress, tune))
    rng = random.Random(compress)
    process, pipe = start_child(_convert_and_tell, deep, tmp_path / "timed", compress, tune)
    assert pipe.recv() == "begin"
    begin = time.perf_counter()
    pipe.recv()
    whole_s = time.perf_counter() - begin
    process.join()
    kills = stores = 0
    resumed: list[int] = []
    while kills < least or not any(resumed):
        assert kills < 10 * least, "no later run found anything to go on with"
        store = tmp_path / f"store-{stores}"
        stores += 1
        done, tries = False, 0
        while not done:
            process, pipe = start_child(_convert_and_tell, deep, store, compress, tune)
            assert pipe.recv() == "begin"
            tries += 1  # each try lives longer, so that a slow machine too comes to a layer that is done
            if done := pipe.poll(rng.uniform(0, whole_s * (0.5 + tries / 4))):
                resumed.append(pipe.recv())
            else:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
            process.join()
            assert process.exitcode == (0 if done else -signal.SIGKILL)
            check_between(store)
            if not done:
                spoil_what_is_not_vouched_for(store.with_name(store.name + ".partial"), rng)
        assert fingerprint(store) == reference
        assert not store.with_name(store.name + ".partial").exists()


# ---------------------------------------------------------------- between any two system calls


class Countdown:
    """Once the folder is locked, ends the process at the n-th call that changes a file, half of a write being done."""

    def __init__(self, steps: int) -> None:
        self.steps, self.seen = steps, list[str]()
        self._armed = False
        lock = fcntl.flock

        def arm(*arguments: Any) -> None:
            self._armed = True
            lock(*arguments)

        fcntl.flock = arm

    def watch(self, owner: Any, *names: str) -> None:
        for name in names:
            setattr(owner, name, self._watched(name, getattr(owner, name)))

    def _watched(self, name: str, true: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            if self._armed:
                self.seen.append(name)
                if len(self.seen) == self.steps:
                    _do_half(name, true, arguments)
                    os._exit(9)
            return true(*arguments, **options)

        return watched


def _do_half(name: str, true: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if name == "pwrite":
        descriptor, data, offset = arguments
        true(descriptor, data[: len(data) // 2], offset)
    elif name == "copyfile":
        Path(arguments[1]).write_bytes(b"half")


def _convert_and_die(pipe: Connection, model: Path, store: Path, steps: int) -> None:
    torch.set_num_threads(1)
    countdown = Countdown(steps)
    countdown.watch(os, "pwrite", "ftruncate", "fdatasync", "fsync")
    countdown.watch(shutil, "copyfile")
    countdown.watch(catalog, "write")
    countdown.watch(Path, "rename", "unlink", "rmdir")
    report = convert(model, store, compress="off")
    pipe.send((report.resumed_bytes, countdown.seen))


def die_after(start_child: StartChild, model: Path, store: Path, steps: int) -> tuple[int, list[str]] | None:
    """What it resumed with and the steps that it took; None when it died before its end."""
    process, pipe = start_child(_convert_and_die, model, store, steps)
    try:
        outcome = pipe.recv()
    except EOFError:
        outcome = None
    process.join()
    assert process.exitcode == (9 if outcome is None else 0)
    return outcome


def test_killed_between_any_two_steps(deep: Path, tmp_path: Path, start_child: StartChild) -> None:
    """One conversion that dies over and over, each time some steps later than it could go on."""
    store, rng = tmp_path / "store", random.Random(1)
    deaths = 0
    while (outcome := die_after(start_child, deep, store, rng.randrange(1, 160))) is None:
        deaths += 1
        check_between(store)
        spoil_what_is_not_vouched_for(tmp_path / "store.partial", rng)
        assert deaths < 60
    assert deaths >= 5
    resumed, steps = outcome
    assert resumed > 0 or not steps  # or it had died behind its very last step
    assert fingerprint(store) == fingerprint(unbroken(deep, "off"))


def test_killed_at_every_step_of_the_finish(
    checkpoint: Callable[..., Path], plane_store: Callable[..., Path], tmp_path: Path, start_child: StartChild
) -> None:
    """Copying, the catalogue, the syncs, the rename, the journal's removal, when all layers are done."""
    model = checkpoint("llama")
    _, steps = die_after(start_child, model, tmp_path / "whole", 1 << 30)
    assert die_after(start_child, model, tmp_path / "ready", steps.index("copyfile") + 1) is None
    for step in range(1, 100):
        store = tmp_path / f"store-{step}"
        shutil.copytree(tmp_path / "ready.partial", store.with_name(store.name + ".partial"))
        if died := die_after(start_child, model, store, step):
            break
        check_between(store)
        convert(model, store, compress="off")
        assert fingerprint(store) == fingerprint(plane_store("llama")), f"killed at step {step} of the finish"
        shutil.rmtree(store)
    assert died[1][-2:] == ["fsync", "unlink"]
    assert died[1].count("fsync") > len(FILES)


def test_a_kill_while_the_disk_is_measured_leaves_nothing_behind(
    checkpoint: Callable[..., Path], tmp_path: Path, start_child: StartChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = checkpoint("llama")
    process, _ = start_child(_die_measuring, model, tmp_path / "store")
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "store.partial").glob(".tiercache-probe-*"))
    monkeypatch.setattr(probe, "folder_read", lambda folder, **_: probe.ReadRoof(1e9, 1, 1, True))
    convert(model, tmp_path / "store", compress="auto")
    assert not [path.name for path in (tmp_path / "store").iterdir() if path.name.startswith(".")]


def _die_measuring(pipe: Connection, model: Path, store: Path) -> None:
    def die(path: Path, **_: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    true = probe.folder_read
    probe.disk_read = die
    probe.folder_read = lambda folder, **_: true(folder, sample_bytes=4 << 20)
    convert(model, store, compress="auto")


# ---------------------------------------------------------------- in the right order


def test_bytes_are_on_the_disk_before_anything_vouches_for_them(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill loses nothing that was written, a power cut does: so the order of the syncs is looked at."""
    dirty: set[str] = set()
    synced: set[str] = set()
    vouched = renamed = 0

    def note(name: str, change: Callable[[str], object]) -> None:
        true = getattr(os, name)

        def noted(descriptor: int, *arguments: Any) -> Any:
            result = true(descriptor, *arguments)
            change(Path(f"/proc/self/fd/{descriptor}").readlink().name)
            return result

        monkeypatch.setattr(os, name, noted)

    note("pwrite", dirty.add)
    note("ftruncate", dirty.add)
    note("fdatasync", dirty.discard)
    note("fsync", synced.add)
    put_records, rename = ConversionJournal.put_records, Path.rename

    def vouch(journal: ConversionJournal, records: list[UnitRecord], first: int) -> None:
        nonlocal vouched
        assert not dirty
        vouched += len(records) - first
        put_records(journal, records, first)

    def publish(partial: Path, store: Path) -> Path:
        nonlocal renamed
        assert {path.name for path in partial.iterdir()} | {partial.name} <= synced
        synced.clear()
        renamed += 1
        return rename(partial, store)

    monkeypatch.setattr(ConversionJournal, "put_records", vouch)
    monkeypatch.setattr(Path, "rename", publish)
    convert(checkpoint("llama"), tmp_path / "store", compress="off")
    assert (vouched > 20, renamed) == (True, 1)
    assert synced == {tmp_path.name}  # the rename itself


# ---------------------------------------------------------------- memory

LAYER_BYTES = 2 * (4 * 1024 * 1024 + 3 * 1024 * 5120)  # 38 MiB


def _growth(model: Path, store: Path) -> int:
    before = psutil.Process().memory_info().rss
    convert(model, store, compress="off")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def test_a_conversion_holds_two_layers_and_a_little(in_child: Callable[..., Any]) -> None:
    layers = 8
    config = tf.LlamaConfig(
        vocab_size=64,
        hidden_size=1024,
        intermediate_size=5120,
        num_hidden_layers=layers,
        num_attention_heads=8,
        dtype="bfloat16",
    )
    with tempfile.TemporaryDirectory(prefix="tiercache-test-") as folder:  # not kept, as pytest's own are
        model = Path(folder) / "model"
        config.save_pretrained(model)
        save_file(_random_weights(config), model / "model.safetensors", {"format": "pt"})
        assert (model / "model.safetensors").stat().st_size > layers * LAYER_BYTES
        growth = in_child(_growth, model, Path(folder) / "store")
    assert growth < 2 * LAYER_BYTES + (64 << 20), f"{growth >> 20} MiB"


def _random_weights(config: tf.LlamaConfig) -> dict[str, torch.Tensor]:
    """Every layer the same, since random numbers take time."""
    parameters = dict(meta_model.build(config, torch.bfloat16).named_parameters())
    torch.manual_seed(0)
    made = {shape: torch.randn(shape).bfloat16() for shape in {parameter.shape for parameter in parameters.values()}}
    return {name: made[parameter.shape].clone() for name, parameter in parameters.items()}
