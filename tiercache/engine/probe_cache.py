"""Keeps what a probe measured, one entry a machine, in LMDB; another machine's entry is not found.

Knows nothing of how it was measured.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lmdb
import torch

from profiler.figure import Figure
from profiler.hardware import Hardware, Memory, ReadRate
from profiler.host_memory import host_memory
from profiler.matmul_rates import MatmulRates
from profiler.processor import processor_name
from tiercache.config.options import home_folder
from tiercache.errors import TiercacheError, UsageError, permissions_named
from tiercache.kernels.select import select, will_compile
from tiercache.store.catalog import errors_translated
from tiercache.tiers.device import device_of

_FILE = "probe.mdb"
_MAP_BYTES = 16 << 20
_MEANING = 2  # raised where a figure comes to mean something else, or kernels change their speed
_FIGURES = ("cpu_gflops", "ssd_gbps", "overlap", "layer_s", "pass_s", "unit_s")


def identity(device: torch.device) -> dict[str, Any]:
    """Which machine this is: its processor, cores, memory and card."""
    return {
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": host_memory().total_bytes,
        "gpu": device_of(device).name,
    }


def fingerprint() -> str:
    """What figures depend on: the machine but for its card, kernels and versions."""
    parts = {
        **identity(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "kernels": select(torch.device("cpu")).name,
        "torch": torch.__version__,
        "figures": _MEANING,
    }
    return json.dumps(parts, sort_keys=True)


def keep(machine: Hardware) -> Path:
    """Write a machine's figures, in place of those that were there; gives the file.

    Raises:
        EnvironmentUnsupportedError: the cache folder takes no file.
        StoreError: the file is damaged.
    """
    path = home_folder() / _FILE
    with permissions_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with errors_translated(path, "remove it and probe again"), _open(path) as env, env.begin(write=True) as entries:
            entries.put(_key(), json.dumps(to_dict(machine)).encode())
    return path


def this_machine() -> Hardware:
    """What was measured of this machine.

    Raises:
        UsageError: nothing was.
        StoreError: the file is damaged.
    """
    path, found = home_folder() / _FILE, None
    if path.is_file():
        with (
            permissions_named(path),
            errors_translated(path, "remove it and probe again"),
            _open(path) as env,
            env.begin() as entries,
        ):
            found = entries.get(_key())
    if found is None:
        raise UsageError(
            "nothing was measured of this machine, or not with these versions; run 'tiercache-profile probe'"
        )
    return from_dict(json.loads(bytes(found)))


def measured_machine() -> Hardware | None:
    """What was measured of this machine, with these versions; None where nothing was, or where it cannot be read.

    For runs, which a cache must not stop; where nothing was ever kept it costs a look for a file.
    """
    if not (home_folder() / _FILE).is_file() or will_compile():
        return None
    try:
        return this_machine()
    except TiercacheError:
        return None


def to_dict(machine: Hardware) -> dict[str, Any]:
    """Plain data."""
    return asdict(machine)


def from_dict(found: Mapping[str, Any]) -> Hardware:
    """A machine from `to_dict`'s data after a way through JSON, which makes text of numbers that are keys."""
    dram = found["dram"]
    rates = [
        MatmulRates(
            each["bytes_per_weight"],
            each["weights"],
            _by_tokens(each["gbps"]),
            _by_tokens(each["activation_ns"]),
        )
        for each in found["matmuls"]
    ]
    return Hardware(
        gpu=None,
        dram=Memory(dram["capacity_bytes"], Figure(**dram["gbps"])),
        link_latency_s=found["link_latency_s"],
        matmuls=tuple(rates),
        reads=tuple(ReadRate(each["threads"], each["block_bytes"], Figure(**each["gbps"])) for each in found["reads"]),
        **{name: Figure(**found[name]) for name in _FIGURES},
    )


def _by_tokens(found: Mapping[str, Any]) -> dict[int, Figure]:
    return {int(tokens): Figure(**figure) for tokens, figure in found.items()}


def _open(path: Path) -> lmdb.Environment:
    return lmdb.open(str(path), subdir=False, map_size=_MAP_BYTES, mode=0o600)


def _key() -> bytes:
    return fingerprint().encode()
