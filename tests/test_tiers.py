"""Tiers stacked on host memory over a disk of known bytes: right bytes, honest numbers, clean ends."""

import os
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_all
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from policies.pinned import place, smallest_bytes
from policies.plan import PlanInputs
from policies.residency import Residency
from policies.types import Key, UnitPlacement
from tiercache.engine.budgets import fill_tiers
from tiercache.errors import ClosedError, DoesNotFitError, EnvironmentUnsupportedError, StoreError
from tiercache.stats.run import TierStats
from tiercache.store.checkpoint import Checkpoint
from tiercache.store.format import BLOCK_BYTES
from tiercache.store.manifest import Manifest
from tiercache.store.manifests import checkpoint_manifest
from tiercache.store.reader import Reader
from tiercache.tiers.arrivals import Pending
from tiercache.tiers.slab import Slab
from tiercache.tiers.stack import CallersTier, TierStack
from tiercache.tiers.tier import Tier, waited_for_ssd
from tiercache.tiers.transfer import CopyTicket, Span, Transfer

CPU = torch.device("cpu")
Event = tuple[str, Key]


def content(key: Key, nbytes: int) -> torch.Tensor:
    """The bytes of a key, different from every other key's."""
    return torch.from_numpy(((np.arange(nbytes) * 7 + key * 31 + 1) % 251).astype(np.uint8))


class InterruptedWaitError(BaseException):
    """Stands in for the KeyboardInterrupt that would end the whole run."""


class Arrival:
    """A read of the fake disk."""

    def __init__(self, future: "Future[None]", interrupts: list[BaseException]) -> None:
        self._future, self._interrupts = future, interrupts

    def done(self) -> bool:
        return self._future.done() and not self._interrupts

    def wait(self) -> None:
        if self._interrupts:
            raise self._interrupts.pop()
        self._future.result()

    def cancel(self) -> None:
        if not self._future.cancel():
            wait_all([self._future])


class Disk:
    """Fills slots with their keys' bytes, on threads, each after a while; some reads fail."""

    def __init__(self, delay_s: Callable[[], float]) -> None:
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="test-disk")
        self._delay_s = delay_s
        self.failures: dict[Key, list[Exception]] = {}  # of the reads to come
        self.interrupts: dict[Key, list[BaseException]] = {}  # of the waits for them
        self.finished = 0

    def fill(self, key: Key, slot: torch.Tensor, after: object) -> Arrival:
        return Arrival(self._pool.submit(self._read, key, slot), self.interrupts.get(key, []))

    def _read(self, key: Key, slot: torch.Tensor) -> None:
        middle = len(slot) // 2
        slot[:middle] = content(key, len(slot))[:middle]
        time.sleep(self._delay_s())
        if self.failures.get(key):
            raise self.failures[key].pop()
        slot[middle:] = content(key, len(slot))[middle:]
        self.finished += 1

    def close(self) -> None:
        self._pool.shutdown(wait=True)


@dataclass
class House:
    """One tier over the disk, or two, and everything they said."""

    top: Tier
    dram: Tier
    disk: Disk
    sizes: dict[Key, int]
    traces: dict[str, list[Event]]
    tickets: list[Pending] = field(default_factory=list)

    def use(self, key: Key) -> None:
        """Take a key, compare its bytes before and after some time of use, give it back."""
        slot = self.top.acquire(key)
        assert torch.equal(slot, content(key, self.sizes[key]))
        time.sleep(0.0002)
        assert torch.equal(slot, content(key, self.sizes[key]))
        self.top.release(key)

    def run(self, keys: Iterable[Key]) -> None:
        """Use them one after another."""
        for key in keys:
            self.use(key)

    def settle(self) -> None:
        """Return when nothing is under way."""
        for ticket in self.tickets:
            if isinstance(ticket, CopyTicket):
                wait_all([ticket.future])


def placement_of(sizes: Mapping[Key, int], order: Sequence[Key], spare: int) -> UnitPlacement:
    return place(order, sizes, smallest_bytes(order, sizes) + spare, 0)


def tier_of(
    name: str, sizes: dict[Key, int], order: Sequence[Key], placement: UnitPlacement, fill: Callable, traces: dict
) -> Tier:
    capacity = placement.pinned_bytes + placement.ring_bytes
    return Tier(
        Slab(capacity, CPU),
        Residency(order, sizes, placement),
        sizes,
        fill,
        TierStats(capacity),
        cause=waited_for_ssd if name == "dram" else lambda pending, begin: pending.causes(begin),
        observe=lambda event, key: traces.setdefault(name, []).append((event, key)),
    )


