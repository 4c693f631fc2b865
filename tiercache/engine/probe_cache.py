"""Keeps what a probe measured, and how predictions from it came out: one entry a machine, in LMDB.

Another machine's entry is not found. Knows nothing of how anything was measured.
"""

import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lmdb
import torch

from profiler.figure import Figure
from profiler.fitting import Pair, fitted
from profiler.hardware import Gpu, Hardware, Memory
from profiler.host_memory import host_memory
from profiler.matmul_rates import MatmulRates
from profiler.processor import processor_name
from profiler.read_rates import ReadRate
from tiercache.config import environment
from tiercache.config.cache_folder import made_folder
from tiercache.config.environment import home_folder
from tiercache.errors import EnvironmentUnsupportedError, StoreError, TiercacheError, UsageError
from tiercache.kernels.select import select, source_digest, will_compile
from tiercache.store.catalog import errors_translated
from tiercache.store.folders import locked
from tiercache.tiers.device import device_of, on_gpu

_FILE = "probe.mdb"
_WAY_OUT = "remove it and probe again"
_ALONE = threading.Lock()
_MAP_BYTES = 16 << 20
_MEANING = 7  # raised where a figure comes to mean something else, or layers change their speed
_FIGURES = ("cpu_gflops", "ssd_gbps", "overlap", "layer_s", "pass_s", "unit_s")
_PAIRS = 256  # the newest are kept
_CPU = torch.device("cpu")


def identity(device: torch.device) -> dict[str, Any]:
    """Which machine this is: its processor, cores, memory and card."""
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": host_memory().total_bytes,
        "gpu": device_of(device).name,
    }


def fingerprint(device: torch.device = _CPU) -> str:
    """What figures depend on: the machine, what computes, kernels, versions, and how threads wait for work.

    Threads that sleep meanwhile (OMP_WAIT_POLICY=passive) take as long to wake up as a small layer takes to compute.
    """
    parts = {
        **identity(device),
        "graphs": on_gpu(device) and environment.wants_cuda_graphs(),
        "device": str(device),  # of two like cards each has a slot of its own
        "threads": torch.get_num_threads(),
        "waiting": (environment.value("OMP_WAIT_POLICY") or "").lower(),
        "kernels": (select(device).name, source_digest(device)),
        "torch": torch.__version__,
        "figures": _MEANING,
    }
    return json.dumps(parts, sort_keys=True)


def keep(machine: Hardware, device: torch.device = _CPU) -> Path:
    """Write a machine's figures where `device` computes, in place of those that were there; gives the file.

    The pairs that were kept beside them go as well.

    Raises:
        EnvironmentUnsupportedError: the cache folder takes no file.
        StoreError: the file is damaged.
    """
    with _open() as env, env.begin(write=True) as entries:
        entries.put(_key(device), json.dumps(to_dict(machine)).encode())
        entries.delete(_pairs_key(device))
    return home_folder() / _FILE


def this_machine(device: torch.device = _CPU) -> Hardware:
    """What was measured of this machine where `device` computes, with the terms that were fitted to its runs.

    Raises:
        UsageError: nothing was.
        StoreError: the file is damaged.
    """
    found = _entry(_key(device))
    if found is None:
        raise UsageError(
            f"nothing was measured of this machine where {device} computes, or not with these versions and thread "
            f"settings; run 'tiercache-profile probe --device {device}'"
        )
    try:
        return from_dict(found)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{home_folder() / _FILE} holds no figures ({error!r}); {_WAY_OUT}") from error


def measured_machine(device: torch.device = _CPU) -> Hardware | None:
    """What was measured of this machine, with these versions; None where nothing was, or where it cannot be read.

    For runs, which a cache must not stop; where nothing was ever kept it costs a look for a file.
    """
    if not (home_folder() / _FILE).is_file() or will_compile():
        return None
    try:
        return this_machine(device)
    except TiercacheError:  # nothing was measured, or the file is damaged
        return None


def pairs(device: torch.device = _CPU) -> list[Pair]:
    """What was predicted of runs on this machine and what they took, oldest first; errors as of `this_machine`."""
    return [Pair.from_dict(each) for each in _entry(_pairs_key(device)) or []]


def add_pairs(new: Sequence[Pair], device: torch.device = _CPU) -> None:
    """Keep some more; the oldest go where there are many.

    Raises:
        EnvironmentUnsupportedError, StoreError: as `keep`.
    """
    with _open() as env, env.begin(write=True) as entries:
        found = entries.get(_pairs_key(device))
        kept = [*(json.loads(bytes(found)) if found else ()), *(asdict(pair) for pair in new)]
        entries.put(_pairs_key(device), json.dumps(kept[-_PAIRS:]).encode())


