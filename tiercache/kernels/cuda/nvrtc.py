"""CUDA source to machine code at run time: finds NVRTC, compiles for one card, keeps the result on disk.

Knows files and compilers; nothing of tensors, nor of the driver that runs the code. CUDA C reaches back to cards that
Triton and prebuilt wheels have left behind, and a compiler at run time makes one source serve them all.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from tiercache.config import environment
from tiercache.config.cache_folder import made_folder
from tiercache.config.environment import home_folder
from tiercache.errors import EnvironmentUnsupportedError

_HEADERS = ("planes.cuh", "products.cuh", "staged.cuh", "numbers.cuh", "attention.cuh", "down.cuh", "units.cuh")
_BY_GROUP = (
    "mma",
    "dots",
    "down",
    "downs",
    "downmma",
)  # compiled group by group: a store has one as a rule, and each takes seconds
_NAMES = ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


@dataclass(frozen=True)
class SourceUnit:
    """What is compiled at once: a file of `source`, for one number of planes (0: of any) and one group (0: of any).

    In attention.cu the number of planes stands for a dtype.
    """

    file: str
    planes: int = 0
    group: int = 0

    @staticmethod
    def of(kernel: str) -> SourceUnit:
        """The unit that holds the kernel of that name.

        `rows_2_4_4` is in rows.cu, for two planes; `mma_2_1_64` in mma.cu, for two planes in groups of 64;
        `layer_enter` in layer.cu.
        """
        file, *numbers = kernel.split("_")
        if not numbers:
            return SourceUnit("common.cu")
        planes = int(numbers[0]) if numbers[0].isdigit() else 0
        return SourceUnit(f"{file}.cu", planes, int(numbers[2]) if file in _BY_GROUP else 0)


def every_unit(by_matrix_units: bool) -> list[SourceUnit]:
    """All that a card may ask for: one whose matrix units take bytes (capability 8.0 on), or an older one."""
    others = ("mma", "dots", "downmma") if by_matrix_units else ("decode", "rows", "down", "downs")
    planes, groups = (1, 2, 3), (32, 64, 128)
    found = [SourceUnit("common.cu"), SourceUnit("layer.cu")]
    for name in ("attention", *others):
        by_group = groups if name in _BY_GROUP else (0,)
        found += [SourceUnit(f"{name}.cu", count, group) for count in planes for group in by_group]
    return found


def source(file: str) -> bytes:
    """A file of `source`."""
    return (resources.files("tiercache.kernels.cuda") / "source" / file).read_bytes()


class Nvrtc:
    """One copy of the compiler library.

    Args:
        path: where it lies, or a name for the system's loader.

    Raises:
        OSError: it cannot be loaded.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p

    @cached_property
    def version(self) -> tuple[int, int]:
        """Major and minor."""
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "")
        return major.value, minor.value

    @cached_property
    def architectures(self) -> tuple[int, ...]:
        """What it compiles for, in ascending order: 52 is compute capability 5.2."""
        count = ctypes.c_int()
        self._check(self._library.nvrtcGetNumSupportedArchs(ctypes.byref(count)), "")
        found = (ctypes.c_int * count.value)()
        self._check(self._library.nvrtcGetSupportedArchs(found), "")
        return tuple(sorted(found))

    def target(self, capability: tuple[int, int]) -> str | None:
        """What to compile for: the card itself, or for one newer than this compiler, what its driver can translate."""
        wanted = 10 * capability[0] + capability[1]
        if wanted in self.architectures:
            return f"sm_{wanted}"
        return f"compute_{self.architectures[-1]}" if wanted > self.architectures[-1] else None

    def compile(self, unit: SourceUnit, target: str) -> bytes:
        """The machine code (for `sm_..`) or PTX (`compute_..`) of a unit.

        Raises:
            EnvironmentUnsupportedError: the compiler refuses, with what it said.
        """
        program = ctypes.c_void_p()
        headers = (ctypes.c_char_p * len(_HEADERS))(*(source(name) for name in _HEADERS))
        names = (ctypes.c_char_p * len(_HEADERS))(*(name.encode() for name in _HEADERS))
        create = self._library.nvrtcCreateProgram
        text, file = source(unit.file), unit.file.encode()
        self._check(create(ctypes.byref(program), text, file, len(_HEADERS), headers, names), unit.file)
        try:
            options = [option.encode() for option in _options(unit, target)]
            code = self._library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
            if code:
                log = self._text(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
                self._check(code, f"{unit.file} for {target}:\n{log}")
            return self._text(program, "CUBIN" if target.startswith("sm_") else "PTX")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer), what)
        return buffer.raw

    def _check(self, code: int, doing: str) -> None:
        if code:
            said = self._library.nvrtcGetErrorString(code).decode()
            raise EnvironmentUnsupportedError(
                f"{self.path} says {said} {doing}\ninstall another: pip install nvidia-cuda-nvrtc-cu12"
            )


