"""Runs a command under a hard RAM cap, page cache included, in a memory cgroup of its own.

It knows cgroup v1 and v2 and nothing of models, peers or tiers. The cap counts anonymous memory and the file
pages that the command was the first to touch: pages that are in the cache already are charged to whoever read
them, so `drop_caches` the files that a capped run is going to read.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tiercache.errors import EnvironmentUnsupportedError

MOUNTS = Path("/proc/self/mounts")
OWN_GROUPS = Path("/proc/self/cgroup")
REMOVAL_PATIENCE_S = 10.0

# Linux carries the peak RSS over fork and exec into ru_maxrss, so a large caller would be measured in place
# of its small child. This launcher, a bare interpreter of some 10 MB, is the one who forks and waits. It
# stays outside the group; only the child joins, before exec.
LAUNCHER = """
import json, os, sys
members, report, *argv = sys.argv[1:]
child = os.fork()
if not child:
    try:
        with open(members, "w") as file:
            file.write(str(os.getpid()))
        os.execvp(argv[0], argv)
    except OSError as error:
        sys.stderr.write(f"{argv[0]}: {error}\\n")
        os._exit(127)
status, usage = os.wait4(child, 0)[1:]
with open(report, "w") as file:
    json.dump([os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024, usage.ru_inblock * 512], file)
"""


@dataclass(frozen=True, kw_only=True)
class CappedRun:
    """What a command under a cap returned and what it used."""

    returncode: int  # negative: the signal that ended it
    stdout: str
    stderr: str
    wall_s: float
    max_rss_bytes: int  # of the process, file pages it maps included (ru_maxrss)
    cgroup_peak_bytes: int  # of the group, page cache included: never more than the cap
    disk_read_bytes: int  # what reached the disk, read-ahead included
    oom_killed: bool


@dataclass(frozen=True)
class _Dialect:
    """The file names of one cgroup version."""

    limit: str
    swap: tuple[str, bool]  # the file, and whether it counts memory and swap together
    peak: str
    events: str


_V1_SWAP, _V2_SWAP = ("memory.memsw.limit_in_bytes", True), ("memory.swap.max", False)
_V1 = _Dialect("memory.limit_in_bytes", _V1_SWAP, "memory.max_usage_in_bytes", "memory.oom_control")
_V2 = _Dialect("memory.max", _V2_SWAP, "memory.peak", "memory.events")


@dataclass(frozen=True)
class MemoryGroup:
    """One memory cgroup that `memory_group` made and removes."""

    path: Path
    backend: _Dialect

    @property
    def members(self) -> Path:
        """The file that a process writes its id to in order to join."""
        return self.path / "cgroup.procs"

    def set_limit(self, limit_bytes: int) -> None:
        """Cap memory and page cache, and keep the kernel from swapping its way around the cap."""
        (self.path / self.backend.limit).write_text(str(limit_bytes))
        name, counts_both = self.backend.swap
        if (self.path / name).exists():  # absent where the kernel does not account swap
            (self.path / name).write_text(str(limit_bytes if counts_both else 0))

    def peak_bytes(self) -> int:
        """The most that was ever charged to the group."""
        return int((self.path / self.backend.peak).read_text())

    def oom_kills(self) -> int:
        """How many processes of the group the kernel killed for want of memory."""
        lines = (self.path / self.backend.events).read_text().splitlines()
        return sum(int(value) for key, value in map(str.split, lines) if key == "oom_kill")

    def kill(self) -> None:
        """Kill whatever still runs in the group."""
        for process_id in self.members.read_text().split():
            with suppress(ProcessLookupError):
                os.kill(int(process_id), signal.SIGKILL)

    def remove(self) -> None:
        """Kill what is left and delete the group; a dying process keeps it busy for a moment."""
        deadline_s = time.monotonic() + REMOVAL_PATIENCE_S
        while True:
            self.kill()
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.01)
            else:
                return


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a memory cgroup of `limit_bytes` under the first parent that allows it; remove it at the end."""
    group = _first_possible_group(limit_bytes)
    try:
        yield group
    finally:
        group.remove()


