"""Who only plans or predicts waits for nothing: each module of policies and profiler is imported in under 50 ms."""

import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1]
MOST_S, TRIES = 0.05, 5
SHARE_OF_NUMPY = 0.5  # numpy takes some 0.1 s alone; imported in turn with it where the processor is slow
HEAVY = ("torch", "transformers", "numpy", "lmdb", "psutil", "matplotlib", "typer")
# The probe runs kernels. Of this machine's memory, psutil knows.
ALLOWED = {"profiler.probe": ("torch", "numpy"), "profiler.host_memory": ("psutil",)}
CODE = """
import sys, time
began = time.process_time()
import {module}
print(time.process_time() - began, *sorted({heavy!r} & sys.modules.keys()))
"""


def modules() -> list[str]:
    paths = [path for package in ("policies", "profiler") for path in (HOUSE / package).rglob("*.py")]
    parts = [path.relative_to(HOUSE).with_suffix("").parts for path in sorted(paths)]
    return [".".join(part[:-1] if part[-1] == "__init__" else part) for part in parts]


def imported(module: str) -> tuple[float, set[str]]:
    """Seconds of an import in a fresh process, waits for other programs left out; and the heavy packages it brought."""
    code = CODE.format(module=module, heavy=set(HEAVY))
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HOUSE)
    seconds, *heavy = found.stdout.split()
    return float(seconds), set(heavy)


@pytest.mark.parametrize("module", modules())
def test_a_module_is_imported_at_once(module: str) -> None:
    shares = []
    for _ in range(TRIES):  # other programs slow the processor from second to second
        seconds, heavy = imported(module)
        assert heavy <= set(ALLOWED.get(module, ())), heavy
        if seconds < MOST_S or module in ALLOWED:
            return
        shares.append(seconds / imported("numpy")[0])
    assert min(shares) < SHARE_OF_NUMPY, shares


def test_the_measurement_sees_what_is_slow_and_heavy() -> None:
    seconds, heavy = imported("numpy")
    assert seconds > 0.005
    assert heavy == {"numpy"}