@contextmanager
def house(
    sizes: dict[Key, int],
    dram_spare: int,
    hbm_spare: int | None = None,
    *,
    delay_s: Callable[[], float] = lambda: 0.0,
    transfer: type[Transfer] = Transfer,
) -> Iterator[House]:
    """The tiers of a scan over `sizes`, with so many bytes above the least that each needs."""
    traces: dict[str, list[Event]] = {"dram": [], "hbm": []}
    tickets: list[Pending] = []
    disk = Disk(delay_s)
    order = list(sizes)
    with ExitStack() as stack:
        stack.callback(disk.close)
        if hbm_spare is None:
            dram = tier_of("dram", sizes, order, placement_of(sizes, order, dram_spare), disk.fill, traces)
            stack.callback(dram.close)
            dram.load_pinned(lambda _: None)
            yield House(dram, dram, disk, sizes, traces)
            return
        above = placement_of(sizes, order, hbm_spare)
        rest = [key for key in order if key not in above.pinned]
        ring = max(sizes.values()) + dram_spare
        dram = tier_of("dram", sizes, above.pinned, UnitPlacement((), 0, ring), disk.fill, traces)
        dram.decide(Residency(above.pinned, sizes, UnitPlacement((), 0, ring), once=True))
        stack.callback(dram.close)
        mover = transfer(dram, {key: [Span(0, 0, size)] for key, size in sizes.items()}, CPU)
        stack.callback(mover.close)

        def fill(key: Key, slot: torch.Tensor, after: object) -> CopyTicket:
            tickets.append(mover.fill(key, slot, after))
            return tickets[-1]

        hbm = tier_of("hbm", sizes, order, above, fill, traces)
        stack.callback(hbm.close)
        hbm.load_pinned(lambda _: None)
        below = place(rest, sizes, ring, 0) if rest else UnitPlacement((), 0, 0)
        dram.decide(Residency(rest, sizes, below))
        dram.load_pinned(lambda _: None)
        yield House(hbm, dram, disk, sizes, traces, tickets)


@dataclass(frozen=True)
class Walk:
    """Sizes, memory and the keys that the consumer asks for."""

    sizes: dict[Key, int]
    dram_spare: int
    hbm_spare: int | None
    keys: list[Key]
    seed: int

    def delay_s(self) -> Callable[[], float]:
        rng = random.Random(self.seed)
        return lambda: rng.choice([0.0, 0.0, 0.0005, 0.002])


@st.composite
def walks(draw: st.DrawFn, *, jumps: bool) -> Walk:
    count = draw(st.integers(1, 7))
    sizes = {key: draw(st.integers(1, 900)) for key in range(count)}
    total = sum(sizes.values())
    spare = st.integers(0, total)
    keys = list(range(count)) * 4
    if jumps:
        for _ in range(draw(st.integers(1, 6))):
            keys.insert(draw(st.integers(0, len(keys))), draw(st.integers(0, count - 1)))
    return Walk(sizes, draw(spare), draw(st.none() | spare), keys, draw(st.integers(0, 2**16)))


def replayed(trace: Sequence[Event], residency: Residency) -> list[Event]:
    """What a fresh `Residency` decides when asked for the hits and misses of a trace, and told of its evictions."""
    said: list[Event] = []

    def load_all() -> None:
        while (load := residency.next_load()) is not None:
            said.append(("load", load.key))

    for load in residency.pinned:
        said.append(("load", load.key))
    for event, key in trace:
        if event in ("hit", "miss"):
            answer = residency.acquire(key)
            said.extend(("drop", dropped) for dropped in answer.dropped)
            said.append(("hit" if answer.hit else "miss", key))
            load_all()
            residency.hold(key)
        elif event == "evict":
            residency.release(key)
            said.append(("evict", key))
            load_all()
    return said


