"""What a person reads of a run of the kernel benchmark."""

from typing import Any

from rich.console import Console
from rich.table import Table

from tiercache.config.sizes import human

_WIDTH = 200  # more than the table takes: no terminal's width cuts what is kept in a log


def report(result: dict[str, Any]) -> str:
    """Hardware and backends, then a table of every case."""
    hardware = result["hardware"]
    lines = [
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} threads; torch {result['torch']}; "
        f"seed {result['seed']}; groups of {result['group']}",
        *(line for device in result["stands"] for line in _device(device)),
        f"every case agrees with the reference within {result['tolerance']} of its results' root mean square",
    ]
    console = Console(width=_WIDTH, color_system=None)
    with console.capture() as captured:
        for device in result["stands"]:
            console.print(_table(device["device"], result["results"]))
    return "\n".join(lines) + "\n" + "\n".join(line.rstrip() for line in captured.get().splitlines())


def _device(device: dict[str, Any]) -> list[str]:
    low, high = min(device["roofs_gbps"]), max(device["roofs_gbps"])
    turns = f"matrices of {human(device['working_set_bytes'])} take turns, the cache has {human(device['cache_bytes'])}"
    return [
        f"{device['device']}: kernels {device['kernels']}; {turns}",
        f"{device['device']}: the roof, read from each matrix before and after, was {low:.1f} to {high:.1f} GB/s",
        *(f"{device['device']}: {name} is left out: {reason}" for name, reason in device["peers_left_out"].items()),
    ]


def _table(device: str, results: list[dict[str, Any]]) -> Table:
    shown = Table(title=device, title_justify="left", box=None)
    for heading in ("kernel", "matrix", "weights"):
        shown.add_column(heading, no_wrap=True)
    own = [row for row in results if row["device"] == device]
    peers = list(dict.fromkeys(name for row in own for name in row["peer_seconds"]))
    for heading in ("tokens", "ms", "GB/s", "of roof", "GFLOP/s", *(f"x {name}" for name in peers), "error"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in _by_matrix(own):
        shown.add_row(
            *(row["kernel"], f"{row['rows']} x {row['columns']}", row["precision"], str(row["tokens"])),
            *(f"{1e3 * row['seconds']:.3f}", f"{row['gbps']:.2f}", f"{row['ratio']:.0%}", f"{row['gflops']:.0f}"),
            *(_speed(row, name) for name in peers),
            f"{row['max_error']:.1e}",
        )
    return shown


def _by_matrix(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Precisions of a case one after another: those of one bundle were measured together."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in results:
        groups.setdefault((row["shape"], row["kernel"], row["rows"], row["columns"]), []).append(row)
    return [row for group in groups.values() for row in group]


def _speed(row: dict[str, Any], peer: str) -> str:
    """Seconds of the peer over seconds of the kernel; empty where the peer was not timed."""
    seconds = row["peer_seconds"].get(peer)
    return "" if seconds is None else f"{seconds / row['seconds']:.2f}"
