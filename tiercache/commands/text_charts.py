"""The charts of `tiercache-profile` as text. Takes the plain data that `--json` prints; prints nothing."""

from collections.abc import Callable
from math import log10
from typing import Any

from rich.table import Column, Table
from rich.text import Text

_WIDTH, _HEIGHT = 72, 20  # characters
_BAR = 36
# Of the parts of a token: the letter that fills a bar, and its name.
_LETTERS = {
    "compute": ("#", "device"),
    "cpu": ("c", "CPU"),
    "link": ("=", "link"),
    "ssd": ("s", "SSD"),
    "dram": ("m", "main memory"),
    "overhead": ("o", "overhead"),
    "drafting": ("d", "drafting"),
}
# From slow to fast: the grounds of a heat map's cells, each with a colour that is read on it.
_GROUNDS = ("white on #440154", "white on #3b528b", "white on #21918c", "black on #5ec962", "black on #fde725")


def of(chart: dict[str, Any]) -> list[str | Text | Table]:
    """What a console prints, part by part."""
    make: dict[str, Callable[[dict[str, Any]], list[str | Text | Table]]] = {
        "roofline": _roofline,
        "time": _time,
        "budgets": _budgets,
        "sweep": _heat_maps,
    }
    return make[chart["kind"]](chart)


def _roofline(chart: dict[str, Any]) -> list[str | Text | Table]:
    """Roofs as slopes of letters, operations as numbers; both axes are logarithmic."""
    roofs, done = list(chart["roofs"].values()), chart["operations"]
    low = min(1.0, *(each["intensity"] for each in done)) / 2
    high = 4 * max(each["intensity"] for each in done)
    bottom = min(*(roof["gbps"] * low for roof in roofs), *(each["gflops"] for each in done))
    top = 2 * max(roof["peak_gflops"] for roof in roofs)
    grid = [[" "] * _WIDTH for _ in range(_HEIGHT)]

    def mark(intensity: float, gflops: float, letter: str) -> None:
        x = round((_WIDTH - 1) * log10(intensity / low) / log10(high / low))
        y = round((_HEIGHT - 1) * log10(gflops / bottom) / log10(top / bottom))
        grid[_HEIGHT - 1 - y][x] = letter

    for place, roof in enumerate(roofs):
        for x in range(_WIDTH):
            intensity = low * (high / low) ** (x / (_WIDTH - 1))
            mark(intensity, min(roof["peak_gflops"], roof["gbps"] * intensity), "ABCD"[place])
    for place, each in enumerate(done):
        mark(each["intensity"], each["gflops"], _sign(place))
    roof_table = Table("roof", Column("GB/s", justify="right"), Column("1e12 op/s", justify="right"), "processor")
    for place, roof in enumerate(roofs):
        name = f"{'ABCD'[place]}  {roof['name']}"
        roof_table.add_row(name, f"{roof['gbps']:.3g}", f"{roof['peak_gflops'] / 1e3:.3g}", roof["processor"])

    def limit(done: dict[str, Any]) -> str:
        """What binds: bytes left of a roof's ridge, operations right of it."""
        if done["resource"] == "all":
            return "with overhead"
        roof = chart["roofs"][done["resource"]]
        by_bytes = done["intensity"] < roof["peak_gflops"] / roof["gbps"]
        return str(roof["name"] if by_bytes else f"{roof['processor']} operations")

    numbers = ("op/byte", "1e12 op/s")
    table = Table("operation", "layers", "bound by", *(Column(name, justify="right") for name in numbers))
    for place, each in enumerate(done):
        where = (f"{_sign(place)}  {each['phase']}", each["kind"], limit(each))
        table.add_row(*where, _number(each["intensity"]), _number(each["gflops"] / 1e3))
    axis = (
        f"{_number(low)} to {_number(high)} operations a byte, {bottom:.2g}e9 to {_number(top)}e9 operations a second"
    )
    lines = "\n".join("|" + "".join(row) for row in grid)
    return [chart["title"], Text(f"{lines}\n+{'-' * _WIDTH}"), axis, roof_table, table]


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _sign(place: int) -> str:
    return "123456789abcdefghijklmnopqrstuvwxyz"[place]


def _time(chart: dict[str, Any]) -> list[str | Text | Table]:
    longest = max(sum(bar["ms"].values()) for bar in chart["bars"])
    numbers = (Column("ms", justify="right"), Column("tokens/s", justify="right"))
    table = Table("plan", *numbers, "a token")
    for bar in chart["bars"]:
        filled = "".join(_LETTERS[name][0] * round(_BAR * ms / longest) for name, ms in _in_order(bar["ms"]))
        table.add_row(bar["name"], f"{sum(bar['ms'].values()):.0f}", f"{bar['tokens_per_s']:.2f}", filled)
    used = {name for bar in chart["bars"] for name, ms in bar["ms"].items() if ms}
    return [
        chart["title"],
        table,
        ", ".join(f"{letter} {name}" for part, (letter, name) in _LETTERS.items() if part in used),
    ]


def _in_order(ms: dict[str, float]) -> list[tuple[str, float]]:
    return [(name, ms[name]) for name in _LETTERS if name in ms]


def _budgets(chart: dict[str, Any]) -> list[str | Text | Table]:
    """A table and bars for each budget, every fourth point."""
    found: list[str | Text | Table] = [chart["title"]]
    for panel in chart["panels"]:
        for line in panel["lines"]:
            most = max((speed for _, speed in line["points"] if speed is not None), default=1.0)
            table = Table(Column(panel["axis"], justify="right"), Column("tokens/s", justify="right"), "")
            for size, speed in line["points"][3::4]:
                if speed is None:
                    table.add_row(f"{size:.1f}", "-", "does not fit")
                else:
                    table.add_row(f"{size:.1f}", f"{speed:.2f}", "#" * round(_BAR * speed / most))
            found += [f"{line['name']}, {panel['title']}: {_own(line['own'])}", table]
    return found


def _own(own: tuple[float, float | None]) -> str:
    size, speed = own
    return f"{size:.1f} GiB, " + ("does not fit" if speed is None else f"{speed:.2f} tokens/s")


def _heat_maps(chart: dict[str, Any]) -> list[str | Text | Table]:
    found: list[str | Text | Table] = []
    cells = [cell for each in chart["maps"] for row in each["cells"] for cell in row if cell is not None]
    highest = max(cells, default=1.0)
    for each in chart["maps"]:
        table = Table("tokens/s", *(Column(name, justify="right") for name in each["columns"]), padding=0)
        for name, row in zip(each["rows"], each["cells"], strict=True):
            table.add_row(name, *(_cell(cell, highest) for cell in row))
        found += [each["title"], table]
    return found


def _cell(speed: float | None, highest: float) -> Text:
    if speed is None:
        return Text(" does not fit ")
    step = min(len(_GROUNDS) - 1, int(len(_GROUNDS) * speed / highest))
    return Text(f" {speed:.2f} ", style=_GROUNDS[step])
