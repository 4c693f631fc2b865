"""Looks at what tiercache stands on and says what will not work, what will be slow, and what to do about it.

Changes nothing, but for a probe file that it writes beside the store and removes again. Every probe expects that what
it looks at may be absent: containers, virtual machines and macOS lack much of it.
"""

import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import psutil
from rich.markup import escape
from rich.table import Table

from profiler import hardware, probe
from tiercache import __version__
from tiercache.config import human

State = Literal["ok", "warn", "fail"]
Probe = Callable[[Path], Iterable["Check"]]

SCHEMA = "tiercache.doctor/1"
# pyproject.toml's ranges, from the first that will do to the first that will not; a test compares them.
RANGES = {"torch": ((2, 6), (3,)), "transformers": ((5, 5), (6,))}
PYTHON_FLOOR = (3, 11)
# torch 2.15 dropped the last builds with code for Maxwell, Pascal and Volta.
LEGACY_INSTALL = 'pip install "torch<2.15" --index-url <the cu126 index named on pytorch\'s install page>'
_LEGACY_BELOW = (7, 5)
_PINNED_SAMPLE_BYTES = 256 << 20
_LITTLE_DISK_BYTES = 10 << 30
_PROBE_DISK_BYTES = 1 << 30
_READ_SAMPLE_BYTES = 64 << 20
_SLOW_DISK_GBPS = 0.3
_LITTLE_MEMORY_BYTES = 2 << 30
_NETWORK = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "glusterfs", "afs", "fuse.sshfs", "fuse.s3fs", "virtiofs")
_MEMORY = ("tmpfs", "ramfs")
_X86 = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16")
_ARM = ("asimd", "asimddp", "i8mm", "sve")


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        state: "fail" where something will not work, "warn" where it will be slow or risky.
        value: what was found.
        advice: what to do; empty when there is nothing to.
    """

    name: str
    state: State
    value: str
    advice: str = ""


@dataclass(frozen=True)
class Link:
    """A GPU's PCIe link: generation and lanes, now and at most; 0 where the driver does not say."""

    name: str
    generation: int
    max_generation: int
    width: int
    max_width: int


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


def _module(name: str) -> Any | None:
    """A module that may be missing or broken, which is then a finding and no reason to stop."""
    try:
        return import_module(name)
    except Exception:
        return None


def _python(folder: Path) -> list[Check]:
    good = sys.version_info >= PYTHON_FLOOR
    advice = "" if good else f"install Python {_dotted(PYTHON_FLOOR)} or newer"
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
    return f"{name}>={_dotted(floor)},<{_dotted(ceiling)}"


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def _dotted(numbers: Sequence[int]) -> str:
    return ".".join(str(number) for number in numbers)


def _gpu(folder: Path) -> list[Check]:
    torch = _module("torch")
    if torch is None:
        return []  # said already
    with warnings.catch_warnings():  # torch warns of an old card in its own words
        warnings.simplefilter("ignore")
        if not torch.cuda.is_available():
            return [unusable(_driver_gpus(), torch.__version__, torch.version.cuda)]
        archs = torch.cuda.get_arch_list()
        devices = range(torch.cuda.device_count())
        return [
            architecture(torch.cuda.get_device_name(n), torch.cuda.get_device_capability(n), archs) for n in devices
        ]


def unusable(seen: Sequence[str], torch_version: str, cuda: str | None) -> Check:
    """What it means that torch can use no GPU, given those that the driver shows."""
    if not seen:
        return Check("gpu", "ok", "none: CPU only")
    if cuda is None:
        return Check(
            "gpu",
            "fail",
            f"{', '.join(seen)}; but torch {torch_version} is built without CUDA",
            f"install a torch with CUDA; for Maxwell, Pascal and Volta: {LEGACY_INSTALL}",
        )
    return Check(
        "gpu",
        "fail",
        f"{', '.join(seen)}; but torch {torch_version} (CUDA {cuda}) cannot use it",
        "update the NVIDIA driver to one for that CUDA ('nvidia-smi' says which it has), or install a torch for an "
        "older CUDA; see also that CUDA_VISIBLE_DEVICES does not hide the card",
    )


def architecture(name: str, capability: tuple[int, int], archs: Sequence[str]) -> Check:
    """Whether this torch has code that the GPU can run."""
    label = f"{name}, compute capability {_dotted(capability)}"
    if runs_on(capability, archs):
        return Check("gpu", "ok", label)
    legacy = capability < _LEGACY_BELOW
    advice = LEGACY_INSTALL if legacy else "install a torch that is built for this card, from pytorch's install page"
    return Check("gpu", "fail", f"{label}; torch has code for {', '.join(archs) or 'no GPU'} only", advice)