def refit(device: torch.device = _CPU) -> Hardware:
    """Fit this machine's terms to the pairs that are kept, and keep them; none where pairs are few.

    Raises:
        UsageError, EnvironmentUnsupportedError, StoreError: as `this_machine` and `keep`.
    """
    machine = replace(this_machine(device), fitted=fitted(pairs(device)))
    with _open() as env, env.begin(write=True) as entries:
        entries.put(_key(device), json.dumps(to_dict(machine)).encode())
    return machine


def to_dict(machine: Hardware) -> dict[str, Any]:
    """Plain data."""
    return asdict(machine)


def from_dict(found: Mapping[str, Any]) -> Hardware:
    """A machine from `to_dict`'s data after a way through JSON, which makes text of numbers that are keys."""
    dram = found["dram"]
    rates = [
        MatmulRates(
            each["bytes_per_weight"],
            **{name: _by_tokens(each[name]) for name in ("gbps", "activation_ns", "layer_s", "pass_s")},
            unit_s=_figure(each["unit_s"]),
        )
        for each in found["matmuls"]
    ]
    return Hardware(
        gpu=_gpu(found["gpu"]),
        dram=Memory(dram["capacity_bytes"], Figure(**dram["gbps"])),
        link_latency_s=found["link_latency_s"],
        pace=found["pace"],
        matmuls=tuple(rates),
        reads=tuple(ReadRate(each["threads"], each["block_bytes"], Figure(**each["gbps"])) for each in found["reads"]),
        attention_gflops=_figure(found["attention_gflops"]),
        loop_s=_figure(found["loop_s"]),
        handover_s=_figure(found["handover_s"]),
        fitted=_figures(found["fitted"]),
        copies=_figures(found["copies"]),
        **{name: Figure(**found[name]) for name in _FIGURES},
    )


def _figure(found: Mapping[str, Any] | None) -> Figure | None:
    return None if found is None else Figure(**found)


def _figures(found: Mapping[str, Any]) -> dict[str, Figure]:
    return {name: Figure(**figure) for name, figure in found.items()}


def _gpu(found: Mapping[str, Any] | None) -> Gpu | None:
    if found is None:
        return None
    memory = Memory(found["memory"]["capacity_bytes"], Figure(**found["memory"]["gbps"]))
    figures = {name: _figure(found[name]) for name in ("tflops", "link_gbps", "embodied_kg")}
    capability = None if found["capability"] is None else tuple(found["capability"])
    return Gpu(**{**found, **figures, "memory": memory, "capability": capability})


def _by_tokens(found: Mapping[str, Any]) -> dict[int, Figure]:
    return {int(tokens): Figure(**figure) for tokens, figure in found.items()}


@contextmanager
def _open(*, readonly: bool = False) -> Iterator[lmdb.Environment]:
    """The file; only one thread of a process may have it open. Whoever removes it holds the cache folder alone.

    Raises:
        EnvironmentUnsupportedError: it may not be read or written.
        StoreError: it is damaged.
    """
    path = home_folder() / _FILE
    try:
        with _ALONE, errors_translated(path, _WAY_OUT):
            if not readonly:
                made_folder(path.parent)
            with (
                locked(path.parent, None, shared=True),
                lmdb.open(str(path), subdir=False, map_size=_MAP_BYTES, mode=0o600, readonly=readonly) as env,
            ):
                if (env.info()["last_pgno"] + 1) * env.stat()["psize"] > path.stat().st_size:
                    raise StoreError(f"{path} was cut short; {_WAY_OUT}")  # to read on would end the process
                yield env
    except OSError as error:
        raise EnvironmentUnsupportedError(f"{path} cannot be used: {error.strerror}; see to the folder") from error


def _entry(key: bytes) -> Any:
    """What is kept under a key; None where there is nothing."""
    if not (home_folder() / _FILE).is_file():
        return None
    with _open(readonly=True) as env, env.begin() as entries:
        found = entries.get(key)
    try:
        return None if found is None else json.loads(bytes(found))
    except ValueError as error:
        raise StoreError(f"{home_folder() / _FILE} holds no figures ({error}); {_WAY_OUT}") from error


def _key(device: torch.device) -> bytes:
    return fingerprint(device).encode()


def _pairs_key(device: torch.device) -> bytes:
    return _key(device) + b" pairs"
