"""A packed checkpoint's description: a folder in the cache that looks like a plain checkpoint's, without weights.

It holds config.json, the tokenizer's files, and the name of the place that the weights are read from. So everything
that looks for these finds them where it always does. Where a model is run at its source precision, the weights are
unpacked into it (`tiercache.formats.unpacked`), and it is a plain checkpoint that transformers loads too.
"""

import json
import os
from functools import lru_cache
from pathlib import Path

from tiercache.config.cache_folder import made_folder
from tiercache.config.environment import home_folder
from tiercache.errors import StoreError, UsageError
from tiercache.formats.gguf import GgufSource
from tiercache.formats.gguf_header import shards, title
from tiercache.formats.packed import PackedSource
from tiercache.formats.quantized import QuantizedFolder, settings_of
from tiercache.store.folders import ORIGIN_FILE, clear_io_errors, scratch
from tiercache.text import has_tokenizer

_VERSION = 2  # of what is written into the folder


def described(path: Path) -> Path | None:
    """The folder that describes a GGUF file or a quantised checkpoint, made if need be; None for anything else.

    Raises:
        StoreError: it is damaged.
        UnsupportedModelError: of a kind that is not read.
        UsageError: a folder with several GGUF files and no checkpoint, so that one must be named.
    """
    source = _source(path)
    if source is None:
        return None
    digest = source.digest
    folder = home_folder() / "imports" / f"{source.title}-{digest[:12]}-v{_VERSION}"
    with clear_io_errors(folder):
        if not (folder / ORIGIN_FILE).is_file():
            made_folder(folder.parent)
            with scratch(folder.parent) as making:
                made = making / "made"
                made.mkdir()
                source.describe(made)
                source.describe_tokenizer(made, folder)
                _write_origin(made, source)
                try:
                    made.rename(folder)
                except OSError:
                    if not (folder / ORIGIN_FILE).is_file():  # else another process was faster
                        raise
        else:
            if _origin(folder)["place"] != str(source.place.absolute()):  # it was moved
                _write_origin(folder, source)
            if not has_tokenizer(folder):  # what was missing may have been installed since
                _add_tokenizer(folder, source)
    return folder


def _add_tokenizer(folder: Path, source: PackedSource) -> None:
    with scratch(folder.parent) as making:
        source.describe_tokenizer(making, folder)
        for file in sorted(making.iterdir()):
            file.replace(folder / file.name)


def source_of(folder: Path) -> PackedSource | None:
    """What a folder describes; None for one that describes nothing.

    Raises:
        StoreError: that is gone, or has changed.
    """
    if not (folder / ORIGIN_FILE).is_file():
        return None
    origin = _origin(folder)
    place = Path(origin["place"])
    source = _source(place) if place.exists() else None
    if source is None or source.digest != origin["digest"]:
        raise StoreError(
            f"{folder} describes {place}, which is {'gone' if source is None else 'another now'}; name the model's "
            "file or folder"
        )
    return source


def _source(path: Path) -> PackedSource | None:
    if path.is_file():
        return _gguf(path) if path.suffix == ".gguf" else None
    settings = settings_of(path)
    if settings is not None:
        return QuantizedFolder(path, settings)
    if (path / "config.json").exists() or not path.is_dir():
        return None
    files = sorted(path.glob("*.gguf"))
    if len({title(file) for file in files}) > 1:
        raise UsageError(f"{path} holds {len(files)} GGUF files; name one of them, such as {files[0]}")
    return _gguf(files[0]) if files else None


def _gguf(path: Path) -> GgufSource:
    """A file that is looked at several times in a run is read once: a large vocabulary takes a second."""
    return _read_gguf(path, tuple((found.st_mtime_ns, found.st_size) for found in map(_stat, shards(path)) if found))


@lru_cache(maxsize=2)
def _read_gguf(path: Path, stamps: tuple[tuple[int, int], ...]) -> GgufSource:
    return GgufSource(path)


def _stat(path: Path) -> os.stat_result | None:
    return path.stat() if path.is_file() else None


def _origin(folder: Path) -> dict[str, str]:
    file = folder / ORIGIN_FILE
    try:
        found: dict[str, str] = json.loads(file.read_bytes())
        if not isinstance(found["place"], str) or not isinstance(found["digest"], str):
            raise ValueError("no names")
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file} cannot be read ({error!r}); remove {folder} and name the model again") from error
    return found


def _write_origin(folder: Path, source: PackedSource) -> None:
    """Whole or not at all."""
    origin = {"place": str(source.place.absolute()), "digest": source.digest}
    made = folder / f"{ORIGIN_FILE}.{os.getpid()}"
    made.write_text(json.dumps(origin) + "\n", encoding="utf-8")
    made.replace(folder / ORIGIN_FILE)