def run_capped(
    argv: Sequence[str], limit_bytes: int, *, env: Mapping[str, str] | None = None, timeout_s: float
) -> CappedRun:
    """Run `argv` with at most `limit_bytes` of memory and page cache, and measure it.

    A command that outlives `timeout_s` is killed; `subprocess.TimeoutExpired` carries what it had printed.
    """
    with memory_group(limit_bytes) as group, tempfile.TemporaryDirectory(prefix="tiercache-run-") as folder:
        report, out, err = (Path(folder) / name for name in ("report", "stdout", "stderr"))
        started_s = time.monotonic()
        with out.open("wb") as out_file, err.open("wb") as err_file:
            launcher = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", LAUNCHER, str(group.members), str(report), *argv],
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                env=env,
                start_new_session=True,
            )
        in_time = _wait(launcher, timeout_s)
        wall_s = time.monotonic() - started_s
        stdout, stderr = (path.read_bytes().decode(errors="replace") for path in (out, err))
        if not in_time:
            raise subprocess.TimeoutExpired(list(argv), timeout_s, stdout, stderr)
        if not group.peak_bytes():  # whoever joins is charged for at least a page
            raise EnvironmentUnsupportedError(f"Could not join {group.path}: {stderr.strip()}. Run as root.")
        returncode, max_rss_bytes, disk_read_bytes = json.loads(report.read_text())
        return CappedRun(
            returncode=returncode,
            stdout=stdout,
            stderr=stderr,
            wall_s=wall_s,
            max_rss_bytes=max_rss_bytes,
            cgroup_peak_bytes=group.peak_bytes(),
            disk_read_bytes=disk_read_bytes,
            oom_killed=group.oom_kills() > 0,
        )


def drop_caches(path: Path) -> None:
    """Evict a file, or every file below a folder, from the page cache, so that the next reader starts cold.

    Dirty pages cannot be evicted, hence the sync before. Pages that a running process maps stay.
    """
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _wait(launcher: subprocess.Popen[bytes], timeout_s: float) -> bool:
    """Wait for the launcher; when it is late, or the wait is interrupted, kill its whole process group."""
    descriptor = os.pidfd_open(launcher.pid)
    in_time = False
    try:
        in_time = bool(select.select([descriptor], [], [], timeout_s)[0])
    finally:
        os.close(descriptor)
        if not in_time:
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    return in_time


def _first_possible_group(limit_bytes: int) -> MemoryGroup:
    refusals: list[str] = []
    for parent, backend in _parents():
        group = MemoryGroup(parent / f"tiercache-{os.getpid()}-{uuid.uuid4().hex[:8]}", backend)
        try:
            group.path.mkdir()
            group.set_limit(limit_bytes)
            group.peak_bytes()  # memory.peak came with Linux 5.19
        except OSError as error:
            refusals.append(str(error))
            with suppress(OSError):
                group.path.rmdir()
        else:
            return group
    raise EnvironmentUnsupportedError(
        f"No memory cgroup can be made here to cap a run at {limit_bytes} bytes "
        f"({'; '.join(refusals) or 'the memory controller is neither mounted nor delegated'}). "
        "Run as root, or in a session that may use one: systemd-run --user --scope."
    )


def _parents() -> Iterator[tuple[Path, _Dialect]]:
    """Folders in which a memory group may be made, the likeliest first."""
    for line in MOUNTS.read_text().splitlines():
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup" and "memory" in options.split(","):
            yield Path(mount), _V1
        elif kind == "cgroup2":
            yield from ((parent, _V2) for parent in _delegating_parents(Path(mount)))


def _delegating_parents(mount: Path) -> Iterator[Path]:
    """On v2, the groups from our own up to the root whose children get the memory controller."""
    own = next((line[3:] for line in OWN_GROUPS.read_text().splitlines() if line.startswith("0::")), "/")
    folder = mount / own.lstrip("/")
    for parent in (folder, *folder.parents):
        control = parent / "cgroup.subtree_control"
        if control.is_file() and "memory" in control.read_text().split():
            yield parent
        if parent == mount:
            return
