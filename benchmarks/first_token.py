"""From the command to the first token: `tiercache run` beside the bare imports that it cannot do without.

    python -m benchmarks.first_token STORE [--other CHECKOUT]

Processes in turn: torch and the parts of transformers that a model and its tokenizer need, imported as Python does it,
then `tiercache run` with one token, and with `--other` that of another checkout. Seconds to the first byte of output
and to the end, and the processor's own, which other programs change less. Prints medians and one line of JSON.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_IMPORTS = """
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.llama import LlamaForCausalLM
print("first", flush=True)
"""
HERE = Path(__file__).parents[1]


@dataclass(frozen=True)
class Start:
    """One process: wall-clock and processor seconds.

    Attributes:
        first_s: to the first byte of its output.
        whole_s: to its end.
        processor_s: of all its threads, to its end.
    """

    first_s: float
    whole_s: float
    processor_s: float


def start(command: Sequence[str], checkout: Path) -> Start:
    """Run a command with a checkout's code, to its end.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    before = _processor_s()
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    pipes: dict[str, int] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # In the checkout, for Python looks for modules where it stands first.
    with subprocess.Popen(command, cwd=checkout, env=environment, **pipes) as process:
        assert process.stdout is not None
        os.read(process.stdout.fileno(), 1)
        first_s = time.perf_counter() - began
        _, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}: {said.decode()[-2000:]}")
    return Start(first_s, time.perf_counter() - began, _processor_s() - before)


def _processor_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(store: Path, others: Sequence[Path], tries: int, precision: str) -> dict[str, list[Start]]:
    """All processes in turn, after a first round that is not counted."""
    run = ["-m", "tiercache", "run", str(store), "--precision", precision, "--prompt", "The sea is"]
    run += ["--max-new-tokens", "1", "--quiet"]
    commands = {"imports": (["-c", _IMPORTS], HERE), "tiercache run": (run, HERE)}
    commands |= {f"tiercache run, {other}": (run, other) for other in others}
    found: dict[str, list[Start]] = {name: [] for name in commands}
    for _ in range(tries + 1):
        for name, (command, checkout) in commands.items():
            found[name].append(start([sys.executable, *command], checkout))
    return {name: starts[1:] for name, starts in found.items()}


def report(found: Mapping[str, Sequence[Start]]) -> str:
    """A table, and the same as one line of JSON."""
    lines = [
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; "
        f"medians of {len(next(iter(found.values())))}",
        f"{'first byte':>12}{'end':>10}{'processor':>12}",
    ]
    for name, starts in found.items():
        middle = [statistics.median(getattr(each, part) for each in starts) for part in asdict(starts[0])]
        lines.append(f"{middle[0]:10.2f} s{middle[1]:8.2f} s{middle[2]:10.2f} s  {name}")
    return "\n".join([*lines, json.dumps({name: [asdict(each) for each in starts] for name, starts in found.items()})])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_token", description="from command to first token")
    parser.add_argument("store", type=Path, help="a plane store")
    parser.add_argument("--other", type=Path, action="append", default=[], help="another checkout of this repository")
    parser.add_argument("--tries", type=int, default=5)
    parser.add_argument("--precision", default="int8")
    given = parser.parse_args(arguments)
    print(report(measure(given.store.absolute(), given.other, given.tries, given.precision)))


if __name__ == "__main__":
    main()
