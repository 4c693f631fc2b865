"""Calibrations killed at any moment end with the same contents as one that ran through."""

import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from test_calibrate import FEW, SMALL, TEXT, same, with_tokenizer

from tiercache.calibrate import settings as trying
from tiercache.calibrate.command import calibrate
from tiercache.calibrate.journal import Journal
from tiercache.errors import UsageError
from tiercache.store import catalog
from tiercache.store.calibration import PARTIAL_FILE, Calibration
from tiercache.store.planestore import PlaneStore

KILLS = 5
OPTIONS: dict[str, Any] = {**SMALL, "predictor_rank": 2}
StartChild = Callable[..., Any]


def _calibrate_and_tell(pipe: Connection, store: Path, die_at: int = 0, early: bool = False) -> None:
    """Dies at the so-many-th step that is put away, before or after it is; else tells how many steps it took."""
    torch.set_num_threads(1)
    trying.SHARES = FEW
    steps, true = 0, Journal.put

    def put(journal: Journal, **given: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == die_at and early:
            os._exit(9)
        true(journal, **given)
        if steps == die_at:
            os._exit(9)

    Journal.put = put
    pipe.send("begin")
    calibrate(store, TEXT, **OPTIONS)
    pipe.send(steps)


def _die_saving(pipe: Connection, store: Path, step: int) -> None:
    """Dies in the so-many-th change of a name or write of a file, once everything is measured."""
    torch.set_num_threads(1)
    trying.SHARES = FEW
    seen = 0

    def watched(true: Callable[..., Any]) -> Callable[..., Any]:
        def dying(*arguments: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == step:
                os._exit(9)
            return true(*arguments, **options)

        return dying

    catalog.write_values = watched(catalog.write_values)
    Path.replace = watched(Path.replace)
    Path.unlink = watched(Path.unlink)
    pipe.send("begin")
    calibrate(store, TEXT, **OPTIONS)
    pipe.send(seen)


@pytest.fixture(scope="module")
def reference(
    plane_store: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, start_child: StartChild
) -> tuple[Calibration, int, float]:
    """One that ran through, its steps and its seconds."""
    store = with_tokenizer(plane_store("llama"), tmp_path_factory.mktemp("through") / "store")
    process, pipe = start_child(_calibrate_and_tell, store)
    assert pipe.recv() == "begin"
    begin = time.monotonic()
    steps = pipe.recv()
    process.join()
    return Calibration.load(PlaneStore.open(store)), steps, time.monotonic() - begin


def test_killed_at_random_moments(
    plane_store: Callable[..., Path],
    tmp_path: Path,
    start_child: StartChild,
    reference: tuple[Calibration, int, float],
) -> None:
    whole, steps, whole_s = reference
    store = with_tokenizer(plane_store("llama"), tmp_path / "store")
    rng, kills, last = random.Random(4), 0, steps
    while True:
        process, pipe = start_child(_calibrate_and_tell, store)
        assert pipe.recv() == "begin"
        done = pipe.poll(rng.uniform(0.05, 0.4) * whole_s if kills < KILLS else 60)
        if done:
            last = pipe.recv()
            process.join()
            if kills:
                break
            whole_s /= 4  # the machine has become faster than it was when that was taken
            store = with_tokenizer(plane_store("llama"), tmp_path / f"again-{whole_s}")
            continue
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        with pytest.raises(UsageError, match="not calibrated"):
            Calibration.load(PlaneStore.open(store))
    assert last < steps, "it began from nothing"
    assert same(Calibration.load(PlaneStore.open(store)), whole)
    assert not (store / PARTIAL_FILE).exists()


def test_killed_around_any_step(
    plane_store: Callable[..., Path],
    tmp_path: Path,
    start_child: StartChild,
    reference: tuple[Calibration, int, float],
) -> None:
    whole, steps, _ = reference
    store = with_tokenizer(plane_store("llama"), tmp_path / "store")
    rng, deaths = random.Random(5), 0
    while True:
        process, pipe = start_child(_calibrate_and_tell, store, rng.randrange(2, steps // 2), rng.random() < 0.5)
        assert pipe.recv() == "begin"
        try:
            pipe.recv()
        except EOFError:
            deaths += 1
            process.join()
            continue
        process.join()
        break
    assert deaths >= 2
    assert same(Calibration.load(PlaneStore.open(store)), whole)


def test_killed_while_it_is_saved(
    plane_store: Callable[..., Path],
    tmp_path: Path,
    start_child: StartChild,
    reference: tuple[Calibration, int, float],
) -> None:
    whole = reference[0]
    store = with_tokenizer(plane_store("llama"), tmp_path / "store")
    for step in range(1, 20):  # all but the first try find everything measured
        process, pipe = start_child(_die_saving, store, step)
        assert pipe.recv() == "begin"
        try:
            pipe.recv()
        except EOFError:
            process.join()
            assert (store / PARTIAL_FILE).is_file()
            continue
        process.join()
        break
    assert step > 4
    assert same(Calibration.load(PlaneStore.open(store)), whole)
    assert not (store / PARTIAL_FILE).exists()
