"""The charts of `tiercache-profile` as pictures. Takes the plain data that `--json` prints; matplotlib draws.

Colours are Okabe and Ito's, which colour-blind people tell apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from math import atan2, degrees, hypot, log10
from pathlib import Path
from typing import Any

from tiercache import pictures

OPTION = "--out"
BLACK, ORANGE, SKY, GREEN, BLUE, RED, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73"),
    *("#0072B2", "#D55E00", "#CC79A7"),
)
# Of resources and of what a token takes beside them, in the order of a bar.
PARTS = {
    "compute": ("device", SKY),
    "cpu": ("CPU", ORANGE),
    "link": ("link", GREEN),
    "ssd": ("SSD", RED),
    "dram": ("main memory", "#999999"),
    "overhead": ("overhead", PURPLE),
    "drafting": ("drafting", BLUE),
}
_MARKS = ("o", "s", "^", "D")
_LINES = (BLUE, RED, GREEN, PURPLE, ORANGE, BLACK, SKY)
_SMALL, _NEAR = 8, 9  # points: of small text, and from a mark to its label
_MARK_PX = 10  # from the middle of a mark to what does not touch it
_SIDES = ((1, -1), (1, 0), (-1, 1), (0, -1), (-1, 0), (1, 1), (0, 1), (-1, -1))  # right and up, the better ones first
_CLOSE = 2.2  # times the bandwidth: a roof that is less far above another leaves no room for that one's name
_ROOM = 0.06  # of a bar: narrower parts carry no number


def draw(chart: dict[str, Any], file: Path) -> None:
    """Draw one of the charts into a .png or .svg.

    Raises:
        UsageError: the file cannot be written.
        EnvironmentUnsupportedError: there is no matplotlib.
    """
    pictures.save(figure(chart), file, OPTION)


def figure(chart: dict[str, Any]) -> Any:
    """One of the charts as matplotlib's figure; raises EnvironmentUnsupportedError where there is no matplotlib."""
    make: dict[str, Callable[[dict[str, Any]], Any]] = {
        "roofline": _roofline,
        "time": _time,
        "budgets": _budgets,
        "sweep": _heat_maps,
    }
    return make[chart["kind"]](chart)


def _roofline(chart: dict[str, Any]) -> Any:
    figure = pictures.figure(OPTION, 9, 6)
    axes = figure.add_subplot()
    roofs = chart["roofs"]
    done = [
        each for each in chart["operations"] if each["kind"] != "head"
    ]  # a few per cent of a pass, and labels crowd
    low = min(1.0, *(each["intensity"] for each in done)) / 4
    high = max(each["intensity"] for each in done) * 20  # beyond the marks there is room for the processors' names
    bottom = min(min(roof["gbps"] for roof in roofs.values()) * low, *(each["gflops"] for each in done)) / 1.5
    top = 12 * max(roof["peak_gflops"] for roof in roofs.values())
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top))
    axes.set(xlabel="operations for each byte that comes through the level", ylabel="1e9 operations a second")
    for resource, roof in roofs.items():
        colour, peak, ridge = PARTS[resource][1], roof["peak_gflops"], roof["peak_gflops"] / roof["gbps"]
        axes.plot([low, ridge, max(high, ridge)], [low * roof["gbps"], peak, peak], color=colour, linewidth=2, zorder=1)
    axes.grid(visible=True, which="major", alpha=0.25)
    axes.set_title(f"{chart['title']}\nwhite: a whole pass, with overhead and what does not overlap", fontsize=10)
    figure.draw_without_rendering()  # labels are placed by the axes' final size
    taken = _roof_labels(axes, roofs, low)
    for peak, who in sorted({(roof["peak_gflops"], roof["processor"]) for roof in roofs.values()}):
        text = f"{who}:\n{peak / 1e3:.3g}e12 operations/s"
        taken.append(_put(axes, text, (high, peak), (-4, 4), ha="right", va="bottom", color="0.3"))
    phases, merged = list(dict.fromkeys(each["phase"] for each in done)), _merged(done)
    places = [(each["intensity"], each["gflops"]) for each in merged]
    crowd = _Crowd(axes, taken, [tuple(axes.transData.transform(place)) for place in places])
    for each, place in zip(merged, places, strict=True):
        face = "white" if each["resource"] == "all" else PARTS[each["resource"]][1]
        mark = _MARKS[phases.index(each["phase"])]
        axes.plot(*place, mark, color="black", markerfacecolor=face, markersize=8, zorder=3)
        crowd.label(f"{each['phase']}: {each['kind']}", place)
    return figure


