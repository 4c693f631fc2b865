"""Starts llama.cpp's measurement (`benchmarks.real.llamacpp`) in a process of its own, which leaves nothing in ours."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tiercache.errors import EnvironmentUnsupportedError


def llamacpp(gguf: Path, prompts: list[list[int]], answer: int, end: int) -> dict[str, Any]:
    """What it measures of itself over prompts, answers of `answer` tokens at most; why not, where it is not installed.

    Raises:
        EnvironmentUnsupportedError: it fails.
    """
    asked = {"gguf": str(gguf), "threads": torch.get_num_threads(), "tokens": answer, "end": end, "prompts": prompts}
    command = [sys.executable, "-m", "benchmarks.real.llamacpp"]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        if "No module named 'llama_cpp'" in done.stderr:
            return {"left_out": "llama-cpp-python is not installed; make peers"}
        raise EnvironmentUnsupportedError(f"llama.cpp fails on {gguf}: {done.stderr.strip().splitlines()[-1]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))
