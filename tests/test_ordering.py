"""What the tiers ask of a CUDA device is ordered by its streams and events, whatever the device makes of the rest.

No GPU is needed: see `fake_cuda`. Each planted fault must be found, and nothing in the code as it is.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import Stream, recording, stream
from mixed_oracle import mixed

import tiercache
from policies.precision import Recipe
from tiercache.compat import cache_kwargs, cache_out
from tiercache.errors import DoesNotFitError
from tiercache.tiers import device as devices

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
IDS = torch.arange(3, 12)[None]
CONTEXT = 64
Folders = Callable[..., Path]


@contextmanager
def opened(place: Path, precision: Any, *, dram: str | int = "64MiB", **options: Any) -> Iterator[Any]:
    """With as little HBM as there may be, so that units pass through."""
    chosen = {"context": CONTEXT, "logits": 32, "precision": precision, "dram": str(dram), "device": "cpu"} | options
    with tiercache.offload(place, hbm=str(smallest(place, chosen)), **chosen) as model:
        yield model


def smallest(place: Path, options: dict[str, Any], tier: str = "hbm") -> int:
    """The smallest budget that is not refused."""
    budget = 1 << 16
    while True:
        try:
            with tiercache.offload(place, **{**options, "hbm": "64MiB", tier: str(budget)}):
                return budget
        except DoesNotFitError as error:
            budget += error.missing_bytes


def passes(model: Any) -> list[torch.Tensor]:
    """Logits of a prefill, and of passes of other token counts after it, on streams by turns."""
    streams, found = [Stream(), Stream()], []
    with torch.inference_mode():
        output = model(input_ids=IDS, use_cache=True)
        cache = cache_out(output)
        found.append(output.logits)
        for place, tokens in enumerate((1, 3, 1, 8)):
            with stream(streams[place % 2]):
                output = model(input_ids=IDS[:, :tokens], **cache_kwargs(model, cache), use_cache=True)
            found.append(output.logits)
    return found


def little_dram(place: Path, precision: Any) -> int:
    """So little main memory that units pass through it as well."""
    return smallest(place, {"context": CONTEXT, "logits": 32, "precision": precision, "device": "cpu"}, "dram")


KINDS = ("checkpoint", "planes", "cpu_tokens", "drafted", "mixed", "little dram")


def run(kind: str, checkpoint: Folders, plane_store: Folders) -> list[torch.Tensor]:
    """A run of one kind: logits, or tokens."""
    if kind == "checkpoint":
        with opened(checkpoint("llama"), "source") as model:
            return passes(model)
    store = plane_store("llama")
    if kind == "little dram":
        with opened(store, "int8", dram=little_dram(store, "int8")) as model:
            return passes(model)
    if kind == "mixed":
        with mixed(store, Recipe("product", 1, 2, (0.2, 0.3, 0.2)), hbm="600KiB") as model:
            return passes(model)
    if kind == "drafted":
        with opened(store, "int8", drafter="resident", draft_nodes=8) as model:
            ids = torch.arange(3, 12)[None]
            return [model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)]
    with opened(store, "int8", cpu_tokens=3 if kind == "cpu_tokens" else 0) as model:
        return passes(model)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_out_of_order(kind: str, checkpoint: Folders, plane_store: Folders) -> None:
    wanted = run_plain(kind, checkpoint, plane_store)
    with recording() as ordering:
        found = run(kind, checkpoint, plane_store)
        gc.collect()
        assert ordering.faults == []
        assert len(ordering.streams) > 2, "copies have a stream of their own"
        assert ordering.registered == {}, "all is unlocked"
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def run_plain(kind: str, checkpoint: Folders, plane_store: Folders) -> list[torch.Tensor]:
    """The same with nothing to order, by the same kernels."""
    with recording(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "CpuDevice", devices.Device)
        return run(kind, checkpoint, plane_store)
