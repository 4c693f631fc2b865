"""What memory this machine has, and what a control group leaves of it; read from the system, not measured."""

from dataclasses import dataclass
from pathlib import Path

import psutil

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class HostMemory:
    """Main memory as this process may use it.

    Attributes:
        total_bytes: of the machine, or of the tightest control group around this process.
        free_bytes: not in use, what the page cache would give back included.
        limited: a control group sets the total.
    """

    total_bytes: int
    free_bytes: int
    limited: bool


def host_memory() -> HostMemory:
    """Main memory now."""
    machine = psutil.virtual_memory()
    total, free, limited = machine.total, machine.available, False
    for limit, usage in _groups():
        if limit < total:
            total, limited = limit, True
        free = min(free, max(0, limit - usage))
    return HostMemory(total, free, limited)


def _groups() -> list[tuple[int, int]]:
    """Limit and usage (page cache that can go left out) of every memory group around this process, v1 and v2."""
    found = []
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        base = _CGROUP / "memory" if controllers else _CGROUP
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        for folder in [base / place.lstrip("/"), *(base / place.lstrip("/")).parents]:
            limit, usage = (_text(folder / name).strip() for name in names)
            if limit.isdigit() and usage.isdigit():
                found.append((int(limit), int(usage) - _reclaimable(folder)))
            if folder == base:
                break
    return found


def _reclaimable(folder: Path) -> int:
    rows = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
    value = rows.get("total_inactive_file", rows.get("inactive_file", "0"))
    return int(value) if value.isdigit() else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
