"""Tables as lines of plain text, which a log keeps as a terminal shows them."""

from collections.abc import Iterable, Sequence


def table(title: str, names: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table.

    Args:
        title: above it.
        names: headings of the first columns, which are aligned to the left.
        numbers: headings of the others, which are aligned to the right.
        rows: a text for each heading.
    """
    cells = [[*names, *numbers], *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = ["<"] * len(names) + [">"] * len(numbers)
    lines = [title]
    for row in cells:
        shown = [f"{cell:{side}{width}}" for cell, side, width in zip(row, aligned, widths, strict=True)]
        lines.append(f" {'  '.join(shown)}".rstrip())
    return lines
