"""What was measured, for people: a table, a line a mode, and the picture of bytes against loss. Measures nothing."""

from pathlib import Path
from typing import Any

from tiercache import pictures
from tiercache.config.sizes import human

_OPTION = "--plot"
_LEGEND = "reference (KL 0, below the scale)"


def report(result: dict[str, Any]) -> str:
    """A few lines for a person."""
    text, hardware = result["text"], result["hardware"]
    short = "" if text["tokens"] == text["asked"] else f" (all it holds; {text['asked']} were asked for)"
    lines = [
        f"{result['model']} on {hardware['device']}, {hardware['cores']} cores",
        f"  {text['file']}: {text['tokens']} tokens{short}, windows of {result['window']}; KL and agreement against "
        f"{result['reference']}",
        _cells("mode", "bytes a token", "perplexity", "KL, nats", "top-1", "tokens/s", "hits"),
        *(line(row) for row in result["rows"]),
    ]
    if harness := result.get("harness"):
        cut = f"; {harness['cut']} requests cut to {harness['length']} tokens" if harness["cut"] else ""
        lines.append(f"  lm-evaluation-harness {harness['lm_eval']}, {harness['folder']}{cut}")
        for row in result["rows"]:
            for task, metrics in row["tasks"].items():
                shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
                lines.append(f"  {row['mode']:<18} {task} ({harness['items'][task]} items): {shown}")
    if any(row["lossy"] for row in result["rows"]):
        lines.append("  mixed modes are lossy: their text is not the exact weights'")
    return "\n".join(lines)


def line(row: dict[str, Any]) -> str:
    """One mode's row of the table."""
    return _cells(
        row["mode"],
        human(row["bytes_per_token"]),
        _number(row["perplexity"], ".3f"),
        "reference" if row["reference"] else _number(row["kl"], ".6f"),
        f"{row['top1']:.4f}",
        _number(row["tokens_per_s"], ".2f"),
        _hits(row),
    )


def _cells(mode: str, *others: str) -> str:
    return f"  {mode:<18}" + "".join(f" {cell:>13}" for cell in others[:-1]) + f"  {others[-1]}".rstrip()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _hits(row: dict[str, Any]) -> str:
    if row["hit_rate"] is None:
        return ""
    return f"{row['hit_rate']:.3f} (chance {_number(row['chance'], '.3f')}, Belady {_number(row['belady'], '.3f')})"


def front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that no other beats in both bytes and KL, fewest bytes first."""
    found: list[dict[str, Any]] = []
    measured = [row for row in rows if row["kl"] is not None]
    for row in sorted(measured, key=lambda row: (row["bytes_per_token"], row["kl"])):
        if not found or row["kl"] < found[-1]["kl"]:
            found.append(row)
    return found


def check_plot(file: Path) -> None:
    """Refuse early what `plot` could not draw: no picture's name, no folder for it, or no matplotlib."""
    pictures.check(file, _OPTION)


def plot(result: dict[str, Any], file: Path) -> None:
    """Draw KL over bytes a token, and the front that no mode is beyond; written to a .png or .svg."""
    figure = pictures.figure(_OPTION)
    axes = figure.add_subplot()
    rows = [row for row in result["rows"] if row["kl"] is not None]
    floor = _floor(rows)
    for label, marker, series in (
        ("exact", "o", [row for row in rows if not row["lossy"] and not row["reference"]]),
        ("mixed", "s", [row for row in rows if row["lossy"]]),
        (_LEGEND, "*", [row for row in rows if row["reference"]]),
    ):
        if series:
            axes.plot(*_places(series, floor), marker, markersize=8, label=label)
    best = [row for row in front(rows) if row["kl"] > 0]
    axes.plot(*_places(best, floor), "--", color="0.5", linewidth=1, zorder=0, label="Pareto front")
    for row in rows:
        (x,), (y,) = _places([row], floor)
        speed = "" if row["tokens_per_s"] is None else f"\n{row['tokens_per_s']:.1f} tokens/s"
        axes.annotate(f"{row['mode']}{speed}", (x, y), textcoords="offset points", xytext=(7, 5), fontsize=8)
    axes.set(yscale="log", xlabel="weights read for one token, MB", ylabel="KL from exact, nats a token")
    axes.margins(0.2)
    axes.set_title(f"{Path(result['model']).name}: {result['predicted']} tokens against {result['reference']}")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend()
    pictures.save(figure, file, _OPTION)


def _floor(rows: list[dict[str, Any]]) -> float:
    """Where a KL of 0 is drawn, which a logarithmic axis has no place for."""
    return min((row["kl"] for row in rows if row["kl"] > 0), default=1.0) / 10


def _places(rows: list[dict[str, Any]], floor: float) -> tuple[list[float], list[float]]:
    return [row["bytes_per_token"] / 1e6 for row in rows], [max(row["kl"], floor) for row in rows]
