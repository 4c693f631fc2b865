"""Long work tells of itself: lines in a log, a file beside, nothing where it was asked to be quiet."""

import inspect
import io
import re
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from test_cli import call, refused
from tqdm import auto

from tiercache import cli, display, notebook, progress
from tiercache.commands import profiler

ALIVE = "tiercache-display"
INSTANT = {"hardware", "inspect"}  # a table that lies beside the code, and a catalogue


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(display, "FIRST_S", 0.02)
    monkeypatch.setattr(display, "EVERY_S", 0.02)


def drawing() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == ALIVE]


def until(seen: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What was written until that was, or until ten seconds were over."""
    end, found = time.monotonic() + 10, ""
    while seen not in found and time.monotonic() < end:
        time.sleep(0.01)
        found += capsys.readouterr().err
    return found


def test_what_a_task_says(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 10.0, 7200.0])
    monkeypatch.setattr(display.time, "monotonic", lambda: next(clock))
    task = display.Task("converting", 100, 20)
    assert task.text() == "converting: 10 s so far"
    task.advance(20)
    assert task.text() == "converting: 40%, 30 s left"
    task.advance(20)
    assert task.text() == "converting: 60%, 2.0 h left"


@pytest.mark.usefixtures("often")
@pytest.mark.parametrize("show", [None, True])
def test_a_log_gets_lines_though_nothing_advances(show: bool | None, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("converting", 100, show=show):
        with progress.step("rounding") as tell:
            assert "converting" not in until("rounding: 0 s so far\n", capsys)  # the innermost
            tell("layer 2 of 8")
            assert until("rounding: layer 2 of 8\n", capsys)
        assert "converting: 0 s so far\n" in until("converting", capsys)
    assert drawing() == []


@pytest.mark.usefixtures("often")
def test_quiet_work_says_nothing_but_to_a_log_file(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("converting", 100, show=False):
        assert drawing() == []
        progress.note("so much for that", show=False)
        time.sleep(0.1)
    log = io.StringIO()
    with progress.DISPLAY.logging(log), progress.bar("converting", 100, show=False):
        progress.note("a note", show=False)
        while "converting" not in log.getvalue():
            time.sleep(0.01)
    assert capsys.readouterr().err == ""
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert re.fullmatch(rf"({stamp} (a note|converting: 0 s so far)\n)+", log.getvalue())
    assert "a note" in log.getvalue()
    assert drawing() == []


def test_short_work_says_nothing_and_notes_are_for_logs_too(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("converting", 100) as advance:
        advance(100)
        progress.note("half a minute")
    assert capsys.readouterr().err == "half a minute\n"


def test_a_reader_that_has_gone_is_no_error(often: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Closed())
    with progress.step("converting"):
        while drawing():
            time.sleep(0.01)


def test_every_command_tells_that_it_goes_on() -> None:
    silent = {name for app in (cli.app, profiler.profile) for name, run in _leaves(app) if "begin(" not in run}
    assert silent <= INSTANT


def _leaves(app: Any) -> list[tuple[str, str]]:
    """Each command's name and source."""
    found, groups = [], [typer.main.get_command(app)]
    while groups:
        for name, command in groups.pop().commands.items():  # type: ignore[attr-defined]
            if hasattr(command, "commands"):
                groups.append(command)
            else:
                found.append((name, inspect.getsource(inspect.unwrap(command.callback))))
    return found


def test_a_log_file_is_named_before_the_command(tmp_path: Path) -> None:
    log = tmp_path / "run.log"
    assert call("--log", log, "verify", tmp_path / "nowhere", "--json").exit_code == 2
    assert "ended by UsageError" in log.read_text()
    assert "--log" in refused(call("--log", tmp_path, "verify", tmp_path, "--json"), 2, "UsageError")


@pytest.mark.parametrize("show", [None, True, False])
def test_a_notebook_gets_tqdm(show: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[auto.tqdm] = []

    class Watched(auto.tqdm):
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            drawn.append(self)

    monkeypatch.setattr(auto, "tqdm", Watched)
    assert not notebook.here()
    for config in ({}, {"IPKernelApp": {}}):  # IPython at a terminal, and a notebook's kernel
        shell = SimpleNamespace(config=config)
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda shell=shell: shell))
        with progress.bar("converting", 100, done_bytes=20, show=show) as advance:
            advance(30)
    assert [(each.desc, each.n, each.total) for each in drawn] == ([] if show is False else [("converting", 50, 100)])
