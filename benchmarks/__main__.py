"""`python -m benchmarks`: tiercache and its peers under one RAM cap; a table, and last a line of JSON."""

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from benchmarks.versus import Contest, report, versus
from tiercache.config.sizes import Budget
from tiercache.errors import TiercacheError


def main(
    shape: Annotated[str, typer.Option(help="A model's shape.")] = "tinyllama-1.1b",
    cap: Annotated[str, typer.Option(help="RAM of each process, page cache included.")] = "1434MiB",
    precision: Annotated[str, typer.Option(help="source (bf16 peers) or int4 (against llama.cpp's q4_0).")] = "source",
    tokens: Annotated[int, typer.Option(min=1, help="Single-token passes to time.")] = 8,
    folder: Annotated[Path, typer.Option(help="Where models are made, and found again.")] = Path(".bench"),
) -> None:
    """Run the peers beside tiercache."""
    cap_bytes = Budget.parse(cap).resolve(total_bytes=0, free_bytes=0)
    if precision not in ("source", "int4"):
        raise typer.BadParameter(f"--precision {precision!r}; choose source or int4")
    kind: Literal["source", "int4"] = "int4" if precision == "int4" else "source"
    try:
        result = versus(Contest(shape, cap_bytes, tokens, folder.absolute(), kind))
    except TiercacheError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    print(report(result), file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    typer.run(main)
