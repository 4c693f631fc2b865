"""Variables of the environment: one table, one file, clear errors, no colours where none are wanted."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tiercache.cli import app
from tiercache.commands import base, text_charts
from tiercache.config import environment
from tiercache.config.cache_folder import TAG_FILE, made_folder
from tiercache.config.environment import home_folder
from tiercache.doctor import report
from tiercache.errors import EnvironmentUnsupportedError, UsageError

HOUSE = Path(__file__).parents[1]
PICO = HOUSE / "examples" / "pico" / "checkpoint"


def test_the_docs_name_the_same_variables() -> None:
    page = (HOUSE / "docs" / "environment.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`[^|]+`) \|.*\| ([^|]+) \|$", page, re.MULTILINE)
    named = {name: reader for cell, reader in rows for name in re.findall(r"`(\w+)`", cell)}
    assert named.keys() == {*environment.OWN, *environment.OF_LIBRARIES}
    assert {name for name, reader in named.items() if "tiercache" in reader} == {*environment.OWN}


def test_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("TIERCACHE_HOME", "")
    assert home_folder() == tmp_path / ".cache" / "tiercache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert home_folder() == tmp_path / "xdg" / "tiercache"
    monkeypatch.setenv("TIERCACHE_HOME", "~/own")
    assert home_folder() == tmp_path / "own"


@pytest.mark.parametrize("name", ["TIERCACHE_HOME", "XDG_CACHE_HOME"])
def test_a_relative_folder_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIERCACHE_HOME", raising=False)
    monkeypatch.setenv(name, "somewhere")
    with pytest.raises(UsageError, match=f"{name}='somewhere' is a relative path"):
        home_folder()
    (row,) = [check for check in report.diagnose() if check.name == "cache folder"]
    assert row.state == "fail"
    assert name in row.value


@pytest.mark.filterwarnings("ignore:every matrix is decoded")  # the kernels cannot be compiled there either
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TIERCACHE_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(EnvironmentUnsupportedError, match=r"home/stores cannot be written .*; set TIERCACHE_HOME"):
        made_folder(home_folder() / "stores")
    told = CliRunner().invoke(app, ["run", str(PICO), "--precision", "int4", "--prompt", "x"])
    assert told.exit_code == 5
    assert "set TIERCACHE_HOME" in told.stderr


def test_a_home_that_nobody_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERCACHE_HOME", "~no-such-user/cache")
    with pytest.raises(EnvironmentUnsupportedError, match="set TIERCACHE_HOME"):
        home_folder()


def test_the_tag_is_the_standard_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERCACHE_HOME", str(tmp_path / "home"))
    made_folder(home_folder() / "kernels")
    tag = (tmp_path / "home" / TAG_FILE).read_bytes()
    assert tag.startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")  # https://bford.info/cachedir/
    made_folder(tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere" / TAG_FILE).exists()


def test_only_variables_of_the_table_can_be_asked_for() -> None:
    with pytest.raises(ValueError, match="PATH is not in"):
        environment.value("PATH")


def test_secrets_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in environment.SECRET:
        monkeypatch.setenv(name, "hunter2")
    assert "hunter2" not in str(environment.shown())
    assert set(environment.SECRET) <= environment.shown().keys()


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A table and a chart in text, as on a terminal."""
    heat_map = {"title": "speeds", "rows": ["3090"], "columns": ["64GiB"], "cells": [[1.5]]}

    def drawn() -> str:
        base.console().print(report.table([report.kernels_check("cpu", False, "none")]))
        base.console().print(*text_charts.of({"kind": "sweep", "maps": [heat_map]}))
        return capsys.readouterr().err

    for name, value in (("TERM", "xterm-256color"), ("FORCE_COLOR", "1")):
        monkeypatch.setenv(name, value)
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        text = drawn()
        assert all(part in text for part in ("warn", "1.50"))
        assert bool(re.search(r"\x1b\[[\d;]*[34][0-9]", text)) is not bool(no_color)
