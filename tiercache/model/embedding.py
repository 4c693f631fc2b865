"""Looks up token embeddings without the table in memory: only the rows of the tokens at hand.

The module keeps its class and forward (some scale what they look up): its input is replaced by indices into a small
table of the rows it needs. Rows come from a table in some tier, or from the file, a few at a time.
"""

from typing import Protocol

import torch
from torch import nn

from tiercache.model.binding import poison, weight_of
from tiercache.store.format import BLOCK_BYTES, Piece, align
from tiercache.store.reader import Reader, aligned_buffer

_ROWS_AT_ONCE = 64


class EmbeddingRows(Protocol):
    """Hands out rows of the token embedding."""

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        """Rows [ids, hidden], in the table's dtype, on the host; `ids` is 1-D, on the host, in range."""


class TableRows(EmbeddingRows):
    """Rows of a table that lies in memory."""

    def __init__(self, table: torch.Tensor) -> None:
        self._table = table

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        return self._table.index_select(0, ids.to(self._table.device))


class FileRows(EmbeddingRows):
    """Rows read from the file, each on its own; counts their bytes in `read_bytes`.

    A thread of its own reads them, for a pass of planes that stay would wait behind all that was asked for the next
    one that streams. `piece` is the whole table in its file.
    """

    def __init__(self, piece: Piece, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._table, self._dtype, self._reader = piece, dtype, Reader(threads=1)
        self._columns = shape[1]
        self._row_bytes = piece.nbytes // shape[0]
        self._span_bytes = align(self._row_bytes + BLOCK_BYTES)
        self._buffer = aligned_buffer(self.staging_bytes(self._row_bytes))
        self.read_bytes = 0

    @staticmethod
    def staging_bytes(row_bytes: int) -> int:
        """What its buffer takes."""
        return _ROWS_AT_ONCE * align(row_bytes + BLOCK_BYTES)

    @property
    def ssd_bytes(self) -> int:
        """That the SSD delivered, whole blocks."""
        return self._reader.read_bytes

    def close(self) -> None:
        """Stop the thread; harmless when done twice."""
        self._reader.close()

    def gather(self, ids: torch.Tensor) -> torch.Tensor:
        rows = torch.empty((len(ids), self._columns), dtype=self._dtype)
        plain = rows.view(torch.uint8).view(len(ids), self._row_bytes).numpy()
        for first in range(0, len(ids), _ROWS_AT_ONCE):
            pieces = [self._piece(place, int(row)) for place, row in enumerate(ids[first : first + _ROWS_AT_ONCE])]
            self._reader.read(pieces, self._buffer).wait()
            for place, piece in enumerate(pieces, start=first):
                plain[place] = self._buffer[piece.at : piece.at + piece.nbytes]
        self.read_bytes += plain.nbytes
        return rows

    def _piece(self, place: int, row: int) -> Piece:
        offset = self._table.offset + row * self._row_bytes
        at = place * self._span_bytes + offset % BLOCK_BYTES
        return Piece(self._table.path, offset, self._row_bytes, at, self._row_bytes)


class Lookup:
    """The hooks of the token embedding's module."""

    def __init__(self, module: nn.Embedding, rows: EmbeddingRows) -> None:
        self._module, self._rows = module, rows
        self._shape = weight_of(module).shape
        self._padding = module.padding_idx
        module.padding_idx = None  # only gradients need it, and it would be checked against the small table
        self._hooks = [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
        ]

    def close(self) -> None:
        """Remove the hooks; harmless when done twice."""
        if self._hooks:
            self._module.padding_idx = self._padding
        while self._hooks:
            self._hooks.pop().remove()

    def _begin(self, module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        ids, *rest = arguments
        unique, places = torch.unique(ids, return_inverse=True)
        unique = unique.cpu()
        if len(unique) and (int(unique[0]) < 0 or int(unique[-1]) >= self._shape[0]):
            raise IndexError(f"token {int(unique[-1])} is outside the vocabulary of {self._shape[0]}")
        weight = weight_of(module)
        weight.data = self._rows.gather(unique).to(weight.device, weight.dtype)
        return (places, *rest)

    def _end(self, module: nn.Module, arguments: object, output: object) -> None:
        weight = weight_of(module)
        weight.data = poison(self._shape, weight.dtype, weight.device)
