"""`tiercache cache`: what it lists, what it removes, and what it leaves alone."""

import fcntl
import os
import shutil
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import gguf_toys
import pytest
import torch
import typer
from test_cli import call, data, refused

import tiercache
from benchmarks.real import model as real
from examples.setting import setting
from tiercache.commands import cache as commands
from tiercache.engine import probe_cache, session
from tiercache.engine.source import open_model
from tiercache.errors import StoreError, UsageError
from tiercache.store import cache
from tiercache.store.checkpoint import resolve
from tiercache.store.convert import convert
from tiercache.store.folders import in_use, locked, scratch
from tiercache.store.journal import ConversionJournal

Folders = Callable[..., Path]
SMALL: dict[str, Any] = {"precision": "int8", "kernels": "decode", "dram": "64MiB", "context": 8, "logits": 4}
Start = Callable[..., tuple[BaseProcess, Connection]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plane_store: Folders) -> Path:
    """A cache with one entry of each kind, beside a folder that is not part of it."""
    home = tmp_path / "home"
    shutil.copytree(plane_store("llama"), home / "stores" / "whole")
    (home / "stores" / "half.partial").mkdir()
    (home / "stores" / "half.partial" / "journal.mdb").write_bytes(bytes(5000))
    (home / "stores" / "mine").mkdir()
    (home / "imports" / "file").mkdir(parents=True)
    (home / "imports" / "file" / "packed-origin").touch()
    (home / "imports" / ".tiercache-making-1").mkdir()
    for name in (real.NAME, "mine"):
        (home / "real" / name).mkdir(parents=True)
        (home / "real" / name / "small.gguf").touch()
    (home / "kernels").mkdir()
    (home / "kernels" / "planes-1-avx2.so").write_bytes(bytes(9000))
    (home / "hub" / "models--a--b").mkdir(parents=True)
    monkeypatch.setenv("TIERCACHE_HOME", str(home))
    monkeypatch.setenv("HF_HUB_CACHE", str(home / "hub"))
    with probe_cache._open():
        pass
    return home


def kinds() -> dict[str, str]:
    return {entry.name: entry.kind for entry in cache.entries()}


def test_every_kind_is_known_by_what_is_in_it(home: Path) -> None:
    expected = {
        "hub": "other",
        "imports/.tiercache-making-1": "half made",
        "imports/file": "imported checkpoint",
        "kernels": "kernels",
        "probe.mdb": "probe and actuals",
        f"real/{real.NAME}": "real model",
        "real/mine": "other",
        "stores/half.partial": "unfinished store",
        "stores/mine": "other",
        "stores/whole": "plane store",
    }
    assert kinds() == expected
    (home / "kernels" / "notes.txt").touch()
    assert kinds()["kernels"] == "other"


def test_list_tells_sizes_and_last_use(home: Path) -> None:
    result = call("cache", "list", "--json")
    plain = data(result)
    assert (plain["schema"], plain["folder"]) == ("tiercache.cache/1", str(home))
    rows = {row["name"]: row for row in plain["entries"]}
    assert 9000 <= rows["kernels"]["nbytes"] <= 9000 + 4096
    stored = sum(path.stat().st_size for path in (home / "stores" / "whole").iterdir())
    assert stored <= rows["stores/whole"]["nbytes"] < stored + (1 << 20)
    assert rows["kernels"]["used_s"] == pytest.approx((home / "kernels" / "planes-1-avx2.so").stat().st_mtime, abs=60)
    assert "plane store" in result.stderr
    shutil.rmtree(home)
    assert data(call("cache", "list", "--json"))["entries"] == []


def test_remove_by_name(home: Path) -> None:
    assert (
        data(call("cache", "remove", "whole", "probe.mdb", "--yes", "--json"))["entries"][0]["name"] == "stores/whole"
    )
    assert not {"stores/whole", "probe.mdb"} & kinds().keys()
    assert not list(home.glob("probe*"))
    assert "kernels" in kinds()


def test_remove_all_takes_what_tiercache_made(home: Path) -> None:
    assert call("cache", "remove", "--all", "--yes").exit_code == 0
    assert kinds() == dict.fromkeys(("hub", "real/mine", "stores/mine"), "other")
    assert (home / "hub" / "models--a--b").is_dir()
    assert "nothing was removed" in call("cache", "remove", "--all").stderr


