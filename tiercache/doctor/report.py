"""Looks at what tiercache stands on and says what will not work, what will be slow, and what to do about it.

Changes nothing, but for a probe file that it writes beside the store and removes again. Every probe expects that what
it looks at may be absent: containers, virtual machines and macOS lack much of it.
"""

import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
from rich.markup import escape
from rich.table import Table

from profiler import probe
from profiler.host_memory import host_memory
from profiler.processor import processor_name
from tiercache import __version__
from tiercache.config import environment
from tiercache.config.sizes import human
from tiercache.doctor import gpu
from tiercache.doctor.checks import Check, Probe, dotted, module, text_of
from tiercache.errors import TiercacheError

SCHEMA = "tiercache.doctor/1"
# pyproject.toml's ranges, from the first that will do to the first that will not; a test compares them.
RANGES = {"torch": ((2, 6), (3,)), "transformers": ((5, 5), (6,))}
PYTHON_FLOOR = (3, 11)
_LITTLE_DISK_BYTES = 10 << 30
_PROBE_DISK_BYTES = 1 << 30
_READ_SAMPLE_BYTES = 64 << 20
_SLOW_DISK_GBPS = 0.3
_LITTLE_MEMORY_BYTES = 2 << 30
_NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "glusterfs", "afs", "fuse.sshfs", "fuse.s3fs", "virtiofs")
_MEMORY = ("tmpfs", "ramfs")
_X86 = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
_ARM = ("asimd", "asimddp", "i8mm", "sve")


def diagnose(store_folder: Path | None = None) -> list[Check]:
    """Run every probe.

    Args:
        store_folder: where stores are, or will be; by default the current folder.
    """
    folder = _existing((store_folder or Path.cwd()).expanduser().absolute())
    return [check for look in PROBES for check in _survive(look, folder)]


def works(checks: Sequence[Check]) -> bool:
    """Whether nothing failed."""
    return all(check.state != "fail" for check in checks)


def to_dict(checks: Sequence[Check]) -> dict[str, Any]:
    """Plain data, with the schema's version."""
    rows = [asdict(check) for check in checks]
    return {"schema": SCHEMA, "tiercache": __version__, "ok": works(checks), "checks": rows}


def table(checks: Sequence[Check]) -> Table:
    """What a person reads."""
    shown = Table(title=f"tiercache {__version__}", title_justify="left")
    for heading in ("check", "", "found", "what to do"):
        shown.add_column(heading, overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "fail": "bold red"}
    for check in checks:
        state = f"[{colours[check.state]}]{check.state}[/]"
        shown.add_row(escape(check.name), state, escape(check.value), escape(check.advice))
    return shown


def _survive(look: Probe, folder: Path) -> list[Check]:
    """A probe's findings; one that breaks is a finding too, and hides no other."""
    try:
        return list(look(folder))
    except Exception as error:
        name = look.__name__.strip("_").replace("_", " ")
        return [Check(name, "warn", f"could not look: {error!r}", "report this: the fault is the probe's own")]


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _python(folder: Path) -> list[Check]:
    good = sys.version_info >= PYTHON_FLOOR
    advice = "" if good else f"install Python {dotted(PYTHON_FLOOR)} or newer"
    return [Check("python", "ok" if good else "fail", f"{platform.python_version()} on {platform.platform()}", advice)]


def _libraries(folder: Path) -> list[Check]:
    return [_library(name) for name in RANGES]


def _library(name: str) -> Check:
    try:
        version = str(import_module(name).__version__)
    except Exception as error:  # a broken library raises anything: OSError for a missing .so, RuntimeError, ...
        return Check(name, "fail", f"cannot be imported: {error!r}", f"pip install {requirement(name)!r}")
    return version_check(name, version)


def version_check(name: str, version: str) -> Check:
    """Whether a library's version is one that tiercache is made for."""
    floor, ceiling = RANGES[name]
    if floor <= _numbers(version) < ceiling:
        return Check(name, "ok", version)
    return Check(name, "fail", f"{version}, supported is {requirement(name)}", f"pip install {requirement(name)!r}")


def requirement(name: str) -> str:
    """The supported range, as pip reads it."""
    floor, ceiling = RANGES[name]
    return f"{name}>={dotted(floor)},<{dotted(ceiling)}"


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _disk_space(folder: Path) -> list[Check]:
    free = shutil.disk_usage(folder).free
    little = free < _LITTLE_DISK_BYTES
    advice = "a store takes about 1.1 bytes per weight: 8 GB for a 7B model, 75 GB for a 70B" if little else ""
    return [Check("disk space", "warn" if little else "ok", f"{human(free)} free at {folder}", advice)]


def _file_system(folder: Path) -> list[Check]:
    resolved = folder.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if resolved.is_relative_to(mount.mountpoint)]
    kinds = [mount.fstype for mount in sorted(mounts, key=lambda mount: len(Path(mount.mountpoint).parts))]
    return [file_system_check(kinds[-1] if kinds else "", folder)]


