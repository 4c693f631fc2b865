"""The environment: every variable that tiercache heeds, with its meaning; no other file of it asks for one.

An empty value counts as unset. docs/environment.md has the same variables in its table.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from tiercache.errors import EnvironmentUnsupportedError, UsageError

# Read here.
OWN = (
    "TIERCACHE_HOME",  # the cache folder
    "XDG_CACHE_HOME",  # where it is otherwise
    "TIERCACHE_API_KEY",  # what clients of `tiercache serve` must show
    "TIERCACHE_CUDA_GRAPHS",  # 0: halves of layers are launched kernel by kernel
    "CUBLAS_WORKSPACE_CONFIG",  # how much of a card torch gives cuBLAS
    "CC",  # the C compiler of the CPU's kernels
    "CUDA_HOME",  # where NVRTC may lie
    "CUDA_PATH",
    "OMP_WAIT_POLICY",  # what a probe measured holds for one way of waiting only
)
# Read by the libraries below, whose doing it is; named here since it shows in what tiercache does.
OF_LIBRARIES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HF_HUB_OFFLINE",
    "HF_TOKEN",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "NO_COLOR",
    "FORCE_COLOR",
    "COLUMNS",
)
SECRET = ("TIERCACHE_API_KEY", "HF_TOKEN")


def value(name: str) -> str | None:
    """What a variable of `OWN` holds; None where it is unset or empty."""
    if name not in OWN:
        raise ValueError(f"{name} is not in tiercache.config.environment.OWN")
    return os.environ.get(name) or None


def shown() -> dict[str, str]:
    """The variables of both lists that are set, for people; secrets are not told."""
    found = {name: os.environ.get(name, "") for name in (*OWN, *OF_LIBRARIES)}
    return {name: "(secret)" if name in SECRET else each for name, each in found.items() if each}


def wants_cuda_graphs() -> bool:
    """Whether TIERCACHE_CUDA_GRAPHS leaves CUDA graphs on.

    Raises:
        UsageError: it is neither 0 nor 1.
    """
    asked = value("TIERCACHE_CUDA_GRAPHS") or "1"
    if asked not in ("0", "1"):
        raise UsageError(f"TIERCACHE_CUDA_GRAPHS is {asked!r}; set it to 0 for none, or to 1")
    return asked == "1"


def home_folder() -> Path:
    """The cache folder: $TIERCACHE_HOME, or tiercache in $XDG_CACHE_HOME or ~/.cache. It may not exist yet.

    Raises:
        UsageError: the variable's path is relative.
        EnvironmentUnsupportedError: it starts with ~, and this user has no home folder.
    """
    if (named := value("TIERCACHE_HOME")) is not None:
        return _absolute("TIERCACHE_HOME", named)
    return _absolute("XDG_CACHE_HOME", value("XDG_CACHE_HOME") or "~/.cache") / "tiercache"


def _absolute(name: str, given: str) -> Path:
    try:
        path = Path(given).expanduser()
    except RuntimeError as error:
        raise EnvironmentUnsupportedError(
            f"{given} cannot be found ({error}); set TIERCACHE_HOME to a folder that can be written"
        ) from error
    if not path.is_absolute():
        raise UsageError(
            f"{name}={given!r} is a relative path, which means another folder wherever tiercache is started; give an "
            "absolute one"
        )
    return path


@contextmanager
def replaced(values: Mapping[str, str]) -> Iterator[None]:
    """Set some variables; at the end these alone are as before, for what ran meanwhile may have set others."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, old in before.items():
            if old is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = old
