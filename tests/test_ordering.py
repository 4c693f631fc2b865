"""What the tiers ask of a CUDA device is ordered by its streams and events, whatever the device makes of the rest.

No GPU is needed: see `fake_cuda`. Each planted fault must be found, and nothing in the code as it is.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import FakeCudaDevice, Stream, recording, stream
from mixed_oracle import mixed

import tiercache
from policies.precision import Recipe
from policies.residency import Residency
from policies.types import Load, UnitPlacement
from tiercache.compat import cache_kwargs, cache_out
from tiercache.errors import DoesNotFitError, EnvironmentUnsupportedError
from tiercache.kernels.reference import ReferenceKernels
from tiercache.stats.run import TierStats
from tiercache.tiers import device as devices
from tiercache.tiers.arrivals import Pending
from tiercache.tiers.device import CudaDevice, Standstill, StreamCopies
from tiercache.tiers.last_reads import LastReads
from tiercache.tiers.slab import Slab
from tiercache.tiers.stack import TierStack
from tiercache.tiers.tier import Tier
from tiercache.tiers.transfer import Transfer

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
IDS = torch.arange(3, 12)[None]
CONTEXT = 64
RECIPE = Recipe("product", 1, 2, (0.2, 0.3, 0.2))
SLOT_BYTES = 8000  # of single neurons: about a third of what a token wants
Folders = Callable[..., Path]


@contextmanager
def opened(place: Path, precision: Any, *, dram: str | int = "64MiB", **options: Any) -> Iterator[Any]:
    """With as little HBM as there may be, so that units pass through."""
    chosen = {"context": CONTEXT, "logits": 32, "precision": precision, "dram": str(dram), "device": "cpu"} | options
    with tiercache.offload(place, hbm=str(smallest(place, chosen)), **chosen) as model:
        yield model


_SMALLEST: dict[str, int] = {}  # by place, options and tier


def smallest(place: Path, options: dict[str, Any], tier: str = "hbm") -> int:
    """The smallest budget that is not refused."""
    known, budget = repr((place, sorted(options.items()), tier)), 1 << 16
    while known not in _SMALLEST:
        try:
            with tiercache.offload(place, **{**options, "hbm": "64MiB", tier: str(budget)}):
                _SMALLEST[known] = budget
        except DoesNotFitError as error:
            budget += error.missing_bytes
    return _SMALLEST[known]


def passes(model: Any, on_streams: bool) -> list[torch.Tensor]:
    """Logits of a prefill, and of passes of other token counts after it, on streams by turns."""
    streams, found = [Stream(), Stream()] if on_streams else [], []
    with torch.inference_mode():
        output = model(input_ids=IDS, use_cache=True)
        cache = cache_out(output)
        found.append(output.logits)
        for place, tokens in enumerate((1, 3, 1, 8)):
            with stream(streams[place % 2]) if streams else nullcontext():
                output = model(input_ids=IDS[:, :tokens], **cache_kwargs(model, cache), use_cache=True)
            found.append(output.logits)
    return found


def little_dram(place: Path, precision: Any) -> int:
    """So little main memory that units pass through it as well."""
    options = {"context": CONTEXT, "logits": 32, "precision": precision, "device": "cpu", "cpu_tokens": 0}
    return smallest(place, options, "dram")


KINDS = ("checkpoint", "planes", "cpu_tokens", "drafted", "mixed", "little dram")


def run(kind: str, checkpoint: Folders, plane_store: Folders, *, on_streams: bool = True) -> list[torch.Tensor]:
    """A run of one kind: logits, or tokens."""
    if kind == "checkpoint":
        with opened(checkpoint("llama"), "source") as model:
            return passes(model, on_streams)
    store = plane_store("llama")
    if kind == "little dram":
        with opened(store, "int8", dram=little_dram(store, "int8"), cpu_tokens=0) as model:
            return passes(model, on_streams)
    if kind == "mixed":
        with mixed(store, RECIPE, hbm="64MiB") as model:
            plan = model.tiercache.plan.hbm
        with mixed(store, RECIPE, hbm=sum(plan.reserved_bytes.values()) + plan.slab_bytes + SLOT_BYTES) as model:
            return passes(model, on_streams)
    if kind == "drafted":
        with opened(store, "int8", drafter="resident", draft_nodes=8) as model:
            ids = torch.arange(3, 12)[None]
            return [model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)]
    with opened(store, "int8", cpu_tokens=3 if kind == "cpu_tokens" else 0) as model:
        return passes(model, on_streams)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_out_of_order(kind: str, checkpoint: Folders, plane_store: Folders) -> None:
    wanted = run_plain(kind, checkpoint, plane_store)
    with recording() as ordering:
        found = run(kind, checkpoint, plane_store)
        gc.collect()
        assert ordering.faults == []
        assert len(ordering.streams) >= 2, "copies have a stream of their own"
        assert ordering.registered == {}, "all is unlocked"
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


def no_event_of_the_reader(patch: pytest.MonkeyPatch) -> None:
    """A missing event: a slot is filled while a kernel reads it."""
    patch.setattr(CudaDevice, "last_use", lambda self: torch.cuda.Event())


def no_event_of_the_copy(patch: pytest.MonkeyPatch) -> None:
    """Another one: a slot is read while it is filled."""
    patch.setattr(CudaDevice, "stand_until", lambda self, event: Standstill(None, None))


def recycled_early(patch: pytest.MonkeyPatch) -> None:
    """The slot in main memory is given back under the copy."""
    patch.setattr(StreamCopies, "wait", lambda self: None)


def on_the_wrong_stream(patch: pytest.MonkeyPatch) -> None:
    """Not the stream whose event is waited for."""
    right = Transfer._move

    def move(transfer: Transfer, *given: Any) -> None:
        with torch.cuda.stream(torch.cuda.Stream(CPU)):
            right(transfer, *given)

    patch.setattr(Transfer, "_move", move)


def unregistered_before_it_is_done(patch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the device before memory is unlocked."""
    patch.setattr(CudaDevice, "synchronize", lambda self: None)


