"""Compiles the CPU kernels for the instruction set at hand, once: the library is kept under the hash of its source.

Knows compilers, flags and files; nothing of what the kernels do.
"""

import hashlib
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from tiercache.config import environment
from tiercache.config.cache_folder import made_folder
from tiercache.config.environment import home_folder
from tiercache.errors import EnvironmentUnsupportedError, UsageError

SOURCE = Path(__file__).with_name("source")
_MAIN = SOURCE / "planes.c"

# Instruction sets, best first: the flags that /proc/cpuinfo must name, and what the compiler is told.
ISAS: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "avx512vnni": (
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "f16c"}),
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mf16c", "-mprefer-vector-width=512"),
    ),
    "avx2": (frozenset({"avx2", "f16c"}), ("-mavx2", "-mf16c")),
    "portable": (frozenset(), ()),
}
# No fused multiply-add: every instruction set gives the same bits.
_FLAGS: tuple[str, ...] = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-fvisibility=hidden")
_FLAGS += ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_TIMEOUT_S = 300.0


def instruction_sets() -> tuple[str, ...]:
    """What this processor runs, best first."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    has = {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}
    return tuple(name for name, (needs, _) in ISAS.items() if needs <= has)


def compiler() -> list[str] | None:
    """The C compiler: `CC` if set, else the first of cc, gcc, clang on the path; None if there is none."""
    try:
        named = shlex.split(environment.value("CC") or "")
    except ValueError:  # a quote that nobody closes
        return None
    for command in [named] if named else [["cc"], ["gcc"], ["clang"]]:
        if shutil.which(command[0]):
            return command
    return None


def is_built(isa: str) -> bool:
    """Whether the library of `isa` is there already."""
    return _path(isa).is_file()


def library(isa: str) -> Path:
    """The compiled library of `isa`; compiles it if it is not there.

    Two processes may do so at once: each writes a file of its own and moves it into place whole.

    Raises:
        UsageError: no such instruction set.
        EnvironmentUnsupportedError: there is no compiler, or it fails.
    """
    if isa not in ISAS:
        raise UsageError(f"unknown instruction set {isa!r}; there are {', '.join(ISAS)}")
    path = _path(isa)
    if path.is_file():
        return path
    command = compiler()
    if command is None:
        named = environment.value("CC")
        lack = f", and CC={named!r} is not there; unset it, or" if named else ";"
        raise EnvironmentUnsupportedError(f"the kernels need a C compiler{lack} install gcc, then run this again")
    _compile(command, isa, path)
    return path


def _compile(command: list[str], isa: str, path: Path) -> None:
    try:
        made_folder(path.parent)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".compiling-") as folder:
            made = Path(folder) / path.name
            arguments = [*command, *_FLAGS, *ISAS[isa][1], str(_MAIN), "-o", str(made), "-lm"]
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
            if done.returncode:
                raise EnvironmentUnsupportedError(
                    f"{shlex.join(command)} cannot compile the kernels for {isa}: {done.stderr.strip()[-400:]}; "
                    "install gcc 9 or newer, or name another compiler in CC"
                )
            made.replace(path)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentUnsupportedError(
            f"the kernels cannot be compiled into {path.parent} ({error}); set TIERCACHE_HOME to a folder that can be "
            "written"
        ) from error


def _digest(isa: str) -> str:
    """Of everything that decides what the library does."""
    text = hashlib.sha256(repr((_FLAGS, ISAS[isa][1], platform.machine())).encode())
    for file in sorted(SOURCE.iterdir()):
        text.update(file.name.encode() + b"\0" + file.read_bytes())
    return text.hexdigest()[:16]


def _path(isa: str) -> Path:
    return home_folder() / "kernels" / f"planes-{_digest(isa)}-{isa}.so"
