"""Long work tells of itself: a bar on a terminal, lines in a log, nothing where it was asked to be quiet."""

import pytest

from tiercache import progress


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