def check_account(stats: TierStats, trace: Sequence[Event], sizes: Mapping[Key, int], pinned: Sequence[Key]) -> None:
    """The counters are the sums of what was told to the observer, and they add up."""
    counts = Counter(event for event, _ in trace)
    sums: Counter[str] = Counter()
    for event, key in trace:
        sums[event] += sizes[key]
    assert (stats.hits, stats.misses) == (counts["hit"], counts["miss"])
    assert (stats.hit_bytes, stats.miss_bytes) == (sums["hit"], sums["miss"])
    assert stats.needed_bytes == stats.hit_bytes + stats.miss_bytes
    assert (stats.loaded_bytes, stats.dropped_bytes) == (sums["load"], sums["drop"])
    waiting = stats.loaded_bytes - stats.dropped_bytes - stats.miss_bytes - sum(sizes[key] for key in pinned)
    assert 0 <= waiting <= stats.capacity_bytes
    assert 0 < stats.peak_bytes <= stats.capacity_bytes
    assert counts["evict"] == counts["miss"]


@settings(max_examples=60)
@given(walks(jumps=False))
def test_the_scan_gets_its_bytes_and_the_numbers_add_up(walk: Walk) -> None:
    with house(walk.sizes, walk.dram_spare, walk.hbm_spare, delay_s=walk.delay_s()) as tiers:
        for key in walk.keys:
            tiers.use(key)
        tiers.settle()
        top = tiers.traces["dram" if walk.hbm_spare is None else "hbm"]
        stays = [key for key in walk.sizes if tiers.top.pinned_slot(key) is not None]
        check_account(tiers.top.stats, top, walk.sizes, stays)
        assert tiers.top.stats.dropped_bytes == 0
        assert tiers.top.stats.hits == 4 * len(stays)
        assert tiers.top.stats.needed_bytes == sum(walk.sizes[key] for key in walk.keys)
        if tiers.dram is not tiers.top:
            assert tiers.dram.stats.needed_bytes == tiers.top.stats.loaded_bytes
            assert tiers.dram.stats.dropped_bytes == 0


@settings(max_examples=60)
@given(walks(jumps=True))
def test_jumps_get_their_bytes_too(walk: Walk) -> None:
    with house(walk.sizes, walk.dram_spare, walk.hbm_spare, delay_s=walk.delay_s()) as tiers:
        for key in walk.keys:
            tiers.use(key)
        tiers.settle()
        top = tiers.traces["dram" if walk.hbm_spare is None else "hbm"]
        stays = [key for key in walk.sizes if tiers.top.pinned_slot(key) is not None]
        check_account(tiers.top.stats, top, walk.sizes, stays)
        if tiers.dram is not tiers.top:  # what was dropped before it was asked for below is no request
            asked, loaded = tiers.dram.stats.needed_bytes, tiers.top.stats.loaded_bytes
            assert loaded - tiers.top.stats.dropped_bytes <= asked <= loaded


@settings(max_examples=60)
@given(walks(jumps=True))
def test_a_recorded_trace_replays_to_the_same_decisions(walk: Walk) -> None:
    with house(walk.sizes, walk.dram_spare, delay_s=walk.delay_s()) as tiers:
        for key in walk.keys:
            tiers.use(key)
    order = list(walk.sizes)
    fresh = Residency(order, walk.sizes, placement_of(walk.sizes, order, walk.dram_spare))
    assert replayed(tiers.traces["dram"], fresh) == tiers.traces["dram"]


SIX = dict.fromkeys(range(6), 1000)


def test_what_passes_is_loaded_each_round_and_what_stays_is_not() -> None:
    with house(SIX, dram_spare=3000) as tiers:  # four slots: two stay, two are the ring
        for _ in range(3):
            for key in SIX:
                tiers.use(key)
    stats = tiers.dram.stats
    assert (stats.hits, stats.misses) == (6, 12)
    assert (stats.hit_bytes, stats.miss_bytes, stats.needed_bytes) == (6000, 12_000, 18_000)
    assert stats.loaded_bytes == 2000 + 12_000 + 2000  # the ring has gone on ahead
    assert stats.peak_bytes == 4000


def test_a_jump_is_booked() -> None:
    with house(SIX, dram_spare=2000, delay_s=lambda: 0.001) as tiers:
        stays = [key for key in SIX if tiers.dram.pinned_slot(key) is not None]
        passing = [key for key in SIX if key not in stays]
        tiers.use(passing[0])  # and the next two are under way
        tiers.use(passing[-1])
        assert tiers.dram.stats.dropped_bytes == 2000
        assert [key for event, key in tiers.traces["dram"] if event == "drop"] == passing[1:3]


