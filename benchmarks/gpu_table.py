"""The table that `make gpu` ends with: of each part what it took and whether it passed, then its figures.

Knows the JSON of the parts; a part without any has one row.
"""

from collections.abc import Iterator, Sequence
from typing import Any

Row = tuple[str, str, str]  # part, figure, value


def table(results: Sequence[dict[str, Any]]) -> str:
    """Lines for a person, columns aligned."""
    rows: list[Row] = []
    for result in results:
        code = result["exit_code"]
        state = {0: "ok", 124: "out of time"}.get(code, f"failed, exit code {code}")
        rows.append((result["part"], f"{result['seconds']:.1f} s", state))
        found = result["result"]
        rows += [("", name, value) for name, value in _figures(found or {})]
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"{part:<{widths[0]}}  {name:<{widths[1]}}  {value}".rstrip() for part, name, value in rows)


def _figures(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    schema = str(found.get("schema", "")).partition("/")[0]
    kinds = {
        "tiercache.gpu-compile": _compile,
        "tiercache.gpu-offload": _offload,
        "tiercache.gpu-roofs": _roofs,
        "tiercache.gpu-launches": _launches,
        "tiercache.kernels": _kernels,
        "tiercache.bench": _passes,
    }
    if schema in kinds:
        yield from kinds[schema](found)


def _compile(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "kernels compiled", f"{found['units']} units; one after the other {found['one_by_one_s']:.0f} s"


def _offload(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    failed = [row for row in found["checks"] if not row["ok"]]
    yield "checks", f"{len(found['checks']) - len(failed)} of {len(found['checks'])} pass"
    for row in failed:
        yield row["check"], str({name: value for name, value in row.items() if name not in ("check", "ok")})
    shares = [row["peak_bytes"] / row["hbm_bytes"] for row in found["checks"] if "peak_bytes" in row]
    if shares:
        yield "peak of the card's memory, of the budget", f"{max(shares):.3f} at most"


def _roofs(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    gpu = found["gpu"]
    yield "card's memory", f"{gpu['memory']['gbps']['value']:.0f} GB/s"
    yield f"products, {gpu['compute_type']}", f"{gpu['tflops']['value']:.0f} TFLOPS"
    for name, figure in found["copies"].items():
        yield name, f"{figure['value']:.1f} GB/s"
    yield "of copies up, overlaps with products", f"{found['overlap']['value']:.2f}"
    yield "a launch", f"{found['launch_us']:.1f} us"


def _launches(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for row in found["passes"]:
        layers = row["layers"]
        yield (
            f"{row['tokens']} tokens",
            f"{row['pass_ms']:.1f} ms, of it the card {row['card_ms']:.1f} ms; a layer: {row['launches'] / layers:.0f} "
            f"launches, {row['synchronisations'] / layers:.1f} synchronisations, {row['copies'] / layers:.1f} copies",
        )
    if found.get("beside_torch_bytes"):
        yield "context, modules, graphs on the card", f"{found['beside_torch_bytes'] / 2**20:.0f} MiB more than before"


def _kernels(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The share of the roof at one token, and the worst of all; how fast int4 is beside torch's bf16 product."""
    by_case: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found["results"]:
        by_case.setdefault((row["device"], row["precision"]), []).append(row)
    for (device, precision), rows in by_case.items():
        ones = [row["ratio"] for row in rows if row["tokens"] == 1]
        if ones:
            yield f"{device}, {precision}, 1 token", f"{min(ones):.2f} to {max(ones):.2f} of the roof"
        beside = [
            row["peer_seconds"]["torch bf16"] / row["seconds"] for row in rows if "torch bf16" in row["peer_seconds"]
        ]
        if beside:
            yield "", f"{min(beside):.2f} to {max(beside):.2f} x the speed of torch's bf16 product"


def _passes(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """A pass against the link's and the memory's bytes."""
    hbm = found["stats"]["tiers"].get("hbm", {})
    yield f"{found['shape']} {found['precision']}, hbm={found['hbm']}", f"{1e3 * found['pass_s']:.1f} ms a pass"
    yield f"{found['batch_tokens']} tokens at once", f"{1e3 * found['batch_s']:.1f} ms"
    passes = max(1, found["stats"]["passes"])
    moved = max(0, hbm.get("miss_bytes", 0)) / passes
    yield "brought up a pass", f"{moved / 2**20:.0f} MiB"
    peak = found["stats"].get("peak_device_bytes")
    if peak and hbm.get("capacity_bytes"):
        yield "peak of the card's memory, of the budget", f"{peak / hbm['capacity_bytes']:.3f}"