def nobody_follows(patch: pytest.MonkeyPatch) -> None:
    """A pass on another stream begins while the one before it is under way."""
    patch.setattr(TierStack, "follow_stream", lambda self: None)


@pytest.mark.parametrize(
    ("plant", "kind", "told"),
    [
        (no_event_of_the_reader, "checkpoint", "is not after"),
        (no_event_of_the_reader, "planes", "is not after"),
        (no_event_of_the_copy, "checkpoint", "is not after"),
        (recycled_early, "little dram", "a read from the disk on the host is not after"),
        (on_the_wrong_stream, "checkpoint", "is not after"),
        (unregistered_before_it_is_done, "mixed", "its memory was unlocked on the host is not after"),
        (nobody_follows, "mixed", "is not after"),
    ],
)
def test_a_planted_fault_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], kind: str, told: str, checkpoint: Folders, plane_store: Folders
) -> None:
    with recording() as ordering, pytest.MonkeyPatch.context() as patch:
        plant(patch)
        run(kind, checkpoint, plane_store)
        gc.collect()
    assert any(told in fault for fault in ordering.faults), ordering.faults[:5]


def test_use_after_close_is_found(checkpoint: Folders) -> None:
    with recording() as ordering:
        with tiercache.offload(checkpoint("llama"), hbm="64MiB", dram="64MiB", context=CONTEXT, device="cpu") as model:
            kept = next(each for each in model.parameters() if ordering.pinned(each.data) is False).data
        assert ordering.faults == []
        kept.sum()
    assert any("its slab was closed" in fault for fault in ordering.faults)


def test_the_checker_itself() -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    with recording() as ordering:
        ordering.allocated(memory, pinned=False)
        one, other = Stream(), Stream()
        with stream(one):
            memory[:32].fill_(1)
        with stream(other):
            memory[32:].fill_(1)
        assert ordering.faults == [], "other bytes"
        with stream(other):
            other.wait_stream(one)
            memory[:32].sum()
            memory[16:].fill_(2)
        with stream(one):
            memory[:16].sum()
        assert ordering.faults == [], "reads may overlap"
        with stream(one):
            memory[:8].fill_(3)
        assert len(ordering.faults) == 1, "the other stream's read is not known to be over"
        torch.cuda.synchronize()
        with stream(one):
            memory.fill_(4)
        assert len(ordering.faults) == 1, "the host has waited, and launches come after that"


class Plain(devices.CpuDevice):
    """Does everything at once; tensors lie as a GPU wants them, for the CPU's products depend on it."""

    wants_aligned = True


def run_plain(kind: str, checkpoint: Folders, plane_store: Folders) -> list[torch.Tensor]:
    """The same run where there is nothing to order, by the same kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "CpuDevice", Plain)
        patch.setattr("tiercache.engine.machine.select", ReferenceKernels)
        return run(kind, checkpoint, plane_store, on_streams=False)


def test_a_slot_is_filled_after_all_that_read_its_bytes() -> None:
    """Whatever the streams: one event of the last reader would not do."""
    sizes = {0: 100, 1: 100, 2: 200}
    waits: dict[int, list[Any]] = {}

    def fill(key: int, slot: torch.Tensor, after: Any) -> Any:
        waits.setdefault(key, []).append([event.clock for event in after])
        return Arrived()

    with recording():
        placement = UnitPlacement((), 0, 200)
        tier = Tier(Slab(200, CPU), Residency([0, 1, 2], sizes, placement), sizes, fill, TierStats(200), cause=told)
        streams = [Stream(), Stream()]
        for key in (0, 1):
            tier.acquire(key)
        for key in (1, 0):
            with stream(streams[key]):
                tier.release(key)
        tier.acquire(2)
        names = {each.name for each in streams}
        assert {name for clock in waits[2][0] for name in clock if name in names} == names
        with stream(streams[0]):
            tier.release(2)
        tier.acquire(0)
        assert len(waits[0][1]) == len(waits[1][1]) == 1, "half of what the last unit's reader is waited for by each"
        tier.close()


class Arrived:
    """Bytes that are there."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return None

    def cancel(self) -> None:
        pass


