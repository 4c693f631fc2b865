"""The doctor's verdicts on machines of every kind, and its run on this one."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from profiler.probe import ReadRoof
from tiercache import cli
from tiercache.doctor import gpu, report
from tiercache.doctor.checks import Check
from tiercache.doctor.gpu import PcieLink

ROOT = Path(__file__).parents[1]


def test_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_READ_SAMPLE_BYTES", 4 << 20)
    checks = report.diagnose(tmp_path / "not" / "yet")
    names = [check.name for check in checks]
    expected = [
        "python",
        "torch",
        "transformers",
        "gpu",
        "pinned memory",
        "main memory",
        "processor",
        "compiler",
        "kernels",
    ]
    assert set(expected) <= set(names)
    assert names[-3:] == ["file system", "disk space", "disk reads"]
    assert [check.state for check in checks if check.name in ("python", "torch", "transformers")] == ["ok"] * 3
    assert all(check.advice for check in checks if check.state != "ok")
    assert not any("could not look" in check.value for check in checks)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", [False, True])
def test_exit_code(monkeypatch: pytest.MonkeyPatch, broken: bool) -> None:
    def look(folder: Path) -> list[Check]:
        return [Check("flux", "fail" if broken else "warn", "[none] here", "add a capacitor")]

    monkeypatch.setattr(report, "PROBES", (look,))
    result = CliRunner(env={"FORCE_COLOR": None, "NO_COLOR": "1"}).invoke(cli.app, ["doctor", "--json"])
    assert result.exit_code == (5 if broken else 0)
    (line,) = result.stdout.splitlines()
    plain: dict[str, Any] = json.loads(line)
    assert (plain["schema"], plain["ok"]) == ("tiercache.doctor/1", not broken)
    assert [check["name"] for check in plain["checks"]] == ["flux"]
    assert "[none] here" in result.stderr


def test_a_probe_that_breaks_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def _torn_probe(folder: Path) -> list[Check]:
        raise RuntimeError("torn")

    monkeypatch.setattr(report, "PROBES", (_torn_probe, report._python))
    torn, python = report.diagnose()
    assert (torn.name, torn.state, python.state) == ("torn probe", "warn", "ok")


def test_ranges_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = set(project["dependencies"])
    for name in report.RANGES:
        assert report.requirement(name) in declared
    assert project["requires-python"] == ">=" + ".".join(map(str, report.PYTHON_FLOOR))


@pytest.mark.parametrize(
    ("name", "version", "state"),
    [
        ("torch", "2.6.0", "ok"),
        ("torch", "2.14.1+cu126", "ok"),
        ("torch", "2.5.1", "fail"),
        ("torch", "3.0.0a0", "fail"),
        ("transformers", "5.5", "ok"),
        ("transformers", "4.57.6", "fail"),
        ("transformers", "unknown", "fail"),
    ],
)
def test_versions(name: str, version: str, state: str) -> None:
    check = report.version_check(name, version)
    assert check.state == state
    assert bool(check.advice) == (state == "fail")


def test_a_missing_library_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(report.RANGES, "warp_drive", ((1,), (2,)))
    assert report._library("warp_drive").state == "fail"


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((6, 1), ["sm_50", "sm_60", "sm_70"], True),  # a P40 on the legacy build
        ((5, 2), ["sm_50"], True),  # an M40
        ((6, 1), ["sm_75", "sm_80", "sm_120"], False),
        ((8, 6), ["sm_80"], True),  # a 3090
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "compute_80"], True),  # by PTX
        ((6, 1), ["compute_80"], False),
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_120"], True),
        ((10, 3), ["sm_100a"], False),
        ((8, 6), [], False),
    ],
)
def test_architectures(capability: tuple[int, int], archs: list[str], runs: bool) -> None:
    assert gpu.runs_on(capability, archs) is runs
    assert gpu.architecture("card", capability, archs).state == ("ok" if runs else "fail")


def test_old_cards_get_the_line_that_installs_the_last_build_for_them() -> None:
    old = gpu.architecture("Tesla P40", (6, 1), ["sm_75"])
    assert gpu.LEGACY_INSTALL in old.advice
    assert "torch<2.15" in old.advice
    assert gpu.LEGACY_INSTALL not in gpu.architecture("new", (13, 0), ["sm_75"]).advice


def test_a_gpu_that_torch_cannot_use_fails() -> None:
    assert gpu.unusable([], "2.13.0+cpu", None).value == "none: CPU only"
    assert gpu.unusable([], "2.13.0+cpu", None).state == "ok"
    without = gpu.unusable(["Tesla P40"], "2.13.0+cpu", None)
    assert (without.state, "Tesla P40" in without.value, "cu126" in without.advice) == ("fail", True, True)
    assert "driver" in gpu.unusable(["RTX 3090"], "2.13.0", "13.0").advice


@pytest.mark.parametrize(
    ("link", "state", "advice"),
    [
        (PcieLink("card", 4, 4, 16, 16), "ok", ""),
        (PcieLink("card", 1, 4, 16, 16), "ok", "at rest"),
        (PcieLink("card", 3, 3, 4, 16), "warn", "slot"),
        (PcieLink("card", 0, 0, 0, 0), "ok", ""),
    ],
)
def test_links(link: PcieLink, state: str, advice: str) -> None:
    check = gpu.link_check(link)
    assert check.state == state
    assert advice in check.advice
    assert bool(check.advice) == bool(advice)


@pytest.mark.parametrize(
    ("kind", "state"),
    [("ext4", "ok"), ("", "ok"), ("nfs4", "warn"), ("9p", "warn"), ("tmpfs", "warn"), ("cifs", "warn")],
)
def test_file_systems(kind: str, state: str) -> None:
    assert report.file_system_check(kind, Path("/data")).state == state


@pytest.mark.parametrize(("gbps", "direct", "state"), [(3.0, True, "ok"), (0.1, True, "warn"), (3.0, False, "warn")])
def test_disk_reads(gbps: float, direct: bool, state: str) -> None:
    assert report.reads_check(ReadRoof(gbps, 4, 2 << 20, direct)).state == state


def test_a_folder_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("profiler.probe.folder_read", refuse)
    (check,) = report._disk_reads(tmp_path)
    assert (check.state, "Permission denied" in check.value) == ("warn", True)


@pytest.mark.parametrize("fast", [True, False])
def test_slow_kernels_are_a_warning_with_a_cure(fast: bool) -> None:
    check = report.kernels_check("cpu", fast, "said of it")
    assert (check.state, "said of it" in check.value) == ("ok" if fast else "warn", True)
    assert ("CC" in check.advice) is not fast
    assert report.works([check])
