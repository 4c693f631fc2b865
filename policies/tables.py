"""Small tables for people: as plain text, and as HTML where a notebook shows an object. Knows no cell's meaning."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# Greys that are seen on white and on black; text keeps the page's own colour.
_LINE = "border-bottom: 1px solid rgba(128, 128, 128, 0.4)"
_CELL = f"{_LINE}; padding: 0.2em 0.8em; text-align: "
_NUMBERS = "0123456789+-."


@dataclass(frozen=True)
class Table:
    """A title, headings, and rows with a cell for each heading."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def html(self) -> str:
        """An HTML table; whatever cells hold is escaped."""
        from html import escape  # takes a while to import, and only notebooks ask

        sides = self._sides()

        def row(tag: str, cells: Sequence[str]) -> str:
            pairs = zip(cells, sides, strict=True)
            return "".join(f'<{tag} style="{_CELL}{side}">{escape(cell)}</{tag}>' for cell, side in pairs)

        head = f"<thead><tr>{row('th', self.headings)}</tr></thead>"
        body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in self.rows)
        caption = f'<caption style="caption-side: top; text-align: left">{escape(self.title)}</caption>'
        return f'<table style="border-collapse: collapse">{caption}{head}<tbody>{body}</tbody></table>'

    @property
    def text(self) -> str:
        """The same in columns of a fixed-width font."""
        lines = (self.headings, *self.rows)
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        pairs = list(zip(widths, self._sides(), strict=True))

        def line(cells: Sequence[str]) -> str:
            placed = zip(cells, pairs, strict=True)
            each = (cell.ljust(width) if side == "left" else cell.rjust(width) for cell, (width, side) in placed)
            return "  ".join(each).rstrip()

        return "\n".join((self.title, *map(line, lines)))

    def _sides(self) -> list[str]:
        """To which side each column's cells go: numbers to the right."""
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.headings)
        return ["right" if column and all(_is_number(cell) for cell in column) else "left" for column in columns]


class Shown:
    """What is shown as tables: in a notebook as HTML, by `print` as text."""

    def tables(self) -> Sequence[Table]:
        """What to show."""
        raise NotImplementedError

    def _repr_html_(self) -> str:
        return "".join(table.html for table in self.tables())

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": str(self)}  # where there is no HTML; a data class's own repr lists every unit

    def __str__(self) -> str:
        return "\n\n".join(table.text for table in self.tables())


def human(size_bytes: float) -> str:
    """Bytes as a person reads them: `human(1536) == '1.5 KiB'`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size_bytes) < 1024:
            return f"{size_bytes:.0f} B" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def _is_number(cell: str) -> bool:
    return not cell or cell[0] in _NUMBERS
