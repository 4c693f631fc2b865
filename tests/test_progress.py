"""Long work tells of itself: a bar on a terminal, lines in a log, nothing where it was asked to be quiet."""

import sys
from types import SimpleNamespace

import pytest
from tqdm import auto

from tiercache import notebook, progress


@pytest.mark.parametrize(("show", "wanted"), [(None, 3), (False, 0)])
def test_a_log_gets_lines(
    show: bool | None, wanted: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    with progress.bar("converting", 100, done_bytes=20, show=show) as advance:
        for _ in range(3):
            advance(20)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == wanted
    if wanted:
        assert lines[0] == "converting: 40%, 30 s left"
        assert lines[-1] == "converting: 80%, 10 s left"


def test_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.bar("converting", 100) as advance:
        advance(100)
    assert capsys.readouterr().err == ""


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
