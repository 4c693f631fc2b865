"""Copies units from the DRAM tier into slots of the HBM tier: the only owner of copy threads.

Knows slots and bytes. Without a GPU the slots lie in host memory and the same thread copies with the CPU.

Ordering: jobs are done one after another, in the order of the calls. A job first takes its unit from the tier below
(which may wait for the SSD). On CUDA it then makes the copy stream stand still until the events after which the slot
may be overwritten, queues the copy there, and is done: no thread waits for the copy itself. Whoever waits for the
ticket makes its own current stream stand still until the copy's event. A unit that stays in the tier below is given
back at once; of one that passes through, the thread sleeps until the copy is done before it gives the lower slot back.
So nothing overtakes anything, a lower slot is never recycled under a copy, and passes may come on any stream.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_all
from dataclasses import dataclass

import torch

from policies.types import Key
from tiercache.tiers.device import Device, Event, Standstill, device_of
from tiercache.tiers.link import Link
from tiercache.tiers.tier import Supply


@dataclass(frozen=True)
class Span:
    """Bytes of a unit: where they lie in the lower slot, and where in the upper."""

    source: int
    target: int
    nbytes: int


class CopyTicket:
    """A unit on its way to the upper tier.

    Attributes:
        future: is done when the copy has been queued, which is when it has been made where no GPU is.
        copy_began_at: when the tier below had the unit.
        arrival: the copy's event on a GPU.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self.future: Future[None] = Future()
        self.copy_began_at = 0.0
        self.arrival: Event | None = None

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self.future.done()

    def wait(self) -> Standstill | None:
        """Block until the copy is queued, and let the current stream stand still until it is made."""
        self.future.result()
        return None if self.arrival is None else self._device.stand_until(self.arrival)

    def cancel(self) -> None:
        """Give up, if the copy has not begun; return when nothing writes any more."""
        if not self.future.cancel():
            wait_all([self.future])
        if self.arrival is not None:
            self.arrival.synchronize()

    def causes(self, begin: float) -> Mapping[str, float]:
        """Split a wait that began at `begin` and ends now into waiting for the SSD and for the link."""
        now = time.perf_counter()
        began = min(max(self.copy_began_at, begin), now)
        return {"ssd": began - begin, "link": now - began}


class Transfer:
    """One copying thread between two tiers.

    Args:
        lower: the tier to take units from.
        spans: how each unit's bytes move.
        device: where the upper slots lie.
        link: what the copies cross; the machine's own by default.
    """

    def __init__(
        self,
        lower: Supply,
        spans: Mapping[Key, Sequence[Span]],
        device: torch.device,
        link: Link | None = None,
    ) -> None:
        self._lower, self._spans, self._link = lower, spans, link or Link()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tiercache-transfer")
        self._device = device_of(device)
        self._copies = self._device.copies()  # after the kernels under way, which may still use the slab's memory
        self._closed = False

    def fill(self, key: Key, slot: torch.Tensor, after: Sequence[Event]) -> CopyTicket:
        """Queue the copy of `key` into `slot`; see `Fill`."""
        ticket = CopyTicket(self._device)
        self._pool.submit(self._run, key, slot, after, ticket)
        return ticket

    def settle(self) -> None:
        """Return when all that was asked for is done, and nothing uses the tier below."""
        if not self._closed:
            self._pool.submit(self._copies.wait).result()

    def close(self) -> None:
        """Stop the thread after the copy in flight; harmless when done twice."""
        self._closed = True
        self._pool.shutdown(wait=True)
        self._copies.wait()

    def _run(self, key: Key, slot: torch.Tensor, after: Sequence[Event], ticket: CopyTicket) -> None:
        """A job; whoever waits for the ticket is told its end, however it ends."""
        if self._closed:
            ticket.future.cancel()
        if not ticket.future.set_running_or_notify_cancel():
            return
        try:
            stays = self._lower.pinned_slot(key) is not None
            source = self._lower.acquire(key)
        except BaseException as error:
            ticket.future.set_exception(error)
            return
        try:
            self._copy(key, source, slot, after, ticket)
            ticket.future.set_result(None)
        except BaseException as error:
            ticket.future.set_exception(error)
        finally:
            try:
                if not stays:
                    self._copies.wait()
            finally:
                self._lower.release(key)

    def _copy(
        self, key: Key, source: torch.Tensor, slot: torch.Tensor, after: Sequence[Event], ticket: CopyTicket
    ) -> None:
        ticket.copy_began_at = time.perf_counter()
        with self._copies.after(after):
            self._move(key, source, slot)
        ticket.arrival = self._copies.arrival()
        if self._link.gbps is not None:  # the bytes of a throttled link arrive as late as it says
            self._copies.wait()
            self._link.carry(sum(span.nbytes for span in self._spans[key]), ticket.copy_began_at)

    def _move(self, key: Key, source: torch.Tensor, slot: torch.Tensor) -> None:
        for span in self._spans[key]:
            target = slot[span.target : span.target + span.nbytes]
            target.copy_(source[span.source : span.source + span.nbytes], non_blocking=True)