@pytest.mark.parametrize("name", ["hub", "hub/models--a--b", "..", "../elsewhere", "/etc", "stores", "", "nowhere"])
def test_nothing_else_can_be_named(home: Path, name: str) -> None:
    (home.parent / "elsewhere").mkdir()
    before = sorted(home.parent.rglob("*"))
    refused(call("cache", "remove", name, "--yes", "--json"), 2, "UsageError")
    assert sorted(home.parent.rglob("*")) == before


def test_names_or_all(home: Path) -> None:
    for arguments in ((), ("kernels", "--all")):
        assert "or --all" in refused(call("cache", "remove", *arguments, "--json"), 2, "UsageError")
    shutil.copytree(home / "stores" / "whole", home / "imports" / "whole")
    twice = refused(call("cache", "remove", "whole", "--yes", "--json"), 2, "UsageError")
    assert "imports/whole or stores/whole" in twice


def test_a_terminal_is_asked(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "add --yes" in refused(call("cache", "remove", "kernels", "--json", given="y\n"), 2, "UsageError")
    answers = iter([False, True])
    asked: list[str] = []

    def confirm(text: str, **_: Any) -> bool:
        asked.append(text)
        return next(answers)

    monkeypatch.setattr(typer, "confirm", confirm)
    monkeypatch.setattr(commands, "_at_a_terminal", lambda: True)
    assert "nothing was removed" in call("cache", "remove", "kernels").stderr
    assert "kernels" in kinds()
    assert call("cache", "remove", "kernels").exit_code == 0
    assert "kernels" not in kinds()
    assert asked[0].startswith("remove kernels (")


def test_what_a_run_reads_stays_and_the_rest_goes(home: Path) -> None:
    with tiercache.offload(home / "stores" / "whole", **SMALL) as model:
        named = call("cache", "remove", "whole", "imports/file", "--yes", "--json", "--quiet")
        assert (named.exit_code, names(data(named)["entries"])) == (2, ["imports/file"])
        assert "not removed: stores/whole is in use" in named.stderr
        everything = call("cache", "remove", "--all", "--yes", "--json")
        assert (everything.exit_code, names(data(everything)["kept"])) == (0, ["stores/whole"])
        assert "in use" in data(everything)["kept"][0]["why"]
        assert "not removed: stores/whole is in use" in everything.stderr
        assert set(kinds().values()) == {"other", "plane store"}
        assert model(torch.zeros(1, 2, dtype=torch.long)).logits.shape[1] == 2
    assert call("cache", "remove", "whole", "--yes").exit_code == 0


def names(plain: list[dict[str, Any]]) -> list[str]:
    return [each["name"] for each in plain]


def entry(name: str) -> cache.Entry:
    return next(each for each in cache.entries() if each.name == name)


def test_a_probe_under_way_stays(home: Path) -> None:
    with probe_cache._open(), pytest.raises(UsageError, match="in use"):
        cache.remove(entry("probe.mdb"))
    assert len(list(home.glob("probe.mdb*"))) == 2
    cache.remove(entry("probe.mdb"))
    assert not list(home.glob("*probe*"))


def test_what_is_being_made_stays(home: Path) -> None:
    with scratch(home / "stores") as made:
        (half,) = [each for each in cache.entries() if each.name == f"stores/{made.name}"]
        assert half.kind == "half made"
        with pytest.raises(UsageError, match="in use"):
            cache.remove(half)


def test_notebooks_keep_their_stores_where_they_are_listed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL", "STORE"):
        monkeypatch.delenv(name, raising=False)
    assert setting().store.parent == home / "stores"


def test_what_goes_meanwhile_is_left_out(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lstat, unlink = Path.lstat, os.unlink

    def late(path: Path) -> os.stat_result:
        if path.suffix == ".so":
            path.unlink(missing_ok=True)
        if path.suffix == ".partial":
            shutil.rmtree(path, ignore_errors=True)
        return lstat(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "lstat", late)
        assert kinds()["kernels"] == "kernels"
        assert "stores/half.partial" not in kinds()

    def outrun(path: Any, **options: Any) -> None:
        unlink(path, **options)
        unlink(path, **options)  # not there any more

    whole = entry("stores/whole")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", outrun)
        cache.remove(whole)
    cache.remove(whole)  # another process was faster
    assert not list((home / "stores").glob("*whole*"))


def test_what_was_removed_before_it_was_held_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, flock = home / "stores" / "whole", fcntl.flock

    def late(descriptor: int, kind: int) -> None:
        store.rename(home / "gone")
        flock(descriptor, kind)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", late)
        with pytest.raises(UsageError, match="was removed meanwhile"), in_use(store):
            pass
    (home / "gone").rename(store)

    def opened(*arguments: Any, **options: Any) -> Any:
        found = open_model(*arguments, **options)
        cache.remove(entry("stores/whole"))
        return found

    monkeypatch.setattr(session, "open_model", opened)
    with pytest.raises(UsageError, match="was removed meanwhile"), tiercache.offload(store, **SMALL):
        pass


def test_a_conversion_holds_what_it_reads(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve(gguf_toys.write(gguf_toys.build("llama"), tmp_path / "toy.gguf"))
    put = ConversionJournal.put_records
    refusals = []

    def remove_then_put(journal: ConversionJournal, *arguments: Any) -> None:
        with pytest.raises(UsageError, match="in use") as caught:
            cache.remove(entry(f"imports/{folder.name}"))
        refusals.append(caught)
        put(journal, *arguments)

    monkeypatch.setattr(ConversionJournal, "put_records", remove_then_put)
    convert(folder, tmp_path / "store", plain=True)
    assert refusals
    assert (tmp_path / "store" / "config.json").is_file()


def test_no_store_without_the_files_that_were_there(
    checkpoint: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "checkpoint")
    put = ConversionJournal.put_records

    def put_then_remove(journal: ConversionJournal, *arguments: Any) -> None:
        put(journal, *arguments)
        (folder / "config.json").unlink(missing_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(ConversionJournal, "put_records", put_then_remove)
        with pytest.raises(StoreError, match=r"config\.json was removed while it was converted"):
            convert(folder, tmp_path / "store", plain=True)
    assert not (tmp_path / "store").exists()
    shutil.copy(checkpoint("llama") / "config.json", folder)
    assert convert(folder, tmp_path / "store", plain=True).resumed_bytes > 0


def test_what_a_conversion_writes_stays(home: Path) -> None:
    partial = home / "stores" / "half.partial"
    with locked(partial, "never"), pytest.raises(UsageError, match="in use"):
        cache.remove(next(entry for entry in cache.entries() if entry.kind == "unfinished store"))
    assert partial.is_dir()


def test_a_folder_outside_the_cache_is_not_held(plane_store: Folders) -> None:
    with (
        tiercache.offload(plane_store("llama"), **SMALL),
        locked(plane_store("llama") / "config.json", "held"),
    ):
        pass


def test_a_killed_removal_leaves_nothing_half_usable(home: Path, start_child: Start) -> None:
    process, pipe = start_child(remove_until_told, str(home))
    assert pipe.recv() == "renamed"
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert kinds()["stores/.removing-whole"] == "half removed"
    assert "stores/whole" not in kinds()
    shutil.copytree(home / "stores" / ".removing-whole", home / "stores" / "whole")  # made anew, then removed again
    (home / "stores" / "whole" / "catalog.mdb").touch()
    assert call("cache", "remove", "stores/whole", "--yes").exit_code == 0
    assert not [name for name in kinds() if "whole" in name]


def remove_until_told(pipe: Connection, home: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIERCACHE_HOME", home)

        def stop(path: Path) -> None:
            next(path.glob("plane*")).unlink()
            pipe.send("renamed")
            pipe.recv()

        patch.setattr(shutil, "rmtree", stop)
        cache.remove(next(entry for entry in cache.entries() if entry.name == "stores/whole"))


def test_a_link_goes_and_what_it_points_to_stays(home: Path, tmp_path: Path) -> None:
    shutil.move(home / "stores" / "whole", tmp_path / "other-disk")
    (home / "stores" / "whole").symlink_to(tmp_path / "other-disk")
    assert kinds()["stores/whole"] == "plane store"
    assert call("cache", "remove", "whole", "--yes").exit_code == 0
    assert not (home / "stores" / "whole").is_symlink()
    assert (tmp_path / "other-disk" / "catalog.mdb").is_file()


def test_a_store_made_without_a_name_is_in_the_list(
    checkpoint: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TIERCACHE_HOME", str(tmp_path / "home"))
    with tiercache.offload(checkpoint("llama"), **SMALL):
        pass
    (entry,) = cache.entries()
    assert entry.kind == "plane store"
    assert (tmp_path / "home" / "CACHEDIR.TAG").is_file()
