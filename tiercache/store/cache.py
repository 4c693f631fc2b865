"""What lies in the cache folder, by kind, and how it goes: nothing in use, and nothing that tiercache did not make.

An entry is known by what is in it and not by its name alone, for the folder may be one that holds other things as well.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from tiercache.config.cache_folder import TAG_FILE
from tiercache.config.environment import home_folder
from tiercache.errors import EnvironmentUnsupportedError, UsageError
from tiercache.store.folders import IN_USE_FILE, MAKING, ORIGIN_FILE, locked
from tiercache.store.format import CATALOG_FILE
from tiercache.store.journal import JOURNAL_FILE

OTHER, HALF_REMOVED = "other", "half removed"
_REMOVING = ".removing-"  # an entry that is about to go has this before its name
_SHELVES = ("stores", "imports", "real")  # folders whose own folders are entries
_REAL_MODEL = "SmolLM2-135M-Instruct"  # the one that benchmarks.real.model fetches
_PROBE_FILES = ("probe.mdb", "probe.mdb-lock")


@dataclass(frozen=True)
class Entry:
    """One thing in the cache.

    Attributes:
        name: its path below the cache folder.
        kind: "plane store", "unfinished store", "imported checkpoint", "real model", "kernels", "probe and actuals",
            "half made", "half removed", or "other": what tiercache did not make, and does not remove.
        nbytes: on disk.
        used_s: when a file of it was last read or written, as the file system keeps it; Unix time.
    """

    name: str
    kind: str
    nbytes: int
    used_s: float


def entries() -> list[Entry]:
    """Everything in the cache folder, by name; nothing where there is none. What goes meanwhile is left out.

    Raises:
        UsageError: $TIERCACHE_HOME is relative.
        EnvironmentUnsupportedError: the folder cannot be read.
    """
    home = home_folder()
    found = []
    try:
        for path in _paths(home) if home.is_dir() else ():
            with suppress(FileNotFoundError):
                found.append(_entry(home, path))
    except PermissionError as error:
        raise EnvironmentUnsupportedError(f"{error.filename} may not be read; change its permissions") from error
    return found


def found(names: list[str]) -> list[Entry]:
    """The entries of these names; the last part of a name will do where one entry alone has it.

    Raises:
        UsageError: there is no such entry, there are several, or tiercache did not make it.
    """
    known = entries()
    return [_named(name.rstrip("/"), known) for name in dict.fromkeys(names)]


def removable() -> list[Entry]:
    """All that tiercache made."""
    return [entry for entry in entries() if entry.kind != OTHER]


def remove(entry: Entry) -> None:
    """Take an entry away. It is renamed first, so an interruption leaves nothing that could be taken for whole.

    One that is gone already is no error.

    Raises:
        UsageError: a run, a conversion or a calibration is using it.
        EnvironmentUnsupportedError: it cannot be removed.
    """
    path = home_folder() / entry.name
    try:
        with ExitStack() as stack:
            _hold(path, stack, f"{entry.name} is in use; end what uses it, then remove it")
            if path.name == _PROBE_FILES[0]:
                path.with_name(_PROBE_FILES[1]).unlink(missing_ok=True)
            gone = path if path.name.startswith(_REMOVING) else path.with_name(_REMOVING + path.name)
            if gone != path:
                _erase(gone)  # what an earlier removal of that name left
                with suppress(FileNotFoundError):
                    path.rename(gone)
        _erase(gone)
    except OSError as error:
        raise EnvironmentUnsupportedError(f"{path} cannot be removed ({error}); see to its permissions") from error


def _paths(home: Path) -> Iterator[Path]:
    """The path of each entry."""
    for path in _inside(home):
        if path.name in _SHELVES and path.is_dir():
            yield from _inside(path)
        elif path.name not in (TAG_FILE, _PROBE_FILES[1]):
            yield path


def _inside(folder: Path) -> list[Path]:
    """What lies in a folder; nothing where it is gone."""
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _entry(home: Path, path: Path) -> Entry:
    files = []
    for each in _files(path):
        with suppress(FileNotFoundError):  # a compiler's scratch file, for one
            files.append(each.lstat())
    used_s = max((max(each.st_atime, each.st_mtime) for each in files), default=path.lstat().st_mtime)
    return Entry(str(path.relative_to(home)), _kind(home, path), sum(each.st_blocks * 512 for each in files), used_s)


def _files(path: Path) -> Iterator[Path]:
    """All files of an entry; what a link points to is none of them."""
    if path.is_symlink() or not path.is_dir():
        yield path
        return
    for folder, _, names in os.walk(path):
        yield from (Path(folder) / name for name in names)


def _kind(home: Path, path: Path) -> str:
    if path.name.startswith(_REMOVING):
        return HALF_REMOVED
    shelf = path.parent.name if path.parent != home else path.name
    return next((kind for kind, place, fits in _KINDS if place == shelf and fits(path)), OTHER)


def _holds_kernels(path: Path) -> bool:
    return path.is_dir() and all(each.suffix in (".so", ".bin") for each in _inside(path) if each.name[0] != ".")


# A kind, the folder or file of the cache that it lies in, and what tells it.
_KINDS: tuple[tuple[str, str, Callable[[Path], bool]], ...] = (
    ("plane store", "stores", lambda path: (path / CATALOG_FILE).is_file()),
    ("unfinished store", "stores", lambda path: path.suffix == ".partial" and (path / JOURNAL_FILE).is_file()),
    ("imported checkpoint", "imports", lambda path: (path / ORIGIN_FILE).is_file()),
    ("half made", "stores", lambda path: path.name.startswith(MAKING)),
    ("half made", "imports", lambda path: path.name.startswith(MAKING)),
    ("real model", "real", lambda path: path.name == _REAL_MODEL and any(path.glob("*.gguf"))),
    ("kernels", "kernels", _holds_kernels),
    ("probe and actuals", _PROBE_FILES[0], Path.is_file),
)


def _named(name: str, known: list[Entry]) -> Entry:
    fitting = [entry for entry in known if entry.name == name] or [
        entry for entry in known if Path(entry.name).name == name
    ]
    if not fitting:
        raise UsageError(f"the cache {home_folder()} has no {name!r}; 'tiercache cache list' names what it has")
    if len(fitting) > 1:
        raise UsageError(f"{name!r} could be {' or '.join(entry.name for entry in fitting)}; give the whole name")
    if fitting[0].kind == OTHER:
        raise UsageError(
            f"{fitting[0].name} was not made by tiercache, which leaves it alone; remove it by other means"
        )
    return fitting[0]


def _hold(path: Path, stack: ExitStack, refusal: str) -> None:
    for each in _lockable(path):
        try:
            stack.enter_context(locked(each, refusal))
        except UsageError:
            if each.exists():  # what is gone nobody uses
                raise


def _lockable(path: Path) -> Iterator[Path]:
    """What users of an entry hold: folders that are written, and files of folders that are read."""
    if path.name == _PROBE_FILES[0]:
        yield path.parent  # LMDB's own lock goes with the file
    if path.is_symlink() or not path.is_dir():
        return
    for folder, _, names in os.walk(path):
        yield Path(folder)
        if IN_USE_FILE in names:
            yield Path(folder) / IN_USE_FILE


def _erase(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    while path.is_dir():
        with suppress(FileNotFoundError):  # a file of it went meanwhile: on with the others
            shutil.rmtree(path)