def file_system_check(kind: str, folder: Path) -> Check:
    """Whether a file system is a local disk's."""
    if kind.startswith(_NETWORK):
        advice = "keep stores on a local disk: every token may read gigabytes"
        return Check("file system", "warn", f"{kind} at {folder}: another machine's", advice)
    if kind in _MEMORY:
        advice = "keep stores on a disk: here they take the memory that the tiers need"
        return Check("file system", "warn", f"{kind} at {folder}: main memory", advice)
    return Check("file system", "ok", f"{kind or 'unknown'} at {folder}")


def _disk_reads(folder: Path) -> list[Check]:
    if shutil.disk_usage(folder).free < _PROBE_DISK_BYTES:
        return [Check("disk reads", "warn", "not measured: the disk is nearly full", "free some space")]
    try:
        roof = probe.folder_read(folder, sample_bytes=_READ_SAMPLE_BYTES)
    except OSError as error:
        advice = "name a folder that can be written, with --store"
        return [Check("disk reads", "warn", f"not measured at {folder}: {error.strerror}", advice)]
    return [reads_check(roof)]


def reads_check(roof: probe.ReadRoof) -> Check:
    """Whether weights can stream from a disk: at a useful rate, and past the page cache."""
    if roof.direct and roof.gbps < _SLOW_DISK_GBPS:
        advice = "what does not fit in memory streams at this rate on every token: use an SSD, or spare this one"
        return Check("disk reads", "warn", f"{roof.gbps:.2f} GB/s, direct", advice)
    if roof.direct:
        return Check("disk reads", "ok", f"{roof.gbps:.2f} GB/s, direct")
    advice = "this file system has no direct I/O, so that reads pass through the page cache: use ext4 or xfs"
    return Check("disk reads", "warn", f"{roof.gbps:.2f} GB/s, not direct", advice)


def _main_memory(folder: Path) -> list[Check]:
    memory = host_memory()
    found = f"{human(memory.free_bytes)} free of {human(memory.total_bytes)}"
    found += ", as a control group limits it" if memory.limited else ""
    little = memory.free_bytes < _LITTLE_MEMORY_BYTES
    advice = "close other programs" + (", or raise the control group's limit" if memory.limited else "")
    return [Check("main memory", "warn" if little else "ok", found, advice if little else "")]


def _processor(folder: Path) -> list[Check]:
    text = text_of(Path("/proc/cpuinfo"))
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    features = " ".join(name for name in (*_X86, *_ARM) if name in has) or "vector features unknown"
    return [Check("processor", "ok", f"{processor_name()}, {os.cpu_count()} threads: {features}")]


def _environment(folder: Path) -> list[Check]:
    """The variables that are set, and the cache folder that they give."""
    told = ", ".join(f"{name}={value}" for name, value in environment.shown().items()) or "no variable is set"
    try:
        home = environment.home_folder()
    except TiercacheError as error:
        return [Check("environment", "ok", told), Check("cache folder", "fail", str(error), "set TIERCACHE_HOME")]
    good = os.access(_existing(home), os.W_OK)
    advice = "" if good else "set TIERCACHE_HOME to a folder that can be written: kernels and stores are kept there"
    found = str(home) if good else f"{home} cannot be written"
    return [Check("environment", "ok", told), Check("cache folder", "ok" if good else "warn", found, advice)]


def _compiler(folder: Path) -> list[Check]:
    from tiercache.kernels.cpu import build

    named, found = environment.value("CC"), build.compiler()
    if found is None:
        lack = f"CC names {named!r}, which is not there" if named else "none"
        cure = "unset CC" if named else "install gcc"
        return [Check("compiler", "warn", lack, f"without one planes are decoded before each product: {cure}")]
    return [Check("compiler", "ok", shutil.which(found[0]) or found[0])]


def _kernels(folder: Path) -> list[Check]:
    """Which backend multiplies planes, on the processor and on the GPU if torch can use one."""
    torch = module("torch")
    if torch is None:
        return []  # said already
    from tiercache.kernels.select import describe  # needs torch, whose absence is a finding

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [kernels_check(device, *describe(torch.device(device))) for device in devices]


def kernels_check(device: str, fast: bool, text: str) -> Check:
    """Whether products of planes are fast on a device; slow ones are right as well."""
    if fast:
        return Check("kernels", "ok", f"{device}: {text}")
    cure = "install gcc (or another C compiler: cc, clang), or name one in CC"
    advice = cure if device == "cpu" else "see the gpu row; what is missing is told here"
    return Check("kernels", "warn", f"{device}: {text}", advice)


PROBES: tuple[Probe, ...] = (
    _python,
    _libraries,
    gpu.gpu,
    gpu.pcie,
    gpu.pinned_memory,
    _main_memory,
    _processor,
    _environment,
    _compiler,
    _kernels,
    _file_system,
    _disk_space,
    _disk_reads,
)
