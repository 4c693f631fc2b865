"""What a person reads of a run of the kernel benchmark."""

from typing import Any

from tiercache.bench.tables import table
from tiercache.config.sizes import human

_NAMES = ("kernel", "matrix", "weights")
_BEYOND = 1.03  # times the roof: within this two readings of the same memory differ by themselves
_NUMBERS = ("tokens", "ms", "GB/s", "of roof", "GFLOP/s", "error")


def report(result: dict[str, Any]) -> str:
    """Hardware and backends, then a table of every case."""
    hardware = result["hardware"]
    lines = [
        f"{hardware['processor']}, {hardware['cores']} cores, {hardware['threads']} threads; torch {result['torch']}; "
        f"seed {result['seed']}; groups of {result['group']}",
        *(line for device in result["stands"] for line in _device(device)),
        f"every case agrees with the reference within {result['tolerance']} of its results' root mean square",
    ]
    for device in result["stands"]:
        lines += _table(device["device"], [row for row in result["results"] if row["device"] == device["device"]])
    if beyond := sum(row["ratio"] > _BEYOND for row in result["results"]):
        lines.append(f"{beyond} cases read faster than {_BEYOND:.0%} of the roof: the memory's rate changed; run again")
    if not any(row["peer_seconds"] for row in result["results"]):
        lines.append("torch's own products are timed beside these by: python -m benchmarks.kernels, in a checkout")
    return "\n".join(lines)


def _device(device: dict[str, Any]) -> list[str]:
    low, high = min(device["roofs_gbps"]), max(device["roofs_gbps"])
    turns = f"matrices of {human(device['working_set_bytes'])} take turns, the cache has {human(device['cache_bytes'])}"
    return [
        f"{device['device']}: kernels {device['kernels']}; {turns}",
        f"{device['device']}: the roof, read from each matrix before and after, was {low:.1f} to {high:.1f} GB/s",
        *(f"{device['device']}: {name} is left out: {reason}" for name, reason in device["peers_left_out"].items()),
    ]


def _table(device: str, results: list[dict[str, Any]]) -> list[str]:
    peers = list(dict.fromkeys(name for row in results for name in row["peer_seconds"]))
    rows = [
        [
            *(row["kernel"], f"{row['rows']} x {row['columns']}", row["precision"], str(row["tokens"])),
            *(f"{1e3 * row['seconds']:.3f}", f"{row['gbps']:.2f}", f"{row['ratio']:.0%}", f"{row['gflops']:.0f}"),
            f"{row['max_error']:.1e}",
            *(_speed(row, name) for name in peers),
        ]
        for row in _by_matrix(results)
    ]
    return table(device, _NAMES, [*_NUMBERS, *(f"x {name}" for name in peers)], rows)


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