def runs_on(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Whether code of one of `archs` runs: binaries (sm_XY) on the same major version, PTX (compute_XY) on any later.

    >>> runs_on((6, 1), ["sm_50", "sm_60"]), runs_on((6, 1), ["sm_75", "sm_80"])
    (True, False)
    """
    for kind, major, minor, suffix in re.findall(r"(sm|compute)_(\d+)(\d)([a-z]?)", " ".join(archs)):
        built = (int(major), int(minor))
        same_family = kind == "compute" or built[0] == capability[0]
        exactly = suffix == "a"  # code for that chip alone
        if built == capability if exactly else built <= capability and same_family:
            return True
    return False


def _driver_gpus() -> list[str]:
    """Names of the GPUs that the driver shows, whatever torch can do."""
    if names := [link.name for link in _links()]:
        return names
    files = Path("/proc/driver/nvidia/gpus").glob("*/information")
    found = (re.search(r"Model:\s*(.+)", _text(path)) for path in sorted(files))
    return [match[1] if match else "an NVIDIA GPU" for match in found]


def _pcie(folder: Path) -> list[Check]:
    return [link_check(link) for link in _links()]


def link_check(link: Link) -> Check:
    """Fewer lanes than the card has cost bandwidth for good; a lower generation is how a card saves power at rest."""
    if not link.max_width:
        return Check("pcie", "ok", f"{link.name}: the driver does not say")
    found = f"{link.name}: gen {link.generation} x{link.width} now, gen {link.max_generation} x{link.max_width} at most"
    if link.width < link.max_width:
        return Check("pcie", "warn", found, "weights stream slower: use a slot with all lanes, and check the riser")
    resting = link.generation < link.max_generation
    return Check("pcie", "ok", found, "a card at rest lowers the generation; look again under load" if resting else "")


def _links() -> list[Link]:
    nvml = _module("pynvml")
    if nvml is None:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver
        return []
    try:
        return [_link(nvml, nvml.nvmlDeviceGetHandleByIndex(n)) for n in range(nvml.nvmlDeviceGetCount())]
    finally:
        nvml.nvmlShutdown()


def _link(nvml: Any, device: Any) -> Link:
    def ask(name: str) -> int:
        try:
            return int(getattr(nvml, f"nvmlDeviceGet{name}")(device))
        except nvml.NVMLError:  # virtual machines hide it
            return 0

    generations = ask("CurrPcieLinkGeneration"), ask("MaxPcieLinkGeneration")
    return Link(str(nvml.nvmlDeviceGetName(device)), *generations, ask("CurrPcieLinkWidth"), ask("MaxPcieLinkWidth"))


def _pinned_memory(folder: Path) -> list[Check]:
    """Whether memory can be pinned; tried, since the driver need not keep to the limit that the shell shows."""
    limit = f"memlock {_memlock()}"
    torch = _module("torch")
    if torch is None or not torch.cuda.is_available():
        return [Check("pinned memory", "ok", f"{limit}; without a GPU nothing is pinned")]
    size = human(_PINNED_SAMPLE_BYTES)
    try:
        torch.empty(_PINNED_SAMPLE_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        advice = "raise the limit: 'ulimit -l unlimited', or --ulimit memlock=-1 for a container"
        return [Check("pinned memory", "fail", f"{size} could not be pinned ({reason}); {limit}", advice)]
    return [Check("pinned memory", "ok", f"{size} pinned; {limit}")]


def _memlock() -> str:
    try:
        import resource  # absent on Windows
    except ImportError:
        return "unknown"
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else human(soft)


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
    memory = hardware.memory()
    found = f"{human(memory.free_bytes)} free of {human(memory.total_bytes)}"
    found += ", as a control group limits it" if memory.limited else ""
    little = memory.free_bytes < _LITTLE_MEMORY_BYTES
    advice = "close other programs" + (", or raise the control group's limit" if memory.limited else "")
    return [Check("main memory", "warn" if little else "ok", found, advice if little else "")]


def _processor(folder: Path) -> list[Check]:
    text = _text(Path("/proc/cpuinfo"))
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", text, re.MULTILINE)
    has = set(flags[1].split()) if flags else set()
    features = " ".join(name for name in (*_X86, *_ARM) if name in has) or "vector features unknown"
    name = model[1] if model else platform.processor() or platform.machine()
    return [Check("processor", "ok", f"{name}, {os.cpu_count()} threads: {features}")]


def _compiler(folder: Path) -> list[Check]:
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if found is None:
        return [Check("compiler", "warn", "none", "the slower built-in kernels are used; for faster ones install gcc")]
    return [Check("compiler", "ok", found)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


PROBES: tuple[Probe, ...] = (
    _python,
    _libraries,
    _gpu,
    _pcie,
    _pinned_memory,
    _main_memory,
    _processor,
    _compiler,
    _file_system,
    _disk_space,
    _disk_reads,
)