def told(pending: Pending, begin: float) -> dict[str, float]:
    return {}


def test_a_load_that_was_given_up_waits_for_nobody_else() -> None:
    reads = LastReads()
    reads.add(Load(0, 100, 50), "a")
    reads.add(Load(1, 150, 50), "b")
    reads.add(Load(2, 200, 50), None)
    found = reads.over(Load(3, 120, 40))
    assert [read.until for read in found] == ["a", "b"]
    reads.covered(Load(3, 120, 40))
    assert reads.over(Load(4, 120, 40)) == []
    assert [(read.start, read.end) for read in reads.over(Load(4, 0, 1000))] == [(100, 120), (160, 200)]
    reads.put_back(found)
    assert [read.until for read in reads.over(Load(4, 120, 40))] == ["a", "b"]


def test_locked_memory_stays_locked_as_long_as_it_is_there() -> None:
    with recording() as ordering:
        slab = Slab(1 << 20, CPU, pinned_for=CPU)
        slot = slab.slot(100, 10)
        assert len(ordering.registered) == 1
        del slab
        gc.collect()
        assert len(ordering.registered) == 1, "a tensor over it is left"
        del slot
        gc.collect()
        assert ordering.registered == {}, "nobody had to close it"
        again = Slab(1 << 20, CPU, pinned_for=CPU)
        again.close()
        assert ordering.registered == {}
        again.close()
        Slab(0, CPU, pinned_for=CPU).close()
    assert ordering.faults == []


def test_memory_is_locked_for_the_device_that_copies() -> None:
    with recording() as ordering:
        memory = devices.PinnedMemory(4096, CudaDevice(torch.device("cuda", 1)))
        assert [device for _, device in ordering.registered.values()] == [torch.device("cuda", 1)]
        memory.unlock()
        assert ordering.unlocked_for == [torch.device("cuda", 1)]


def test_what_torch_keeps_of_a_card_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuBLAS's workspace is an allocation of torch's, which `empty_cache` alone leaves."""
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: told.append("workspaces"), raising=False)
    with recording():
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: told.append("cache"))
        CudaDevice(CPU).release_cache()
    assert told == ["workspaces", "cache"]


@pytest.mark.parametrize("kind", ["checkpoint", "planes", "mixed"])
def test_an_allocation_that_fails_leaves_nothing(
    kind: str, checkpoint: Folders, plane_store: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "passes", lambda model, on_streams: [])  # nothing is allocated in them
    for _ in range(2):  # the first finds out what the smallest budgets are
        with recording():
            run(kind, checkpoint, plane_store)
            allocations = FakeCudaDevice.allocations
    assert allocations > 3
    for fail_at in range(1, allocations + 1):
        with recording() as ordering:
            FakeCudaDevice.fail_at = fail_at
            with pytest.raises(EnvironmentUnsupportedError, match="out of memory, for a test"):
                run(kind, checkpoint, plane_store)
            gc.collect()
            assert ordering.registered == {}
            assert ordering.taken_bytes == 0
            assert ordering.faults == []


@pytest.mark.parametrize("cpu_tokens", [0, 3])
def test_ctrl_c_at_any_step_leaves_the_order(cpu_tokens: int, plane_store: Folders) -> None:
    store = plane_store("llama")
    with recording() as ordering:
        with opened(store, "int8", cpu_tokens=cpu_tokens) as model, torch.inference_mode():

            def both() -> list[torch.Tensor]:
                return [model(input_ids=IDS[:, :tokens]).logits for tokens in (9, 2)]

            wanted, before = both(), ordering.asked
            both()
            steps, interrupted = ordering.asked - before, 0
            for step in range(1, steps + 1, max(1, steps // 24)):
                ordering.interrupt_at = ordering.asked + step
                try:
                    both()
                except KeyboardInterrupt:
                    interrupted += 1
                ordering.interrupt_at = -1
                assert all(torch.equal(one, other) for one, other in zip(both(), wanted, strict=True)), step
        assert interrupted > 10, "how often events are asked for depends on who is first"
        gc.collect()
        assert ordering.registered == {}
    assert ordering.faults == []
