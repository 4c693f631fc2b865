"""A tier: a slab of memory in which keys are kept or passed through, as a `Residency` decides.

Knows keys, slots and bytes; never layers or models. A `Fill` fills the slots: the reader in the DRAM tier, the
transfer in the HBM tier. Where tiers are stacked, the upper tier's loads are the lower tier's requests.

Ordering: one consumer at a time calls `acquire` and `release` (the computing thread, or the thread of the tier
above). A slot is filled by one ticket, and is given to the consumer only when that ticket is done; it is filled
again only after `release`, and, when the consumer is a GPU, after the event recorded there.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from policies.residency import Residency
from policies.types import Key, Load
from tiercache.errors import ClosedError, DoesNotFitError
from tiercache.stats.run import TierStats
from tiercache.tiers.device import Event, device_of
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


class Pending(Protocol):
    """Bytes on their way."""

    def done(self) -> bool:
        """Whether they have arrived."""

    def wait(self) -> None:
        """Block until they have; raise what went wrong."""

    def cancel(self) -> None:
        """Give up; return when nothing writes any more."""


# Begins to bring the bytes of a key into a slot, after the event of the slot's last reader on a GPU.
Fill = Callable[[Key, torch.Tensor, Event | None], Pending]
Cause = Callable[[Pending, float], Mapping[str, float]]


def waited_for_ssd(pending: Pending, begin: float) -> Mapping[str, float]:
    """A wait, over now, that was all for the SSD."""
    return {"ssd": time.perf_counter() - begin}


@dataclass(frozen=True)
class _Failed:
    """A load that could not even begin."""

    error: Exception

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        raise self.error

    def cancel(self) -> None:
        pass


@dataclass
class _Arrival:
    slot: torch.Tensor
    pending: Pending


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
    ) -> None:
        self._slab, self._residency, self._payload, self._fill = slab, residency, payload, fill
        self._device = device_of(slab.bytes.device)
        self.stats, self._cause, self._observe = stats, cause, observe
        self._arrivals: dict[Key, _Arrival] = {}
        self._ready: dict[Key, torch.Tensor] = {}  # the slots of keys that stay
        self._read_until: Event | None = None
        self._closed = self._paused = False

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

    def pinned_slot(self, key: Key) -> torch.Tensor | None:
        return self._ready.get(key)  # None as well before it has arrived

    def hit(self, keys: Iterable[Key]) -> None:
        if self._closed:
            raise ClosedError(_CLOSED)
        for key in keys:
            self.count(key, hit=True)
        if not self._residency.all_stay:
            self.prefetch()

    def acquire(self, key: Key) -> torch.Tensor:
        """The slot with the bytes of `key`, valid until `release`; waits for them if need be."""
        if self._closed:
            raise ClosedError(_CLOSED)
        if (slot := self._ready.get(key)) is not None:  # nothing to decide
            self.hit((key,))
            return slot
        answer = self._residency.acquire(key)
        self._drop(answer.dropped)
        self.count(key, hit=answer.hit)
        self.prefetch()
        try:
            self._residency.hold(key)
        except KeyError as error:
            raise DoesNotFitError(
                f"unit {key} finds no room while others are in use; run whole passes, or raise the tier's budget"
            ) from error
        arrival = self._arrivals[key]
        try:
            if not arrival.pending.done():
                self._stall(arrival.pending)
            arrival.pending.wait()
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
        self._read_until = self._device.last_use()
        self._residency.release(key)
        self._arrivals.pop(key, None)
        self._observe("evict", key)
        self.prefetch()

    def prefetch(self) -> None:
        """Begin every load for which there is room."""
        if self._paused:
            return
        while (load := self._residency.next_load()) is not None:
            self._begin(load)

    def pause(self) -> None:
        """Between passes: give up what is on its way, and load nothing until `resume`; what stays is handed out."""
        self._paused = True
        passing = [key for key in self._arrivals if key not in self._ready]
        try:
            self._drop(tuple(passing))
        finally:  # after Ctrl-C in the wait for a copy as well: later copies come after it, in the one thread
            for key in passing:
                self._arrivals.pop(key, None)
            self._residency.restart()

    def resume(self) -> None:
        """Prefetch again what passes through."""
        self._paused = False
        self.prefetch()

    def close(self) -> None:
        """Wait for what is under way and give the memory back; harmless when done twice."""
        self._closed = True
        self._ready.clear()  # a slot keeps all of the slab
        while self._arrivals:
            self._arrivals.popitem()[1].pending.cancel()
        self._slab.close()
        self._slab = Slab(0, torch.device("cpu"))

    def _give_up(self, key: Key) -> None:
        self._arrivals.pop(key).pending.cancel()
        self._residency.release(key)
        self._observe("drop", key)

    def _begin(self, load: Load) -> None:
        slot = self._slab.slot(load.offset, load.nbytes)
        self._observe("load", load.key)
        try:
            pending = self._fill(load.key, slot, self._read_until)
        except Exception as error:  # it comes out where the key is waited for
            pending = _Failed(error)
        self._arrivals[load.key] = _Arrival(slot, pending)
        self.stats.loaded_bytes += self._payload[load.key]
        used = self._residency.used_bytes + sum(self.stats.reserved_bytes.values())
        self.stats.peak_bytes = max(self.stats.peak_bytes, used)

    def _drop(self, keys: tuple[Key, ...]) -> None:
        for key in keys:
            if (arrival := self._arrivals.pop(key, None)) is not None:
                arrival.pending.cancel()
            self.stats.dropped_bytes += self._payload[key]
            self._observe("drop", key)

    def _stall(self, pending: Pending) -> None:
        begin = time.perf_counter()
        pending.wait()
        self.stats.stall_s.update(self._cause(pending, begin))
