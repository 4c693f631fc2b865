"""lm-evaluation-harness as it is, over tasks in a local folder, with an attached model as its model. No network.

Knows the harness's public classes and the packages below it; of tiercache only what every attached model has. While it
runs, the Hub is set offline, data sets are cached in a temporary folder, and the generators that the harness seeds get
their state back.
"""

import contextlib
import io
import logging
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from tiercache.config import environment
from tiercache.errors import EnvironmentUnsupportedError, TiercacheError, UsageError

_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
_FEWSHOT_SEED = 1234  # the harness's own
_GENERATED = 256  # tokens that the harness asks for where a task does not say


class Harness:
    """The tasks of a folder, loaded once and run in each mode.

    Args:
        tasks, folder: the harness's tasks, by name, and where they were found.
        tokenizer: the model's.
        limit: items of each task, None for all.
        length: tokens of a request at most; the harness cuts longer ones from the left.
        cache: a folder for data sets.
    """

    def __init__(
        self, tasks: dict[str, Any], tokenizer: Any, limit: int | None, length: int, folder: Path, cache: Path
    ) -> None:
        self._tasks, self._tokenizer, self._limit, self._folder = tasks, tokenizer, limit, folder
        self._length, self._cache = length, cache
        self._items: dict[str, int] = {}
        self._cut, self.tokens = 0, 0
        for task in tasks.values():
            self._count_requests(task)
        if not self.tokens:
            raise UsageError(f"the tasks in {folder} hold no items; look at their data")

    @classmethod
    @contextmanager
    def open(cls, folder: Path, tokenizer: Any, *, limit: int | None, length: int) -> Iterator["Harness"]:
        """Load all tasks that lie in `folder`; paths in them may be relative to it.

        Raises EnvironmentUnsupportedError where the harness is not installed or a task wants the network, UsageError
        where there is no such folder, no task in it, or one that cannot be loaded.
        """
        _import()
        folder = folder.expanduser().resolve()
        if not folder.is_dir():
            raise UsageError(f"{folder} is no folder; name one with the harness's task files (*.yaml)")
        with tempfile.TemporaryDirectory(prefix="tiercache-tasks-") as cache:
            with _troubles_named(folder), _quietly(Path(cache), show=False), contextlib.chdir(folder):
                harness = cls(_load(folder), tokenizer, limit, length, folder, Path(cache))
            yield harness

    def run(self, model: Any, *, mixed: bool, show: bool | None = None) -> dict[str, dict[str, float]]:
        """Each task's metrics with an attached model, or any of transformers; `mixed`: neurons are chosen by token."""
        client = partial(
            _import().models.huggingface.HFLM,
            pretrained=model,
            tokenizer=self._tokenizer,
            batch_size=1,
            max_length=self._length,
            softmax_dtype="float32",  # or logarithms are taken in the logits' own bf16, some 0.03 off a token
        )
        with model.tiercache.every_token() if mixed else nullcontext():
            return self.scores(client, show=show)

    def scores(self, client: Callable[[], Any], *, show: bool | None = None) -> dict[str, dict[str, float]]:
        """Each task's metrics with what `client` makes: any of the harness's models, such as one behind a server."""
        visible = sys.stderr.isatty() if show is None else show
        with _quietly(self._cache, show=visible):
            found = _import().simple_evaluate(
                model=client(),
                tasks=list(self._tasks.values()),
                task_manager=_manager(self._folder),
                limit=self._limit,
                bootstrap_iters=0,
                log_samples=False,
            )
        return {name: _metrics(found["results"][name]) for name in self._tasks}

    def describe(self) -> dict[str, Any]:
        """Plain data: what was run, and how many requests were cut because they were too long."""
        about = {"lm_eval": version("lm_eval"), "folder": str(self._folder), "limit": self._limit}
        return {**about, "items": dict(self._items), "length": self._length, "cut": self._cut}

    def _count_requests(self, task: Any) -> None:
        """Find out how many tokens a pass will carry, and what is too long."""
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_FEWSHOT_SEED)
        task.build_all_requests(limit=self._limit, rank=0, world_size=1)
        self._items[task.task_name] = len({request.doc_id for request in task.instances})
        for request in task.instances:
            need = self._need(request)
            self.tokens = max(self.tokens, min(need, self._length))
            self._cut += need > self._length and request.request_type != "loglikelihood_rolling"  # that one goes on

    def _need(self, request: Any) -> int:
        """Tokens that the model is given for a request, those that it generates included."""
        prompt, *rest = request.args
        if request.request_type == "generate_until":
            new = int(rest[0].get("max_gen_toks", _GENERATED))
            if new >= self._length:
                raise UsageError(
                    f"task {request.task_name} generates {new} tokens, requests have {self._length} at most; raise "
                    "--length where the model allows it, or lower the task's max_gen_toks"
                )
            return self._count(prompt) + new
        whole = self._count(prompt + "".join(rest))
        return whole - 1 if prompt and rest else whole  # the last is only predicted; before an empty prompt comes one

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, verbose=False)["input_ids"])


