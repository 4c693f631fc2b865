"""A tier: a slab of memory in which keys are kept or passed through, as a `Residency` decides.

Knows keys, slots and bytes; never layers or models. A `Fill` fills the slots: the reader in the DRAM tier, the
transfer in the HBM tier. Where tiers are stacked, the upper tier's loads are the lower tier's requests.

Ordering: one consumer at a time calls `acquire` and `release` (the computing thread, or the thread of the tier
above). A slot is filled by one ticket, and is given to the consumer only when that ticket is done or, when the consumer
is a GPU, when its current stream has been told to stand still until then. It is filled again only after `release` and,
when the consumer is a GPU, after the event recorded there: the bytes of each slot have an event of their own, so
passes may come on any stream.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import torch

from policies.residency import Residency
from policies.types import Key, Load
from tiercache.errors import ClosedError, DoesNotFitError
from tiercache.stats.run import TierStats
from tiercache.tiers.arrivals import Arrival, Failed, Pending
from tiercache.tiers.device import Event, Standstill, device_of
from tiercache.tiers.last_reads import LastReads
from tiercache.tiers.slab import Slab

_CLOSED = "the tiers are closed; open the model again with tiercache.offload(...)"


class SlotSource(Protocol):
    """Hands out the slots of keys."""

    def acquire(self, key: Key) -> torch.Tensor:
        """The slot of `key`, valid until `release`."""

    def release(self, key: Key) -> None:
        """The key is not needed any more."""


class Supply(SlotSource, Protocol):
    """A source some of whose slots stay where they are, so that consumers may bind them once."""

    def pinned_slot(self, key: Key) -> torch.Tensor | None:
        """The slot of a key that stays, for as long as the source is open; None of others."""

    def hit(self, keys: Iterable[Key]) -> None:
        """Keys that stay are used by a consumer that has bound them; for the statistics."""


# Begins to bring the bytes of a key into a slot, after the events of those bytes' last readers on a GPU.
Fill = Callable[[Key, torch.Tensor, Sequence[Event]], Pending]
Cause = Callable[[Pending, float], Mapping[str, float]]


def waited_for_ssd(pending: Pending, begin: float) -> Mapping[str, float]:
    """A wait, over now, that was all for the SSD."""
    return {"ssd": time.perf_counter() - begin}


class Tier(Supply):
    """See the module.

    Args:
        slab: the memory, of at least the placement's pinned and ring bytes.
        residency: who decides.
        payload: each key's own bytes, padding left out, for the statistics.
        fill: begins to fill a slot with a key's bytes.
        stats: where to count.
        cause: splits a wait that began at a time and is over now by what it was for.
        observe: is told each decision as (event, key), for replays.
        settle: returns when nothing uses the tier below any more, of all that `fill` was asked for.
    """

    def __init__(
        self,
        slab: Slab,
        residency: Residency,
        payload: Mapping[Key, int],
        fill: Fill,
        stats: TierStats,
        *,
        cause: Cause,
        observe: Callable[[str, Key], None] = lambda event, key: None,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._slab, self._residency, self._payload, self._fill = slab, residency, payload, fill
        self._device = device_of(slab.bytes.device)
        self.stats, self._cause, self._observe, self._settle = stats, cause, observe, settle
        self._arrivals: dict[Key, Arrival] = {}
        self._ready: dict[Key, torch.Tensor] = {}  # the slots of keys that stay
        self._held: set[Key] = set()
        self._reads, self._standing = LastReads(), deque[Standstill]()
        self._closed = self._paused = self._settled = False

    def decide(self, residency: Residency) -> None:
        """Let another `Residency` decide from now on; everything the last one loaded is forgotten."""
        self._drop(tuple(self._arrivals))
        self._ready.clear()
        self._residency = residency

    def load_pinned(self, loaded: Callable[[int], None]) -> None:
        """Load every key that stays; `loaded` is told the bytes of each."""
        for load in self._residency.pinned:
            self._begin(load)
        for load in self._residency.pinned:
            self._arrivals[load.key].pending.wait()
            self._ready[load.key] = self._arrivals[load.key].slot
            loaded(self._payload[load.key])
        self._settle()  # they are there for any stream, and nobody is asked to wait again

    def pinned_slot(self, key: Key) -> torch.Tensor | None:
        return self._ready.get(key)  # None as well before it has arrived

    def hit(self, keys: Iterable[Key]) -> None:
        if self._closed:
            raise ClosedError(_CLOSED)
        for key in keys:
            self.count(key, hit=True)
            if not self._residency.all_stay:  # after each, as a replay of the trace does
                self.prefetch()

    def acquire(self, key: Key) -> torch.Tensor:
        """The slot with the bytes of `key`, valid until `release`; waits for them if need be."""
        if self._closed:
            raise ClosedError(_CLOSED)
        if (slot := self._ready.get(key)) is not None:  # nothing to decide
            self.hit((key,))
            return slot
        self._held.add(key)
        answer = self._residency.acquire(key)
        self._drop(answer.dropped)
        self.count(key, hit=answer.hit)
        self.prefetch()
        try:
            load = self._residency.hold(key)
        except KeyError as error:
            raise DoesNotFitError(
                f"unit {key} finds no room while others are in use; run whole passes, or raise the tier's budget"
            ) from error
        arrival = self._arrivals.get(key)
        if arrival is None or arrival.load is not load:  # Ctrl-C came between the decision and its load
            arrival = self._begin(load)
        try:
            done = arrival.pending.done()
            if (standstill := arrival.pending.wait() if done else self._stall(arrival.pending)) is not None:
                self._standing.append(standstill)
        except BaseException:  # a failed read, or Ctrl-C in the wait: the bytes are free again for the next pass
            self._give_up(key)
            raise
        return arrival.slot

    def count(self, key: Key, *, hit: bool) -> None:
        """Enter one request into the statistics."""
        nbytes = self._payload[key]
        if hit:
            self.stats.hits += 1
            self.stats.hit_bytes += nbytes
        else:
            self.stats.misses += 1
            self.stats.miss_bytes += nbytes
        self._observe("hit" if hit else "miss", key)

    def release(self, key: Key) -> None:
        """The consumer is done with `key`, or will be once the work it has queued on the GPU is."""
        if self._closed or key in self._ready:  # what stays frees no room
            return
        if (arrival := self._arrivals.get(key)) is not None:
            self._reads.add(arrival.load, self._device.last_use())
        self._residency.release(key)  # from here on harmless when done again, after Ctrl-C
        self._arrivals.pop(key, None)
        self._held.discard(key)
        self._book_standstills()
        self._observe("evict", key)
        self.prefetch()

    def release_all(self) -> None:
        """Release what a pass that was interrupted has left."""
        for key in tuple(self._held):
            self.release(key)

    def prefetch(self) -> None:
        """Begin every load for which there is room."""
        if self._paused:
            return
        while (load := self._residency.next_load()) is not None:
            self._begin(load)

    def pause(self) -> None:
        """Between passes: give up what is on its way, and load nothing until `resume`; what stays is handed out.

        When it returns nothing uses the tier below. After Ctrl-C within it is to be called again.
        """
        if self._settled:
            return
        self._paused = True
        passing = [key for key in self._arrivals if key not in self._ready]
        try:
            self._drop(tuple(passing))
        finally:  # after Ctrl-C in the wait for a copy as well: later copies come after it, in the one thread
            for key in passing:
                self._forget(key)
            self._residency.restart()
        self._settle()
        self._settled = True

    def resume(self) -> None:
        """Prefetch again what passes through; harmless when nothing is paused."""
        if self._paused:
            self._paused = self._settled = False
            self.prefetch()

    def close(self) -> None:
        """Wait for what is under way and give the memory back; harmless when done twice."""
        self._closed = True
        self._ready.clear()  # a slot keeps all of the slab
        while self._arrivals:
            self._arrivals.popitem()[1].pending.cancel()
        self._settle()
        self._device.synchronize()  # kernels on whatever stream: the memory is anybody's from here on
        self._slab.close()
        self._slab = Slab(0, torch.device("cpu"))

    def _give_up(self, key: Key) -> None:
        if (arrival := self._forget(key)) is not None:
            arrival.pending.cancel()
        self._residency.release(key)
        self._held.discard(key)
        self._observe("drop", key)

    def _begin(self, load: Load) -> Arrival:
        slot = self._slab.slot(load.offset, load.nbytes)
        self._observe("load", load.key)
        after = self._reads.over(load)
        try:
            pending = self._fill(load.key, slot, [read.until for read in after])
        except Exception as error:  # it comes out where the key is waited for
            pending = Failed(error)
        arrival = self._arrivals[load.key] = Arrival(load, slot, pending, after)
        self._reads.covered(load)  # not before: after Ctrl-C in between somebody else waits, too
        self.stats.loaded_bytes += self._payload[load.key]
        used = self._residency.used_bytes + sum(self.stats.reserved_bytes.values())
        self.stats.peak_bytes = max(self.stats.peak_bytes, used)
        return arrival

    def _drop(self, keys: tuple[Key, ...]) -> None:
        for key in keys:
            if (arrival := self._forget(key)) is not None:
                arrival.pending.cancel()
            self.stats.dropped_bytes += self._payload[key]
            self._observe("drop", key)

    def _forget(self, key: Key) -> Arrival | None:
        """A load that is given up may never have waited for the readers of its bytes: the next one must."""
        if (arrival := self._arrivals.pop(key, None)) is not None:
            self._reads.put_back(arrival.after)
        return arrival

    def _book_standstills(self) -> None:
        """What a GPU's stream is known to have stood still for copies."""
        while self._standing and (seconds := self._standing[0].seconds()) is not None:
            self._standing.popleft()
            self.stats.stall_s.update({"link": seconds} if seconds else {})

    def _stall(self, pending: Pending) -> Standstill | None:
        begin = time.perf_counter()
        standstill = pending.wait()
        self.stats.stall_s.update(self._cause(pending, begin))
        return standstill
