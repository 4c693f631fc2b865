"""A capped run is really capped, really measured, and leaves nothing behind."""

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import cgroup
from benchmarks.cgroup import MemoryGroup, drop_caches, memory_group, run_capped
from tiercache.errors import EnvironmentUnsupportedError

MIB = 1 << 20
TOUCH = "import sys; print('touched', len(b'x' * int(sys.argv[1])))"
READ = "import sys; file = open(sys.argv[1], 'rb')\nwhile file.read(1 << 20): pass"


@pytest.fixture
def writable_cgroup() -> None:
    try:
        with memory_group(64 * MIB):
            pass
    except EnvironmentUnsupportedError as error:
        pytest.skip(str(error))


@pytest.fixture
def made_groups(monkeypatch: pytest.MonkeyPatch) -> list[MemoryGroup]:
    """Every group that the test makes, to look for afterwards."""
    groups: list[MemoryGroup] = []
    make = cgroup._first_possible_group

    def remember(limit_bytes: int) -> MemoryGroup:
        groups.append(make(limit_bytes))
        return groups[-1]

    monkeypatch.setattr(cgroup, "_first_possible_group", remember)
    return groups


def python(code: str, *arguments: object) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)]


@pytest.mark.cgroup
@pytest.mark.usefixtures("writable_cgroup")
class TestRunCapped:
    def test_small_child_reports_its_peak(self, made_groups: list[MemoryGroup]) -> None:
        run = run_capped(python(TOUCH, 40 * MIB), 128 * MIB, timeout_s=60)
        assert (run.returncode, run.stdout, run.oom_killed) == (0, f"touched {40 * MIB}\n", False)
        assert 40 * MIB < run.max_rss_bytes < 80 * MIB
        assert 40 * MIB < run.cgroup_peak_bytes < 128 * MIB
        assert not made_groups[0].path.exists()

    def test_greedy_child_is_oom_killed(self, made_groups: list[MemoryGroup]) -> None:
        run = run_capped(python(TOUCH, 400 * MIB), 64 * MIB, timeout_s=60)
        assert (run.returncode, run.stdout, run.oom_killed) == (-9, "", True)
        assert run.cgroup_peak_bytes <= 64 * MIB
        assert not made_groups[0].path.exists()

    def test_page_cache_counts_but_does_not_kill(self, tmp_path: Path) -> None:
        file = tmp_path / "large"
        file.write_bytes(os.urandom(MIB) * 128)
        drop_caches(file)
        run = run_capped(python(READ, file), 64 * MIB, timeout_s=60)
        assert (run.returncode, run.oom_killed) == (0, False)
        assert 50 * MIB < run.cgroup_peak_bytes <= 64 * MIB
        assert 128 * MIB <= run.disk_read_bytes < 192 * MIB

    def test_child_is_measured_and_not_its_large_parent(self) -> None:
        ballast = b"x" * (200 * MIB)
        run = run_capped(python("pass"), 64 * MIB, timeout_s=60)
        assert run.max_rss_bytes < 50 * MIB < len(ballast)

    def test_late_child_is_killed_with_its_own_children(self, made_groups: list[MemoryGroup]) -> None:
        orphan = "import subprocess, sys, time; print('here', flush=True)\n"
        orphan += "subprocess.Popen(['sleep', '60'], start_new_session=True); time.sleep(60)"
        started_s = time.monotonic()
        with pytest.raises(subprocess.TimeoutExpired) as late:
            run_capped(python(orphan), 64 * MIB, timeout_s=0.5)
        assert str(late.value.stdout) == "here\n"
        assert time.monotonic() - started_s < 20
        assert not made_groups[0].path.exists()

    def test_environment_and_exit_code_pass_through(self) -> None:
        code = "import os, sys; print(os.environ['COLOUR'], file=sys.stderr); sys.exit(3)"
        run = run_capped(python(code), 64 * MIB, env={"COLOUR": "blue"}, timeout_s=60)
        assert (run.returncode, run.stderr) == (3, "blue\n")

    def test_unknown_command_is_127(self) -> None:
        run = run_capped(["/no/such/command"], 64 * MIB, timeout_s=60)
        assert run.returncode == 127
        assert "/no/such/command" in run.stderr


def test_no_cgroup_is_a_named_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("proc /proc proc rw 0 0\n")
    monkeypatch.setattr(cgroup, "MOUNTS", mounts)
    with pytest.raises(EnvironmentUnsupportedError, match="neither mounted nor delegated"):
        run_capped(["true"], 64 * MIB, timeout_s=60)


def test_v2_offers_delegating_groups_nearest_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = tmp_path / "user" / "session"
    own.mkdir(parents=True)
    for folder, controllers in ((tmp_path, "cpu memory"), (tmp_path / "user", "memory pids"), (own, "")):
        (folder / "cgroup.subtree_control").write_text(controllers + "\n")
    mounts, groups = tmp_path / "mounts", tmp_path / "groups"
    mounts.write_text(f"cgroup2 {tmp_path} cgroup2 rw,nosuid 0 0\n")
    groups.write_text("0::/user/session\n")
    monkeypatch.setattr(cgroup, "MOUNTS", mounts)
    monkeypatch.setattr(cgroup, "OWN_GROUPS", groups)
    assert [parent for parent, _ in cgroup._parents()] == [tmp_path / "user", tmp_path]


def test_drop_caches_leaves_no_page(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "file"
    file.parent.mkdir()
    file.write_bytes(os.urandom(MIB))
    assert is_cached(file)
    drop_caches(tmp_path)
    assert not is_cached(file)


def is_cached(file: Path) -> bool:
    """Whether the first page of the file can be read without waiting for the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return os.preadv(descriptor, [bytearray(4096)], 0, os.RWF_NOWAIT) > 0
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            pytest.skip("this file system does not say what is cached")
        raise
    finally:
        os.close(descriptor)
