"""Everything a CUDA card can show in a few minutes: `make gpu`.

Each part is a process with a time limit of its own, so that one that fails or hangs stops no other. What they print
lies in `.gpu/`; a table comes last but one, a line of JSON last. Needs no virtual environment.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUT = Path(".gpu")
MODELS = "/tmp/tiercache-gpu"  # random weights, made anew on each machine


@dataclass(frozen=True)
class Part:
    """A process: its name, its command line after `python`, the seconds it may take."""

    name: str
    arguments: tuple[str, ...]
    limit_s: int


def _shape(name: str, *arguments: str) -> tuple[str, ...]:
    options = ("--folder", MODELS, "--dram", "12GiB", "--json")
    return ("-m", "tiercache", "bench", "model", "--shape", name, *arguments, *options)


_PROBE = (
    "import sys; from tiercache.commands.profiler import main; sys.argv[1:] = ['probe', '--noisy', '--json']; main()"
)

PARTS = (
    Part("tests", ("-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-p", "no:benchmark", "tests"), 120),
    Part("offload", ("-m", "benchmarks.gpu_offload"), 150),
    Part("roofs", ("-m", "benchmarks.gpu_roofs"), 60),
    Part("probe", ("-c", _PROBE), 180),
    Part("kernels", ("-m", "benchmarks.gpu_kernels"), 80),
    Part("1b-int4-resident", _shape("tinyllama-1.1b", "--precision", "int4", "--hbm", "4GiB"), 60),
    Part("launches", ("-m", "benchmarks.gpu_launches", f"{MODELS}/tinyllama-1.1b-planes-0"), 60),
    Part("1b-int4-streamed", _shape("tinyllama-1.1b", "--precision", "int4", "--hbm", "400MiB"), 60),
    Part(
        "1b-mixed",
        _shape("tinyllama-1.1b", "--precision", "int8", "--hbm", "711MiB", "--bytes-per-token", "0.5"),
        60,
    ),
    Part(
        "70b-layers-int4-streamed",
        _shape("llama-2-70b-4-layers", "--precision", "int4", "--hbm", "2GiB"),
        90,
    ),
)


def main() -> int:
    """Run the parts that are named, or all; 5 without a card, 1 if one failed."""
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs a CUDA card, and torch sees none; run 'tiercache doctor'", file=sys.stderr)
        return 5
    OUT.mkdir(exist_ok=True)
    wanted = sys.argv[1:]
    results = []
    for part in PARTS:
        if not wanted or part.name in wanted:
            results.append(_run(part))
            state = "ok" if results[-1]["exit_code"] == 0 else f"exit code {results[-1]['exit_code']}"
            print(f"{part.name:<26} {results[-1]['seconds']:6.1f} s  {state}", flush=True)
    found = {"schema": "tiercache.gpu/1", "card": torch.cuda.get_device_name(), "torch": torch.__version__}
    line = json.dumps({**found, "parts": results})
    (OUT / "gpu.json").write_text(line + "\n", encoding="utf-8")
    print(line)
    return 0 if all(each["exit_code"] == 0 for each in results) else 1


def _run(part: Part) -> dict[str, Any]:
    begin = time.perf_counter()
    log = OUT / f"{part.name}.log"
    with log.open("wb") as errors:
        try:
            done = subprocess.run(
                [sys.executable, *part.arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                timeout=part.limit_s,
                check=False,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            code, output = done.returncode, done.stdout
        except subprocess.TimeoutExpired as error:
            code, output = 124, error.stdout or b""
    text = output.decode(errors="replace")
    with log.open("a", encoding="utf-8") as file:
        file.write(text)
    lines = text.strip().splitlines()
    result = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
    return {"part": part.name, "exit_code": code, "seconds": time.perf_counter() - begin, "result": result}


if __name__ == "__main__":
    sys.exit(main())
