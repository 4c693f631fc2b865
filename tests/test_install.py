"""A wheel in a fresh environment without a compiler; what importing does; no network. Each in its own process."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import Any

import pytest
from test_cli import save_model, save_tokenizer

HOUSE = Path(__file__).parents[1]
MOST_S, TRIES = 1.5, 3  # of the processor: other programs slow it, and the issue names a figure

# Runs commands as a user would, in one process, since torch takes seconds to import.
COMMANDS = """
import json, sys, warnings
from typer.testing import CliRunner
from tiercache.cli import app
import tiercache
warnings.simplefilter("always")
found = {"package": tiercache.__file__}
for name, command in json.loads(sys.argv[1]).items():
    done = CliRunner(env={"NO_COLOR": "1"}).invoke(app, command)
    found[name] = [done.exit_code, done.stdout, done.stderr]
print(json.dumps(found))
"""

# Every try to reach another machine, or a server of this one, is noted and fails; so is each device that is opened.
WATCHED = """
import sys
seen = []
def watch(event, arguments):
    told = str(arguments[0]) if event == "open" else event
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind"):
        seen.append(event)
        raise OSError("no network here")
    if told.startswith(("/dev/nvidia", "/dev/dri", "/dev/kfd")):
        seen.append(told)
sys.addaudithook(watch)
"""

IMPORTED = (
    WATCHED
    + """
import json, os, threading, time
import torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
def threads(): return len(os.listdir("/proc/self/task"))
before, began = threads(), time.process_time()
import tiercache
for name in tiercache.__all__:
    getattr(tiercache, name)
took = time.process_time() - began
print(json.dumps([took, threads() - before, torch.cuda.is_initialized(), seen]))
"""
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("install") / "checkpoint"
    save_model(folder, layers=1)
    save_tokenizer(folder)
    return folder


def run(python: Path | str, code: str, *arguments: str, **variables: str) -> Any:
    """What a child prints last, as JSON; it has these variables and few others."""
    kept = ("HOME", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")
    variables |= {name: os.environ[name] for name in kept if name in os.environ}
    command = [str(python), "-c", code, *arguments]
    # not from this folder, which holds the packages too
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd="/")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment with this tree's wheel, and with today's dependencies, which are not fetched."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HOUSE / name, folder)
    for name in ("tiercache", "policies", "profiler"):
        shutil.copytree(HOUSE / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    made = subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder / "dist", folder],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl"), "nothing in it was compiled"
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *offline, wheel], check=True)
    site = Path(run(python, "import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))"))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "venv"


def test_a_wheel_works_without_a_compiler(installed: Path, checkpoint: Path, tmp_path: Path) -> None:
    run_it = ["run", str(checkpoint), "--prompt", "x", "--max-new-tokens", "4", "--json"]
    commands = {
        "bare": ["run", "--json"],
        "source": run_it,
        "convert": ["convert", str(checkpoint), str(tmp_path / "store"), "--plain"],
        "int4": [run_it[0], str(tmp_path / "store"), *run_it[2:], "--precision", "int4"],
        "doctor": ["doctor", "--json"],
    }
    variables = {"PATH": str(tmp_path), "TIERCACHE_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    found = run(installed / "bin" / "python", COMMANDS, json.dumps(commands), **variables)
    assert Path(found["package"]).is_relative_to(installed)

    code, out, err = found["bare"]  # the bundled model is the repository's, not the package's
    assert code == 2
    assert "name one: tiercache run MODEL" in err
    code, out, err = found["source"]
    assert code == 0, err
    assert "compiler" not in err
    code, out, err = found["int4"]
    assert code == 0, err
    assert "decoded before it is multiplied, which is slow" in err
    assert "install gcc" in err
    assert json.loads(out)["stats"]["kernels"] == "decode"
    rows = {row["name"]: row["state"] for row in json.loads(found["doctor"][1])["checks"]}
    assert (found["doctor"][0], rows["compiler"], rows["kernels"]) == (0, "warn", "warn")
    entry = subprocess.run([installed / "bin" / "tiercache", "--version"], capture_output=True, text=True, check=True)
    assert entry.stdout.startswith("tiercache ")


def test_importing_is_quick_and_quiet() -> None:
    """Beyond torch and transformers; naming all that is public loads everything that `offload` needs."""
    for _ in range(TRIES):
        took, threads, on_a_card, seen = run(sys.executable, IMPORTED, PYTHONPATH=str(HOUSE))
        assert (threads, on_a_card, seen) == (0, False, [])
        if took < MOST_S:
            return
    raise AssertionError(f"{took:.2f} s")


@pytest.mark.parametrize("told", ["", "1"])
def test_nothing_asks_the_network(checkpoint: Path, tmp_path: Path, told: str) -> None:
    """A folder wants no network in any case; a Hub id in the Hub's cache, where HF_HUB_OFFLINE says so."""
    revision = "0" * 40
    cached = tmp_path / "hub" / "models--somebody--small"
    shutil.copytree(checkpoint, cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    names = [str(checkpoint), *(["somebody/small"] if told else [])]
    store, options = str(tmp_path / "store"), ["--prompt", "x", "--max-new-tokens", "2"]
    commands = {name: ["run", name, *options] for name in names}
    commands |= {
        "convert": ["convert", str(checkpoint), store, "--plain"],
        "verify": ["verify", store],
        "store": ["run", store, "--precision", "int8", "--drafter", "ngram", *options],
    }
    code = WATCHED + COMMANDS.replace("print(", "found['seen'] = seen\nprint(")
    variables = {"PATH": os.environ["PATH"], "TIERCACHE_HOME": os.environ["TIERCACHE_HOME"]}
    variables |= {"HF_HUB_OFFLINE": told, "HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": str(HOUSE)}
    found = run(sys.executable, code, json.dumps(commands), **variables)
    assert [found[name][::2] for name in commands if found[name][0]] == []
    assert found["seen"] == []
    assert len(list((cached / "snapshots" / revision).iterdir())) == len(list(checkpoint.iterdir()))


def test_the_watch_sees_a_network() -> None:
    code = WATCHED + (
        "import json, socket\n"
        "try: socket.create_connection(('192.0.2.1', 80), 1)\n"
        "except OSError: pass\n"
        "print(json.dumps(seen))"
    )
    assert run(sys.executable, code) != []
