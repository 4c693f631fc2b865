"""What a run wished for: per layer and token the neurons in order of importance, kept in one file.

A trace is recorded once and replayed under any policy, cache size and upload cap (`profiler.replay`). Neurons are
positions in a layer's FFN; a plane of a layer wants the first so many of each token's order, so the planes of one
layer, high precision first, cost no second copy.
"""

from __future__ import annotations

import itertools
import os
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from policies.arrays import ArrayLike, Floats, IntArray, NDArray, np

if TYPE_CHECKING:
    Order = NDArray[np.int32]

_FORMAT = "tiercache-trace-1"
_FIRST_ROOM = 16  # tokens
# What zipfile and numpy raise on a file that is cut, changed or something else.
_DAMAGE = (
    *(ValueError, KeyError, IndexError, TypeError, OverflowError, EOFError, OSError, RuntimeError),
    *(MemoryError, SyntaxError, zipfile.BadZipFile, zlib.error),
)


class Trace:
    """The recorded wishes of a run.

    Args:
        neurons: of each layer.
        counts: [layers, planes], how many neurons each plane of a layer wants for one token.
        order: per layer [tokens, most], neurons most important first, distinct in a row; most may be more than any
            plane wants. None for an empty trace, whose rows are as long as the largest count of their layer.

    Attributes:
        neurons: of each layer.
        counts: [layers, planes].
        tokens: recorded so far.

    Raises:
        ValueError: shapes that do not fit, counts beyond the rows, or neurons out of range. Whether the neurons of a
            row are distinct is found when they are replayed.
    """

    def __init__(self, neurons: int, counts: ArrayLike, order: Sequence[ArrayLike] | None = None) -> None:
        self.neurons = neurons
        self.counts: IntArray = np.array(counts, dtype=np.int64)
        if self.counts.ndim != 2 or np.any((self.counts < 0) | (self.counts > neurons)):
            raise ValueError(f"counts {self.counts.tolist()}: give [layers, planes] in [0, {neurons}]")
        most = self.counts.max(axis=1, initial=0)
        rows = [np.empty((0, width)) for width in most] if order is None else [np.asarray(row) for row in order]
        if len(rows) != len(most) or any(row.ndim != 2 for row in rows) or len({len(row) for row in rows}) > 1:
            raise ValueError(f"orders of shapes {[row.shape for row in rows]} for {len(most)} layers: [tokens, most]")
        if any(row.shape[1] < width for row, width in zip(rows, most, strict=True)):
            raise ValueError(f"orders of shapes {[row.shape for row in rows]}: planes want up to {most.tolist()}")
        self.tokens = len(rows[0]) if rows else 0
        self._rows: list[Order] = [self._checked(row) for row in rows]

    @property
    def layers(self) -> int:
        """How many layers."""
        return int(self.counts.shape[0])

    @property
    def planes(self) -> int:
        """How many planes each layer has."""
        return int(self.counts.shape[1])

    @property
    def order(self) -> list[Order]:
        """Per layer [tokens, most], neurons most important first; to read, not to write."""
        return [row[: self.tokens] for row in self._rows]

    def append(self, token_orders: Sequence[ArrayLike]) -> None:
        """Record one more token.

        Args:
            token_orders: per layer the neurons in order of importance, at least as many as the rows of the layer are
                long; what is beyond is not kept.

        Raises:
            ValueError: a layer too many or too few, too few neurons, or one out of range; nothing is recorded then.
        """
        if len(token_orders) != self.layers:
            raise ValueError(f"orders of {len(token_orders)} layers for a trace of {self.layers}")
        tails = []
        for layer, (given, row) in enumerate(zip(token_orders, self._rows, strict=True)):
            tail = np.asarray(given)[: row.shape[1]]
            if tail.shape != row.shape[1:]:
                raise ValueError(f"layer {layer}: order of shape {tail.shape}, and a row has {row.shape[1]} neurons")
            tails.append(self._checked(tail))
        for layer, tail in enumerate(tails):
            if self.tokens == len(self._rows[layer]):
                room = np.empty((max(_FIRST_ROOM, 2 * self.tokens), tail.size), dtype=np.int32)
                room[: self.tokens] = self._rows[layer]
                self._rows[layer] = room
            self._rows[layer][self.tokens] = tail
        self.tokens += 1

    def wanted(self, layer: int, plane: int, token: int) -> IntArray:
        """The neurons that a plane wants for a token, most important first: [counts[layer, plane]]."""
        wanted: IntArray = self.rows(layer, plane)[token].astype(np.int64)
        return wanted

    def rows(self, layer: int, plane: int) -> Order:
        """What a plane wants for every token: [tokens, counts[layer, plane]]."""
        return self._rows[layer][: self.tokens, : self.counts[layer, plane]]

    def frequencies(self, plane: int = 0) -> IntArray:
        """How many tokens want each neuron at this plane: [layers, neurons]."""
        found = np.empty((self.layers, self.neurons), dtype=np.int64)
        for layer in range(self.layers):
            found[layer] = np.bincount(self.rows(layer, plane).ravel(), minlength=self.neurons)
        return found

    def union_sizes(self, windows: Sequence[int] = (2, 4, 8, 16, 64), plane: int = 0) -> dict[int, Floats]:
        """How dense a pass over several tokens is: per window length, the share of a layer's neurons that any wants.

        Args:
            windows: consecutive tokens; a window longer than the trace is left out of the answer.
            plane: whose counts.

        Returns:
            Per window [layers]: the mean, over every run of so many tokens, of the union's size / neurons.
        """
        windows = [window for window in windows if 0 < window <= self.tokens]
        sums = {window: np.zeros(self.layers) for window in windows}
        for layer in range(self.layers):
            rows = self.rows(layer, plane)
            last = np.full(self.neurons, -1, dtype=np.int32)  # token of the last wish
            for token in range(self.tokens):
                last[rows[token]] = token
                for window in windows:
                    if token + 1 >= window:
                        sums[window][layer] += np.count_nonzero(last > token - window)
        return {window: total / ((self.tokens - window + 1) * max(1, self.neurons)) for window, total in sums.items()}

    def adjacent_overlap(self, plane: int = 0) -> tuple[Floats, Floats]:
        """How alike neighbours are: the mean share of a token's set that the token before it wanted, and chance.

        Returns:
            The share [layers], and what sets drawn at random would share [layers], which is count / neurons. A share
            is 0 where a plane wants nothing or there are no two tokens.
        """
        counts = self.counts[:, plane]
        shared = np.zeros(self.layers)
        for layer in range(self.layers):
            rows = self.rows(layer, plane)
            for before, now in itertools.pairwise(rows):
                here = np.zeros(self.neurons, dtype=np.bool_)
                here[before] = True
                shared[layer] += np.count_nonzero(here[now])
        return shared / np.maximum(1, counts * (self.tokens - 1)), counts / max(1, self.neurons)

    def save(self, path: str | Path) -> None:
        """Write one .npz file; what was at `path` is replaced at once or, on an error, not at all."""
        path = Path(path)
        arrays: dict[str, Any] = {f"order_{layer}": row for layer, row in enumerate(self.order)}
        arrays |= {"format": _FORMAT, "neurons": self.neurons, "counts": self.counts}
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, suffix=".part", delete=False) as aside:
            try:
                np.savez(aside, **arrays)
                aside.flush()
                os.fsync(aside.fileno())
                Path(aside.name).replace(path)
            except BaseException:
                Path(aside.name).unlink()
                raise

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is damaged, or is not a trace.
            OSError: it cannot be opened.
        """
        with Path(path).open("rb") as file:
            try:
                return cls._read(file)
            except _DAMAGE as error:
                raise ValueError(f"{path} is damaged or not a trace ({error}): record it again") from error

    @classmethod
    def _read(cls, file: IO[bytes]) -> Trace:
        with zipfile.ZipFile(file) as members:
            broken = members.testzip()  # reads every byte: a changed one must not reach the header's parser
            if broken is not None:
                raise ValueError(f"checksum of {broken}")
        file.seek(0)
        with np.load(file, allow_pickle=False) as found:
            if str(found["format"]) != _FORMAT:
                raise ValueError(f"format {found['format']}, not {_FORMAT}")
            counts = found["counts"]
            order = [found[f"order_{layer}"] for layer in range(len(counts))]
            return cls(int(found["neurons"]), counts, order)

    def _checked(self, row: NDArray[np.generic]) -> Order:
        if row.size and (row.dtype.kind not in "iu" or row.min() < 0 or row.max() >= self.neurons):
            raise ValueError(f"an order of {row.dtype}: give whole numbers in [0, {self.neurons})")
        return np.array(row, dtype=np.int32)
