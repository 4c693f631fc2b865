"""`tiercache cache`: what it lists, what it removes, and what it leaves alone."""

import shutil
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from test_cli import call, data, refused

import tiercache
from tiercache.commands import cache as commands
from tiercache.engine import probe_cache
from tiercache.errors import UsageError
from tiercache.store import cache
from tiercache.store.folders import locked

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
    (home / "real" / "small").mkdir(parents=True)
    (home / "real" / "small" / "small.gguf").touch()
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
        "imports/file": "imported checkpoint",
        "kernels": "kernels",
        "probe.mdb": "probe and actuals",
        "real/small": "real model",
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
    assert kinds() == {"hub": "other", "stores/mine": "other"}
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


def test_what_a_run_reads_stays(home: Path) -> None:
    with tiercache.offload(home / "stores" / "whole", **SMALL) as model:
        assert "stores/whole is in use" in refused(call("cache", "remove", "--all", "--yes", "--json"), 2, "UsageError")
        assert model(torch.zeros(1, 2, dtype=torch.long)).logits.shape[1] == 2
    assert call("cache", "remove", "whole", "--yes").exit_code == 0


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
