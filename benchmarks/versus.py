"""Puts the peers beside tiercache: the same weights, one after another, each from a cold cache under the same RAM cap.

Knows how to start each as its own process, and reads the line of JSON that it ends with. Run it as
`python -m benchmarks`; `make bench` does.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.cgroup import CappedRun, drop_caches, run_capped
from tiercache.bench import shapes
from tiercache.config.sizes import human
from tiercache.errors import TiercacheError

SCHEMA = "tiercache.versus/1"
_INTERPRETER_BYTES = 576 << 20  # what a Python process with torch needs before it holds a weight
_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Contest:
    """What every contestant gets.

    Attributes:
        shape: name of the model's shape.
        cap_bytes: RAM of the process, page cache included.
        tokens: single-token passes to time.
        folder: where models are made.
        precision: "source" against bf16 peers, or "int4" against llama.cpp's q4_0.
        seed: of the weights.
    """

    shape: str
    cap_bytes: int
    tokens: int
    folder: Path
    precision: Literal["source", "int4"] = "source"
    seed: int = 0


def versus(contest: Contest) -> dict[str, Any]:
    """Run all twice, in turn; the better median of each counts, since others may use the machine."""
    model, gguf = _make(contest)
    commands = _commands(contest, model, gguf)
    rows: dict[str, dict[str, Any]] = {}
    for name, command in [*commands.items(), *commands.items()]:
        drop_caches(model)
        drop_caches(gguf)
        row = _row(name, run_capped(command, contest.cap_bytes, env=_environment(), timeout_s=_TIMEOUT_S))
        if name not in rows or row["seconds_per_token"] < rows[name]["seconds_per_token"]:
            rows[name] = row
    ours = rows["tiercache"]["seconds_per_token"]
    faster = {name: row["seconds_per_token"] / ours for name, row in rows.items() if name != "tiercache"}
    return {
        "schema": SCHEMA,
        "shape": contest.shape,
        "precision": contest.precision,
        "cap_bytes": contest.cap_bytes,
        "rows": rows,
        "faster_than": faster,
        "batch_faster_than": _batch_faster(rows),
    }


def _batch_faster(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How much faster a batch of tokens is than with each peer that was timed at it."""
    ours = rows["tiercache"]["batch_s"]
    return {name: row["batch_s"] / ours for name, row in rows.items() if name != "tiercache" and row["batch_s"]}


def report(result: dict[str, Any]) -> str:
    """A table for a person."""
    nature = "bf16" if result["precision"] == "source" else result["precision"]
    lines = [
        f"{result['shape']}, {nature}, every process capped at {human(result['cap_bytes'])} of RAM, page cache included"
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"  {name:<18} {row['seconds_per_token']:.3f} s a token, first pass {row['first_pass_s']:.2f} s, "
            f"{'' if row['batch_s'] is None else '32 tokens ' + format(row['batch_s'], '.2f') + ' s, '}"
            f"peak RSS {human(row['peak_rss_bytes'])} (kernel: {human(row['kernel_rss_bytes'])}), "
            f"group {human(row['cgroup_peak_bytes'])}  {row['settings']}"
        )
    ours = result["rows"]["tiercache"]["bench"]
    sizes, roofs = ours["pass_bytes"], ours["roofs"]
    lines.append(
        f"  the roof is {ours['roof_s']:.3f} s, bound by {ours['bound']}: of {human(sizes['needed'])} a pass "
        f"{human(sizes['ssd'])} come from the SSD at {roofs['disk_gbps']:.2f} GB/s, DRAM: {roofs['dram_gbps']:.1f} "
        f"GB/s, measured in the same run; tiercache takes {ours['over_roof']:.2f} x that"
    )
    lines += [f"  tiercache is {ratio:.2f} x as fast as {name}" for name, ratio in result["faster_than"].items()]
    for name, ratio in result["batch_faster_than"].items():
        lines.append(f"  tiercache takes 32 tokens at once {ratio:.2f} x as fast as {name}")
    return "\n".join(lines)


def _make(contest: Contest) -> tuple[Path, Path]:
    """The model's folder and its GGUF file."""
    dimensions = shapes.find(contest.shape)
    if contest.precision == "source":
        folder = contest.folder / f"{contest.shape}-bf16-{contest.seed}"
        shapes.make_checkpoint(dimensions, folder, contest.seed)
        program = "write_gguf(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), 'bf16')"
    else:
        folder = contest.folder / f"{contest.shape}-planes-{contest.seed}"
        shapes.make_store(dimensions, folder, contest.seed)
        config = "json.loads((pathlib.Path(sys.argv[1]) / 'config.json').read_text())"
        program = f"write_random_q4_0({config}, pathlib.Path(sys.argv[2]), {contest.seed})"
    gguf = folder.with_suffix(".gguf")
    if not gguf.is_file():
        _write_gguf(program, folder, gguf)
    return folder, gguf


def _commands(contest: Contest, model: Path, gguf: Path) -> dict[str, list[str]]:
    tokens = ["--tokens", str(contest.tokens)]
    threads = ["--threads", str(len(os.sched_getaffinity(0)))]
    python = [sys.executable, "-m"]
    in_ram = max(0, contest.cap_bytes - _INTERPRETER_BYTES)
    spill = contest.folder / "transformers-spill"
    shape = ["--shape", contest.shape, "--seed", str(contest.seed), "--folder", str(contest.folder)]
    shape += ["--precision", contest.precision]
    disk = ["--offload-dir", str(spill), "--cpu-memory", str(in_ram)]
    peers = "benchmarks.peers"
    ours = {"tiercache": [*python, "tiercache", "bench", "model", *shape, *tokens, "--json"]}
    llama = [*python, f"{peers}.llamacpp", str(gguf), *tokens, *threads]
    if contest.precision == "source":
        spilling = [*python, f"{peers}.transformers_disk", str(model), *tokens, *disk, *threads]
        return {**ours, "llama.cpp": llama, "transformers-disk": spilling}
    if contest.cap_bytes < gguf.stat().st_size:
        return {**ours, "llama.cpp": llama}
    llama += ["--batch"]
    return {**ours, "llama.cpp": llama, "llama.cpp repacked": [*llama, "--repack"]}


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def _write_gguf(program: str, model: Path, gguf: Path) -> None:
    """In a process of its own, so that its memory is gone before anything is timed."""
    program = f"import json, pathlib, sys; from benchmarks.peers import gguf_file; gguf_file.{program}"
    beside = gguf.with_suffix(".gguf.new")
    subprocess.run([sys.executable, "-c", program, str(model), str(beside)], check=True)
    beside.rename(gguf)


def _row(name: str, run: CappedRun) -> dict[str, Any]:
    if run.returncode != 0:
        cause = "it ran out of the cap's memory" if run.oom_killed else run.stderr.strip()[-400:]
        raise TiercacheError(f"{name} ended with exit code {run.returncode}: {cause}; see that `make peers` has passed")
    printed = json.loads(run.stdout.splitlines()[-1])
    row = {"kernel_rss_bytes": run.max_rss_bytes, "cgroup_peak_bytes": run.cgroup_peak_bytes}
    row["disk_read_bytes"] = run.disk_read_bytes
    if name != "tiercache":
        return {**printed, **row}
    return {
        **row,
        "seconds_per_token": printed["pass_s"],
        "first_pass_s": printed["prefill_s"],
        "batch_s": printed["batch_s"],
        "peak_rss_bytes": printed["peak_rss_bytes"],
        "settings": f"dram auto, {printed['hardware']['cores']} threads",
        "bench": printed,
    }