def _roof_labels(axes: Any, roofs: dict[str, dict[str, Any]], low: float) -> list[Any]:
    """The names of slanted roofs along them: below one that another is close above. Gives the boxes."""
    found = []
    for name, roof in roofs.items():
        gbps = roof["gbps"]
        (x, y), (xx, yy) = axes.transData.transform([(low, low * gbps), (10 * low, 10 * low * gbps)])
        squeezed = any(1 < other["gbps"] / gbps < _CLOSE for other in roofs.values())
        style = {"va": "top" if squeezed else "bottom", "rotation": degrees(atan2(yy - y, xx - x))}
        where, offset = (1.15 * low, 1.15 * low * gbps), (3, -3) if squeezed else (0, 3)
        style |= {"rotation_mode": "anchor", "color": PARTS[name][1], "weight": "bold"}
        found.append(_put(axes, f"{roof['name']}, {gbps:.3g} GB/s", where, offset, **style))
    return found


def _merged(done: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Operations of a phase that lie on one spot, as one."""

    def spot(each: dict[str, Any]) -> tuple[str, str, int, int]:
        return each["phase"], each["resource"], round(10 * log10(each["intensity"])), round(10 * log10(each["gflops"]))

    groups = [list(group) for _, group in groupby(sorted(done, key=spot), key=spot)]
    groups.sort(key=lambda group: done.index(group[0]))  # a phase after the other, as they were given
    return [group[0] | {"kind": ", ".join(each["kind"] for each in group)} for group in groups]


def _put(axes: Any, text: str, where: tuple[float, float], offset: tuple[float, float], **style: Any) -> Any:
    """Text beside a place; gives the box that it takes."""
    options = {"textcoords": "offset points", "fontsize": _SMALL, **style}
    drawn = axes.annotate(text, where, xytext=offset, **options)
    return drawn.get_window_extent()


@dataclass
class _Crowd:
    """Labels of marks that stand close.

    Attributes:
        axes: that they are in.
        taken: boxes of labels that stand there already.
        spots: the marks, in pixels.
    """

    axes: Any
    taken: list[Any]
    spots: list[tuple[float, float]]

    def label(self, text: str, where: tuple[float, float]) -> None:
        """Label a mark where other labels, other marks and the edge leave most room; a line leads to a far label."""
        best: tuple[float, Any, tuple[int, int]] | None = None
        for far, (across, up) in product((_NEAR, 20, 34, 50, 70), _SIDES):
            offset = (across * far, up * far)
            style = {"ha": ("center", "left", "right")[across], "va": ("center", "bottom", "top")[up]}
            drawn = self.axes.annotate(text, where, offset, textcoords="offset points", fontsize=_SMALL, **style)
            price = self._price(drawn.get_window_extent(), where, near=far == _NEAR) + far / 20
            if best is None or price < best[0]:
                if best is not None:
                    best[1].remove()
                best = (price, drawn, offset)
            else:
                drawn.remove()
        if best is None:
            return
        _, drawn, offset = best
        drawn.set_bbox({"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5})
        self.taken.append(drawn.get_window_extent())
        if max(map(abs, offset)) > _NEAR:
            line = {"arrowstyle": "-", "linewidth": 0.6, "color": "0.5", "shrinkA": 0}
            self.axes.annotate("", where, offset, textcoords="offset points", arrowprops=line)

    def _price(self, box: Any, where: tuple[float, float], *, near: bool) -> float:
        """What is bad about a place for a label; a label that is not near has a line to its mark."""
        bounds, (x, y) = self.axes.get_window_extent(), self.axes.transData.transform(where)
        inside = bounds.x0 <= box.x0 and box.x1 <= bounds.x1 and bounds.y0 <= box.y0 and box.y1 <= bounds.y1
        others = [spot for spot in self.spots if hypot(spot[0] - x, spot[1] - y) > 1]
        covered = sum(_distance(box, *spot) < _MARK_PX for spot in others)
        own = _distance(box, x, y)
        misread = near * sum(_distance(box, *spot) <= own for spot in others)
        end = min(max(x, box.x0), box.x1), min(max(y, box.y0), box.y1)
        steps = [(x + (end[0] - x) * step / 10, y + (end[1] - y) * step / 10) for step in range(11)]
        struck = sum(min(hypot(spot[0] - a, spot[1] - b) for a, b in steps) < _MARK_PX for spot in others)
        struck += sum(any(other.contains(*step) for step in steps) for other in self.taken)
        crossed = sum(line.get_path().transformed(line.get_transform()).intersects_bbox(box) for line in self._roofs())
        overlapped = sum(box.padded(6).overlaps(other) for other in self.taken)
        return float(40 * (not inside) + 20 * (overlapped + covered) + 8 * (misread + struck) + crossed)

    def _roofs(self) -> list[Any]:
        return [line for line in self.axes.get_lines() if len(line.get_xdata()) > 1]


def _distance(box: Any, x: float, y: float) -> float:
    """Pixels from a box to a point."""
    return float(hypot(max(box.x0 - x, 0, x - box.x1), max(box.y0 - y, 0, y - box.y1)))


def _time(chart: dict[str, Any]) -> Any:
    bars = chart["bars"]
    figure = pictures.figure(OPTION, 9, 1.6 + 0.5 * len(bars))
    axes = figure.add_subplot()
    longest = max(sum(bar["ms"].values()) for bar in bars)
    used = [name for name in PARTS if any(bar["ms"].get(name) for bar in bars)]
    for place, bar in enumerate(bars):
        left = 0.0
        for name in used:
            width = bar["ms"].get(name, 0.0)
            axes.barh(place, width, left=left, color=PARTS[name][1], edgecolor="white", linewidth=0.5)
            if width > _ROOM * longest:
                colour = "white" if name in ("drafting", "ssd", "link") else "black"
                axes.text(left + width / 2, place, f"{width:.0f}", ha="center", va="center", fontsize=9, color=colour)
            left += width
        axes.text(left + 0.01 * longest, place, f"{bar['tokens_per_s']:.2f} tokens/s", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), [bar["name"] for bar in bars])
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds of a token", xlim=(0, 1.2 * longest))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(chart["title"], fontsize=10, loc="left", pad=26)
    patches = [axes.barh(0, 0, color=PARTS[name][1]) for name in used]
    names = [PARTS[name][0] for name in used]
    axes.legend(
        patches,
        names,
        ncols=len(used),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        frameon=False,
        fontsize=9,
        borderpad=0.2,
    )
    return figure


def _budgets(chart: dict[str, Any]) -> Any:
    panels = chart["panels"]
    figure = pictures.figure(OPTION, 5.5 * len(panels), 4.5)
    figure.suptitle(chart["title"], fontsize=10)
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), place + 1)
        ends = []
        for line, colour in zip(panel["lines"], _LINES, strict=False):
            points = [(size, speed) for size, speed in line["points"] if speed is not None]
            if not points:
                continue
            axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8)
            if line["own"] is not None:
                axes.plot(*line["own"], "o", color=colour, markersize=6)
            ends.append((points[-1], line["name"], colour))
        axes.set(xlabel=panel["axis"], ylabel="tokens a second", ylim=(0, None))
        axes.margins(x=0.02)
        axes.grid(visible=True, alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        _labels_at_ends(axes, ends)
        axes.set_title(panel["title"], fontsize=9)
    return figure


def _labels_at_ends(axes: Any, ends: list[tuple[tuple[float, float], str, str]]) -> None:
    """The names of lines right of their ends, pushed apart where the ends are close."""
    low, high = axes.get_ylim()
    step, place = 0.05 * (high - low), low
    for (x, y), name, colour in sorted(ends, key=lambda end: end[0][1]):
        place = max(y, place + step)
        axes.annotate(
            name,
            (x, place),
            xytext=(5, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            annotation_clip=False,
        )


def _heat_maps(chart: dict[str, Any]) -> Any:
    maps = chart["maps"]
    rows, columns = (max(len(each[axis]) for each in maps) for axis in ("rows", "columns"))
    figure = pictures.figure(OPTION, 2.2 + 0.9 * columns, len(maps) * (1.4 + 0.5 * rows))
    highest = max((cell for each in maps for row in each["cells"] for cell in row if cell is not None), default=1.0)
    for place, each in enumerate(maps):
        axes = figure.add_subplot(len(maps), 1, place + 1)
        cells = [[float("nan") if cell is None else cell for cell in row] for row in each["cells"]]
        axes.imshow(cells, cmap="viridis", vmin=0, vmax=highest, aspect="auto")
        for y, row in enumerate(each["cells"]):
            for x, cell in enumerate(row):
                text = "does\nnot fit" if cell is None else f"{cell:.2f}"
                dark = cell is not None and cell < highest / 2
                axes.text(x, y, text, ha="center", va="center", color="white" if dark else "black", fontsize=9)
        axes.set_xticks(range(len(each["columns"])), each["columns"])
        axes.set_yticks(range(len(each["rows"])), each["rows"])
        axes.set_xlabel("main memory")
        axes.set_title(each["title"], fontsize=10)
    return figure
