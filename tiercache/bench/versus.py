"""Puts the peers beside tiercache: the same weights, one after another, each from a cold cache under the same RAM cap.

Knows how to start each as its own process, and reads the line of JSON that it ends with. Run it as
`python -m tiercache.bench`; `make bench` does.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiercache.bench import shapes
from tiercache.bench.cgroup import CappedRun, drop_caches, run_capped
from tiercache.config import human
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
        seed: of the weights.
    """

    shape: str
    cap_bytes: int
    tokens: int
    folder: Path
    seed: int = 0


def versus(contest: Contest) -> dict[str, Any]:
    """Run all three twice, in turn; the better median of each counts, since others may use the machine."""
    checkpoint = contest.folder / f"{contest.shape}-bf16-{contest.seed}"
    shapes.make_checkpoint(shapes.find(contest.shape), checkpoint, contest.seed)
    gguf = checkpoint.with_suffix(".gguf")
    if not gguf.is_file():
        _write_gguf(checkpoint, gguf)
    commands = _commands(contest, checkpoint, gguf)
    rows: dict[str, dict[str, Any]] = {}
    for name, command in [*commands.items(), *commands.items()]:
        drop_caches(checkpoint)
        drop_caches(gguf)
        row = _row(name, run_capped(command, contest.cap_bytes, env=_environment(), timeout_s=_TIMEOUT_S))
        if name not in rows or row["seconds_per_token"] < rows[name]["seconds_per_token"]:
            rows[name] = row
    ours = rows["tiercache"]["seconds_per_token"]
    faster = {name: row["seconds_per_token"] / ours for name, row in rows.items() if name != "tiercache"}
    return {
        "schema": SCHEMA,
        "shape": contest.shape,
        "cap_bytes": contest.cap_bytes,
        "rows": rows,
        "faster_than": faster,
    }


def report(result: dict[str, Any]) -> str:
    """A table for a person."""
    lines = [
        f"{result['shape']}, bf16, every process capped at {human(result['cap_bytes'])} of RAM, page cache included"
    ]
    for name, row in result["rows"].items():
        lines.append(
            f"  {name:<18} {row['seconds_per_token']:.3f} s a token, first pass {row['first_pass_s']:.2f} s, "
            f"peak RSS {human(row['peak_rss_bytes'])} (kernel: {human(row['kernel_rss_bytes'])}), "
            f"group {human(row['cgroup_peak_bytes'])}  {row['settings']}"
        )
    ours = result["rows"]["tiercache"]["bench"]
    lines.append(
        f"  the roof is {ours['roof_s']:.3f} s ({human(ours['pass_bytes']['ssd'])} a pass from the SSD at "
        f"{ours['roofs']['disk_gbps']:.2f} GB/s, measured in the same run); tiercache takes "
        f"{ours['over_roof']:.2f} x that"
    )
    lines += [f"  tiercache is {ratio:.2f} x as fast as {name}" for name, ratio in result["faster_than"].items()]
    return "\n".join(lines)


def _commands(contest: Contest, checkpoint: Path, gguf: Path) -> dict[str, list[str]]:
    tokens = ["--tokens", str(contest.tokens)]
    threads = ["--threads", str(len(os.sched_getaffinity(0)))]
    python = [sys.executable, "-m"]
    in_ram = max(0, contest.cap_bytes - _INTERPRETER_BYTES)
    spill = contest.folder / "transformers-spill"
    shape = ["--shape", contest.shape, "--seed", str(contest.seed), "--folder", str(contest.folder)]
    disk = ["--offload-dir", str(spill), "--cpu-memory", str(in_ram)]
    peers = "tiercache.bench.peers"
    return {
        "tiercache": [*python, "tiercache", "bench", *shape, *tokens, "--json"],
        "llama.cpp": [*python, f"{peers}.llamacpp", str(gguf), *tokens, *threads],
        "transformers-disk": [*python, f"{peers}.transformers_disk", str(checkpoint), *tokens, *disk, *threads],
    }


def _environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1"}


def _write_gguf(checkpoint: Path, gguf: Path) -> None:
    """In a process of its own, so that its memory is gone before anything is timed; bf16, as the checkpoint is."""
    program = (
        "import sys, pathlib; from tiercache.bench.peers.gguf_file import write_gguf; "
        "write_gguf(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), 'bf16')"
    )
    beside = gguf.with_suffix(".gguf.new")
    subprocess.run([sys.executable, "-c", program, str(checkpoint), str(beside)], check=True)
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
        "peak_rss_bytes": printed["peak_rss_bytes"],
        "settings": f"dram auto, {printed['hardware']['cores']} threads",
        "bench": printed,
    }