def _options(unit: SourceUnit, target: str) -> list[str]:
    planes = [f"-DPLANES={unit.planes}"] if unit.planes else []
    group = [f"-DONLY_GROUP={unit.group}"] if unit.group else []
    return [f"--gpu-architecture={target}", "--std=c++17", *planes, *group]


def library_paths() -> list[Path | str]:
    """Where NVRTC may lie, in the order they are tried: torch's own, NVIDIA's wheels, the system's."""
    found: list[Path | str] = []
    for package, pattern in (("torch", "lib/libnvrtc*.so*"), ("nvidia", "*/lib/libnvrtc*.so*")):
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            # not the compiler's own parts, nor the second copy with another allocator
            paths = (path for path in Path(folder).glob(pattern) if not {"builtins", "alt"} & _parts(path))
            found += sorted(paths, reverse=True)
    homes = [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := environment.value(name))]
    return [*found, *(Path(home) / "lib64" / "libnvrtc.so" for home in homes), *_NAMES]


def _parts(path: Path) -> set[str]:
    return set(path.name.replace("-", ".").split("."))


def compilers() -> list[Nvrtc]:
    """Every NVRTC that loads, best first."""
    found = []
    for candidate in library_paths():
        try:
            found.append(Nvrtc(candidate))
        except OSError:  # not there, or not for this machine
            continue
    return found


def compiler_for(capability: tuple[int, int], among: Sequence[Nvrtc]) -> tuple[Nvrtc, str]:
    """The first compiler that serves a card, and what it is to compile for.

    Raises:
        EnvironmentUnsupportedError: none does.
    """
    card = f"{capability[0]}.{capability[1]}"
    exact = [(each, target) for each in among if (target := each.target(capability)) and target.startswith("sm_")]
    newer = [(each, target) for each in among if (target := each.target(capability))]
    if exact or newer:
        return (exact or newer)[0]
    have = ", ".join(f"{'.'.join(map(str, each.version))} (from {each.architectures[0] / 10})" for each in among)
    raise EnvironmentUnsupportedError(
        f"no NVRTC for compute capability {card}: found {have or 'none'}; CUDA 13 has dropped cards before 7.5. "
        "Install one of CUDA 12, pip install nvidia-cuda-nvrtc-cu12, "
        "beside a torch built for CUDA 12.6 (the last whose own kernels reach back to 5.0)"
    )


def cache_folder() -> Path:
    """Where compiled code is kept."""
    return home_folder() / "kernels"


def image(unit: SourceUnit, compiler: Nvrtc, target: str, folder: Path) -> bytes:
    """The compiled unit, from `folder` if it was compiled before; made there for the next time if not.

    Processes that come at the same time compile twice and both leave a whole file: it is written aside and moved.

    Raises:
        EnvironmentUnsupportedError: it does not compile, or the folder cannot be written to.
    """
    parts = [source(name) for name in (unit.file, *_HEADERS)]
    parts += [" ".join(_options(unit, target)).encode(), repr(compiler.version).encode()]
    digest = hashlib.sha256(b"\0".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()
    path = folder / f"{Path(unit.file).stem}-{unit.planes}-{unit.group}-{target}-{digest[:16]}.bin"
    try:
        return path.read_bytes()
    except FileNotFoundError:
        code = compiler.compile(unit, target)
    except OSError as error:
        raise EnvironmentUnsupportedError(f"{path} cannot be read ({error}); set TIERCACHE_HOME elsewhere") from error
    try:
        made_folder(folder)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=path.name, delete=False) as aside:
            aside.write(code)
        Path(aside.name).replace(path)
    except OSError as error:
        raise EnvironmentUnsupportedError(
            f"{folder} cannot be written ({error}); set TIERCACHE_HOME elsewhere"
        ) from error
    return code
