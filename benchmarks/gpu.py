"""Everything a CUDA card can show in less than six minutes: `make gpu`.

Each part is a process with a time limit of its own, so that one that fails or hangs stops no other; the next one is
started early, to import meanwhile. What they print lies in `.gpu/`; a table comes last but one, a line of JSON last.
Needs no virtual environment. Parts may be named: python -m benchmarks.gpu roofs kernels
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_table import table

OUT = Path(".gpu")
LIMIT_S = 345.0  # of all parts together
_LEAST_S = 5.0  # no part is begun with less
_WORKERS = 10
_MEMORY_DISK, _MEMORY_DISK_BYTES = Path("/dev/shm"), 16 << 30


@dataclass(frozen=True)
class Part:
    """A process: its name, its module and its arguments, the seconds it may take."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float


def parts(models: Path) -> tuple[Part, ...]:
    """All of them, what matters most first; random models are made in the folder `models`."""

    def shape(name: str, *arguments: str) -> tuple[str, ...]:
        options = ("--folder", str(models), "--dram", "12GiB", "--json")
        return ("tiercache", "bench", "model", "--shape", name, *arguments, *options)

    int4 = ("--precision", "int4", "--hbm")
    tests = ("pytest", "-m", "gpu", "-n", str(_WORKERS), "-p", "no:cacheprovider", "-p", "no:benchmark")
    return (
        Part("compile", ("benchmarks.gpu_compile",), 60),
        Part("tests", (*tests, "--durations", "5", *map(str, marked_tests(Path("tests")))), 90),
        Part("offload", ("benchmarks.gpu_offload", str(models)), 90),
        Part("roofs", ("benchmarks.gpu_roofs",), 30),
        Part("kernels", ("benchmarks.gpu_kernels",), 70),
        Part("1b-int4-resident", shape("tinyllama-1.1b", *int4, "4GiB"), 45),
        Part("1b-offload", ("benchmarks.gpu_offload", str(models), "tinyllama-1.1b"), 60),
        Part("launches", ("benchmarks.gpu_launches", str(models / "tinyllama-1.1b-planes-0"), "launches"), 45),
        Part("graphs", ("benchmarks.gpu_launches", str(models / "tinyllama-1.1b-planes-0")), 30),
        Part("1b-int4-streamed", shape("tinyllama-1.1b", *int4, "400MiB"), 40),
        Part("70b-layers-int4-streamed", shape("llama-2-70b-4-layers", *int4, "2GiB"), 60),
        Part(
            "1b-mixed",
            shape("tinyllama-1.1b", "--precision", "int8", "--hbm", "711MiB", "--bytes-per-token", "0.5"),
            40,
        ),
        Part("probe", ("benchmarks.gpu_probe", tempfile.gettempdir()), 60),
    )


def marked_tests(folder: Path) -> list[Path]:
    """Files with tests that need a card, found by their text: the others import what a bare machine lacks."""
    marker = "pytest.mark." + "gpu"
    return sorted(path for path in folder.glob("test_*.py") if marker in path.read_text(encoding="utf-8"))


def main() -> int:
    """Run the parts that are named, or all; 5 without a card, 1 if one failed."""
    import torch

    if not torch.cuda.is_available():
        print("make gpu needs a CUDA card, and torch sees none; run 'tiercache doctor'", file=sys.stderr)
        return 5
    with tempfile.TemporaryDirectory(prefix="tiercache-gpu-", dir=_roomy_folder()) as folder:
        chosen = [part for part in parts(Path(folder)) if not sys.argv[1:] or part.name in sys.argv[1:]]
        results = run(chosen, OUT)
    found = {"schema": "tiercache.gpu/2", "card": torch.cuda.get_device_name(), "torch": torch.__version__}
    return finish({**found, "models_in": folder, "parts": results}, OUT)


def finish(found: dict[str, Any], out: Path) -> int:
    """Write and print the table, and the line of JSON after it; 1 if a part failed."""
    told, line = table(found["parts"]), json.dumps(found)
    (out / "gpu.json").write_text(line + "\n", encoding="utf-8")
    (out / "table.txt").write_text(f"{found['card']}, torch {found['torch']}\n\n{told}\n", encoding="utf-8")
    print(f"\n{told}\n", flush=True)
    print(line)
    return 0 if all(each["exit_code"] == 0 for each in found["parts"]) else 1


def run(chosen: Sequence[Part], out: Path, limit_s: float = LIMIT_S) -> list[dict[str, Any]]:
    """One part after the other; a line for each as soon as it ends."""
    out.mkdir(exist_ok=True)
    deadline, results = time.perf_counter() + limit_s, []
    following = _Process(chosen[0], out) if chosen else None
    for number, part in enumerate(chosen):
        process, following = following, None
        assert process is not None
        if number + 1 < len(chosen):
            following = _Process(chosen[number + 1], out)
        results.append(process.result(min(part.limit_s, deadline - time.perf_counter())))
        code = results[-1]["exit_code"]
        state = "ok" if code == 0 else f"exit code {code}"
        print(f"{part.name:<26} {results[-1]['seconds']:6.1f} s  {state}", flush=True)
    return results


class _Process:
    """A part that has been started, and waits until it may begin."""

    def __init__(self, part: Part, out: Path) -> None:
        self._part, self._log = part, out / f"{part.name}.log"
        with self._log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_start", *part.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # so that what it has started ends with it
            )

    def result(self, limit_s: float) -> dict[str, Any]:
        """Let it begin; what it printed last if that is JSON. 124: it took more than its limit, or none was left."""
        begin, code, output = time.perf_counter(), 124, b""
        try:
            if limit_s >= _LEAST_S:
                output, _ = self._process.communicate(b"begin\n", timeout=limit_s)
                code = self._process.returncode
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code == 124:
                output = self._end()
        text = output.decode(errors="replace")
        with self._log.open("a", encoding="utf-8") as file:
            file.write(text)
        lines = text.strip().splitlines()
        found = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None
        return {"part": self._part.name, "exit_code": code, "seconds": time.perf_counter() - begin, "result": found}

    def _end(self) -> bytes:
        """Nothing of it is left; what it has printed."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        output: bytes = self._process.communicate()[0]
        return output


def _roomy_folder() -> Path | None:
    """Where random models are written at memory's speed; None for the usual place."""
    if _MEMORY_DISK.is_dir() and shutil.disk_usage(_MEMORY_DISK).free >= _MEMORY_DISK_BYTES:
        return _MEMORY_DISK
    return None


if __name__ == "__main__":
    sys.exit(main())