def test_reserved_bytes_are_part_of_the_peak() -> None:
    sizes = {0: 100}
    stats = TierStats(1000, {"KV cache": 300, "staging": 50})
    tier = Tier(
        Slab(100, CPU),
        Residency([0], sizes, UnitPlacement((0,), 100, 0)),
        sizes,
        Disk(lambda: 0.0).fill,
        stats,
        cause=waited_for_ssd,
    )
    tier.load_pinned(lambda _: None)
    assert stats.peak_bytes == 450


# ---------------------------------------------------------------- stalls


class SlowLink(Transfer):
    """A transfer that takes a while to copy."""

    def _move(self, key: Key, source: torch.Tensor, slot: torch.Tensor) -> None:
        time.sleep(0.02)
        super()._move(key, source, slot)


def test_waiting_for_a_slow_disk_is_booked_on_it() -> None:
    with house(SIX, dram_spare=0, delay_s=lambda: 0.02) as tiers:
        begin = time.perf_counter()
        for key in SIX:
            tiers.use(key)
        elapsed = time.perf_counter() - begin
    assert set(tiers.dram.stats.stall_s) == {"ssd"}
    assert 0.08 < tiers.dram.stats.stall_s["ssd"] <= elapsed


def test_through_two_tiers_each_wait_is_booked_on_its_cause() -> None:
    with house(SIX, dram_spare=0, hbm_spare=0, delay_s=lambda: 0.02) as slow_disk:
        for key in SIX:
            slow_disk.use(key)
    waits = slow_disk.top.stats.stall_s
    assert waits["ssd"] > max(0.08, 2 * waits["link"])
    with house(SIX, dram_spare=2000, hbm_spare=0, transfer=SlowLink) as slow_link:
        for key in SIX:
            slow_link.use(key)
    waits = slow_link.top.stats.stall_s
    assert waits["link"] > max(0.08, 2 * waits["ssd"])


def test_what_stays_never_waits() -> None:
    with house(SIX, dram_spare=5000, delay_s=lambda: 0.02) as tiers:
        for key in [*SIX, *SIX]:
            tiers.use(key)
    assert not tiers.dram.stats.stall_s
    assert (tiers.dram.stats.misses, tiers.dram.stats.loaded_bytes) == (0, 6000)


def test_the_loader_works_ahead() -> None:
    """A consumer slower than the disk does not wait for it after the first key."""
    with house(SIX, dram_spare=1000, delay_s=lambda: 0.02) as tiers:
        tiers.use(0)
        first = sum(tiers.dram.stats.stall_s.values())
        for key in list(SIX)[1:]:
            time.sleep(0.06)
            tiers.use(key)
        assert sum(tiers.dram.stats.stall_s.values()) - first < 0.05  # of the 0.1 s that the reads took


# ---------------------------------------------------------------- errors and ends


@pytest.mark.parametrize("hbm_spare", [None, 0, 1000])
def test_a_failed_read_reaches_the_consumer_and_everything_closes(hbm_spare: int | None) -> None:
    before = threading.active_count()
    with house(SIX, dram_spare=1000, hbm_spare=hbm_spare) as tiers:
        tiers.disk.failures[5] = [StoreError("the disk is on fire")] * 2
        for key in range(5):
            tiers.use(key)
        with pytest.raises(StoreError, match="the disk is on fire"):
            tiers.use(5)
    assert threading.active_count() == before


def test_a_failed_read_that_nobody_waits_for_does_not_stop_the_closing() -> None:
    with house(SIX, dram_spare=1000, hbm_spare=0) as tiers:
        tiers.disk.failures = {key: [StoreError("the disk is on fire")] for key in range(1, 6)}
        tiers.use(0)


def test_a_failed_first_load_reaches_whoever_opens() -> None:
    disk = Disk(lambda: 0.0)
    disk.failures[3] = [StoreError("the disk is on fire")]
    placement = placement_of(SIX, list(SIX), 9000)
    tier = tier_of("dram", SIX, list(SIX), placement, disk.fill, {})
    with pytest.raises(StoreError, match="on fire"):
        tier.load_pinned(lambda _: None)
    tier.close()
    disk.close()


