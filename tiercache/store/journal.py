"""The journal of a conversion under way: which units are done, in an LMDB file that outlives the process.

A layer is one transaction. It is entered when the layer's bytes are on disk, so that what the journal lists is there.
"""

import mmap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lmdb

from tiercache.store import catalog
from tiercache.store.catalog import Contents, UnitRecord

JOURNAL_FILE = "journal.mdb"


class ConversionJournal:
    """See the module; made by `opened`. `known` is what it held when it was opened."""

    def __init__(self, env: lmdb.Environment, path: Path) -> None:
        self._env = env
        self.known = catalog.contents(env, path)

    def put_meta(self, meta: Mapping[str, Any]) -> None:
        """Enter what concerns the whole conversion."""
        catalog.put(self._env, catalog.meta_values(meta))

    def put_records(self, records: Sequence[UnitRecord], first: int) -> None:
        """Enter the units from the `first` on, all or none."""
        catalog.put(self._env, catalog.record_values(records, first))


@contextmanager
def opened(folder: Path) -> Iterator[ConversionJournal]:
    """The journal in `folder`, a new one where there is none."""
    path = folder / JOURNAL_FILE
    if _is_empty(path):
        path.unlink(missing_ok=True)
    with catalog.environment(path, readonly=False) as env:
        yield ConversionJournal(env, path)


def read(folder: Path) -> Contents:
    """What the journal in `folder` holds; nothing where there is none."""
    if _is_empty(folder / JOURNAL_FILE):
        return Contents()
    with opened(folder) as journal:
        return journal.known


def _is_empty(path: Path) -> bool:
    """Whether there is no journal, or a full disk cut its making short, before anything could be entered."""
    return not path.exists() or path.stat().st_size < 2 * mmap.PAGESIZE
