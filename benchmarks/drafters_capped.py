"""One way of decoding in a process of its own, under a hard cap of RAM with the page cache in it.

`python -m benchmarks.drafters_capped JSON` is that process. Knows models and memory groups; nothing of tables.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.cgroup import drop_caches, run_capped
from tiercache.bench.timed_generation import Cell, Entry, ModelSetting, Sample, open_timed
from tiercache.config.sizes import human
from tiercache.errors import TiercacheError

_TIMEOUT_S = 7200.0
_CHECKOUT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class CappedSetting(ModelSetting):
    """A setting under a cap.

    Attributes:
        cap_bytes: of RAM for the whole process, page cache included; None where nothing is capped.
    """

    cap_bytes: int | None = None

    def text(self) -> str:
        """See `ModelSetting`."""
        return super().text() + (f", cap {human(self.cap_bytes)}" if self.cap_bytes else "")


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What one process measured.

    Attributes:
        samples: of each cell.
        drafting: the statistics of drafting, if there was any.
        exact: the model computes in fp32.
        peak_bytes: the most that the process and its page cache took; 0 where nobody looked.
    """

    samples: tuple[Sample, ...]
    drafting: dict[str, Any] | None
    exact: bool
    peak_bytes: int = 0


def measure(setting: ModelSetting, entry: Entry, cells: Sequence[Cell], warm: Cell, tokens: int) -> Visit:
    """Open the model, write a text of each cell, close it."""
    with open_timed(setting, entry) as own:
        own.warm(warm, tokens)
        samples = tuple(own.run(cell, tokens) for cell in cells)
        return Visit(samples=samples, drafting=own.drafting, exact=own.exact)


def visit(setting: CappedSetting, entry: Entry, cells: Sequence[Cell], warm: Cell, tokens: int) -> Visit:
    """`measure` in a process of its own under `setting.cap_bytes`, its files cold.

    Raises:
        TiercacheError: the process failed, or was killed for want of memory.
        EnvironmentUnsupportedError: nothing can be capped here.
    """
    assert setting.cap_bytes is not None
    case = {"setting": asdict(setting), "entry": asdict(entry), "cells": [asdict(cell) for cell in cells]}
    command = [sys.executable, "-m", "benchmarks.drafters_capped"]
    drop_caches(Path(setting.store))
    try:
        run = run_capped(
            [*command, json.dumps({**case, "warm": asdict(warm), "tokens": tokens})],
            setting.cap_bytes,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(_CHECKOUT), os.environ.get("PYTHONPATH", "")])},
            timeout_s=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise TiercacheError(
            f"{entry.drafter} under the cap took more than {_TIMEOUT_S:.0f} s; ask for fewer tokens or prompts"
        ) from error
    if run.oom_killed:
        raise TiercacheError(f"{entry.drafter} was killed for want of memory under {setting.text()}; raise --cap")
    if run.returncode:
        raise TiercacheError(
            f"{entry.drafter} under the cap ended with exit code {run.returncode}: {run.stderr.strip()[-400:]}"
        )
    found = json.loads(run.stdout.splitlines()[-1])
    samples = tuple(Sample(**{**sample, "text": tuple(sample["text"])}) for sample in found["samples"])
    return Visit(**{**found, "samples": samples, "peak_bytes": run.cgroup_peak_bytes})


def main(given: str) -> None:
    """Measure what `given` says, and print it as a line of JSON."""
    case = json.loads(given)
    cells = [Cell(**{**cell, "prompt": tuple(cell["prompt"])}) for cell in (*case["cells"], case["warm"])]
    try:
        found = measure(CappedSetting(**case["setting"]), Entry(**case["entry"]), cells[:-1], cells[-1], case["tokens"])
    except TiercacheError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main(sys.argv[1])