@pytest.mark.parametrize("spare", [0, 1000, 3000])
@pytest.mark.parametrize("hbm_spare", [None, 0])
def test_after_a_failed_read_the_tiers_work_on(hbm_spare: int | None, spare: int) -> None:
    with house(SIX, dram_spare=spare, hbm_spare=hbm_spare) as tiers:
        passing = next(key for key in SIX if tiers.dram.pinned_slot(key) is None)
        tiers.disk.failures[passing] = [StoreError("a bad sector, once")]
        with pytest.raises(StoreError):
            tiers.run(SIX)
        tiers.run([passing, *SIX, *SIX])


@pytest.mark.parametrize("spare", [0, 1000, 3000])
def test_after_an_interrupted_wait_the_tier_works_on(spare: int) -> None:
    """Ctrl-C in a notebook lands where most of the time is spent: in the wait for the disk."""
    with house(SIX, dram_spare=spare, delay_s=lambda: 0.001) as tiers:
        passing = max(key for key in SIX if tiers.dram.pinned_slot(key) is None)
        tiers.disk.interrupts[passing] = [InterruptedWaitError()]
        with pytest.raises(InterruptedWaitError):
            tiers.run(SIX)
        tiers.run([*SIX, *SIX])


def test_after_close_nothing_is_handed_out_or_written() -> None:
    with house(SIX, dram_spare=2000, delay_s=lambda: 0.03) as tiers:
        tiers.use(0)
        tiers.top.close()  # while reads are under way
        finished = tiers.disk.finished
        time.sleep(0.1)
        assert tiers.disk.finished == finished
        with pytest.raises(ClosedError, match=r"tiercache\.offload"):
            tiers.top.acquire(1)
        with pytest.raises(ClosedError, match=r"tiercache\.offload"):
            tiers.top.hit(())
        assert not any(tiers.top.pinned_slot(key) is not None for key in SIX), "a slot keeps all of the slab"
        tiers.top.close()


def test_release_after_close_is_harmless() -> None:
    with house(SIX, dram_spare=0) as tiers:
        tiers.top.acquire(0)
        tiers.top.close()
        before = tiers.top.stats.loaded_bytes
        tiers.top.release(0)
        assert tiers.top.stats.loaded_bytes == before


def test_a_stranger_is_refused_and_changes_nothing() -> None:
    with house(SIX, dram_spare=1000) as tiers:
        with pytest.raises(KeyError):
            tiers.top.acquire(77)
        for key in SIX:
            tiers.use(key)


def test_transfer_closes_twice_and_leaves_no_thread() -> None:
    before = threading.active_count()
    with house(SIX, dram_spare=1000, hbm_spare=1000) as tiers:
        tiers.run(SIX)
        assert any(thread.name.startswith("tiercache-transfer") for thread in threading.enumerate())
    assert threading.active_count() == before


# ---------------------------------------------------------------- Slab, CallersTier


def test_slab_is_aligned_and_cut_by_offset() -> None:
    for nbytes in (0, 1, 4095, 4096, 100_000):
        slab = Slab(nbytes, CPU)
        assert slab.bytes.nbytes == nbytes
        assert slab.bytes.data_ptr() % BLOCK_BYTES == 0 or nbytes == 0
    slab.slot(10, 5)[:] = 7
    assert slab.bytes[9:16].count_nonzero() >= 5
    assert slab.slot(10, 5).data_ptr() == slab.bytes.data_ptr() + 10


def test_slab_that_is_not_to_be_had() -> None:
    with pytest.raises(EnvironmentUnsupportedError, match=f"{1 << 60} bytes of memory on cpu"):
        Slab(1 << 60, CPU)


def test_memory_hits_always() -> None:
    slots = [content(0, 10), content(1, 20)]
    memory = CallersTier(slots, TierStats())
    for key in (0, 1, 1):
        assert memory.acquire(key) is slots[key]
        memory.release(key)
    assert (memory.stats.hits, memory.stats.hit_bytes, memory.stats.misses) == (3, 50, 0)
    assert memory.stats.capacity_bytes == memory.stats.peak_bytes == 30


# ---------------------------------------------------------------- the whole stack, over real files