def _import() -> Any:
    """The harness, imported without the network; raises EnvironmentUnsupportedError where it is not installed."""
    try:
        with environment.replaced(_OFFLINE), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # packages that it brings along
            for part in ("lm_eval.models.huggingface", "lm_eval.tasks"):
                import_module(part)
            return import_module("lm_eval")
    except ImportError as error:
        raise EnvironmentUnsupportedError(
            f"--tasks needs lm-evaluation-harness ({error}); install it: pip install 'lm-eval[hf]>=0.4.13'"
        ) from error


def _manager(folder: Path) -> Any:
    return _import().tasks.TaskManager(include_path=str(folder), include_defaults=False)


def _load(folder: Path) -> dict[str, Any]:
    manager = _manager(folder)
    if not manager.all_subtasks:
        raise UsageError(f"no task was found in {folder}; the harness wants YAML files (*.yaml) with a 'task:' line")
    found: dict[str, Any] = manager.load(manager.all_subtasks)["tasks"]
    return found


@contextmanager
def _troubles_named(folder: Path) -> Iterator[None]:
    """The harness and its packages raise whatever they like."""
    try:
        yield
    except TiercacheError:
        raise
    except ConnectionError as error:
        raise EnvironmentUnsupportedError(
            f"a task in {folder} wants the network ({_first_line(error)}); give it local data and metrics"
        ) from error
    except Exception as error:
        raise UsageError(
            f"the tasks in {folder} cannot be loaded ({type(error).__name__}: {_first_line(error)}); correct them"
        ) from error


def _metrics(found: dict[str, Any]) -> dict[str, float]:
    """The numbers among a task's results; `acc,none` is called `acc`."""
    numbers = {name: value for name, value in found.items() if "," in name and isinstance(value, int | float)}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


@contextmanager
def _quietly(cache: Path, *, show: bool) -> Iterator[None]:
    """Within, there is no network, no output, and the generators that the harness seeds get their state back."""
    with _offline(cache), _hushed(show=show), _same_randomness():
        yield


@contextmanager
def _offline(cache: Path) -> Iterator[None]:
    """No network, and data sets in `cache`, for packages that read such settings once, when imported."""
    hub, datasets = import_module("huggingface_hub.constants"), import_module("datasets.config")
    replaced = [
        (hub, "HF_HUB_OFFLINE", True),
        (datasets, "HF_HUB_OFFLINE", True),
        (datasets, "HF_DATASETS_OFFLINE", True),
        (datasets, "HF_DATASETS_CACHE", cache),
        (import_module("lm_eval.evaluator"), "get_git_commit_hash", lambda: None),  # of whatever folder this is
    ]
    with environment.replaced(_OFFLINE), ExitStack() as stack:
        for place, name, value in replaced:
            stack.enter_context(mock.patch.object(place, name, value))
        yield


@contextmanager
def _hushed(*, show: bool) -> Iterator[None]:
    """Standard output carries data only, so what the harness prints goes to standard error, or nowhere."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    with ExitStack() as stack:
        for logger in loggers:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if not show:
            nowhere = io.StringIO()
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield


@contextmanager
def _same_randomness() -> Iterator[None]:
    """Give the generators back the state that the harness's seeding takes from them."""
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count() if torch.cuda.is_available() else 0)):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