def needs_of(manifest: Manifest) -> PlanInputs:
    sizes = {key: unit.slot_bytes for key, unit in enumerate(manifest.units)}
    table = manifest.embedding[1].unit
    order = [key for key in sizes if key != table or manifest.embedding[1] in manifest.weights.values()]
    return PlanInputs(
        sizes=sizes,
        names=[unit.name for unit in manifest.units],
        order=order,
        always=frozenset(),
        table=None if table in order else table,
        compute={"workspace": 1000},
        dram={"staging": 2000},
    )


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize(
    ("hbm", "dram"), [(None, 0.0), (None, 0.5), (None, 9), (0.0, 0.0), (0.4, 0.3), (0.9, 0.9), (9, 0.0)]
)
def test_the_stack_hands_out_the_checkpoint(
    checkpoint: Callable[..., Path], name: str, hbm: float | None, dram: float
) -> None:
    source = Checkpoint.open(checkpoint(name))
    manifest = checkpoint_manifest(source)
    needs = needs_of(manifest)
    least, total = max(needs.sizes.values()), sum(needs.sizes.values())
    hbm_bytes = None if hbm is None else 1000 + least + int(hbm * total)
    plan = fill_tiers(needs, hbm_bytes=hbm_bytes, dram_bytes=3000 + least + int(dram * total))
    original = {name: parameter.detach() for name, parameter in _resident(source).items()}
    trace: list[tuple[str, str, Key]] = []
    with Reader() as reader, ExitStack() as exit_stack:
        stack = TierStack(plan, manifest, reader, CPU, None, lambda *event: trace.append(event))
        exit_stack.callback(stack.close)
        stack.load(show_progress=False)
        for _ in range(3):
            for module in manifest.weights:
                weight = stack.plain[module]
                assert torch.equal(weight.view(stack.top.acquire(weight.unit)), original[f"{module}.weight"])
                stack.top.release(weight.unit)
        table = stack.table(manifest.embedding[1])
        stays = needs.table is None or any(tier and tier.table for tier in (plan.hbm, plan.dram))
        if needs.table is not None:
            assert (table is not None) == stays
        if table is not None:
            assert torch.equal(table, original[f"{manifest.embedding[0]}.weight"])
        stack.close()
        stack.close()
        for tier, stats in stack.stats.items():
            share = plan.hbm if tier == "hbm" else plan.dram
            assert stats.peak_bytes <= stats.capacity_bytes == share.capacity_bytes
            assert stats.dropped_bytes == 0 or tier == "dram"
    for tier in ("hbm", "dram"):
        told = Counter(event for where, event, _ in trace if where == tier)
        if tier in stack.stats:
            assert (told["hit"], told["miss"]) == (stack.stats[tier].hits, stack.stats[tier].misses)


def _resident(source: Checkpoint) -> dict[str, torch.nn.Parameter]:
    model = AutoModelForCausalLM.from_pretrained(source.folder)
    return dict(model.named_parameters(remove_duplicate=False))


def test_a_damaged_checkpoint_is_noticed_while_the_stack_loads(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(checkpoint("llama"), tmp_path / "copy")
    manifest = checkpoint_manifest(Checkpoint.open(tmp_path / "copy"))
    needs = needs_of(manifest)
    plan = fill_tiers(needs, hbm_bytes=1 << 24, dram_bytes=1 << 20)
    (file,) = (tmp_path / "copy").glob("*.safetensors")
    os.truncate(file, file.stat().st_size // 2)
    before = threading.active_count()
    with Reader() as reader:
        stack = TierStack(plan, manifest, reader, CPU, None, lambda *event: None)
        with pytest.raises(StoreError, match="bytes early"):
            stack.load(show_progress=False)
        stack.close()
    assert threading.active_count() == before


def test_a_budget_that_is_too_small_says_by_how_much(checkpoint: Callable[..., Path]) -> None:
    needs = needs_of(checkpoint_manifest(Checkpoint.open(checkpoint("llama"))))
    least = max(needs.sizes[key] for key in needs.order)
    fill_tiers(needs, hbm_bytes=least + 1000, dram_bytes=least + 2000)
    with pytest.raises(DoesNotFitError) as refused:
        fill_tiers(needs, hbm_bytes=least + 900, dram_bytes=1 << 30)
    assert refused.value.missing_bytes == 100
    with pytest.raises(DoesNotFitError, match="dram=") as refused:
        fill_tiers(needs, hbm_bytes=least + 1000, dram_bytes=least + 1999)
    assert refused.value.missing_bytes == 1
