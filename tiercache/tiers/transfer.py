"""Copies units from the DRAM tier into slots of the HBM tier: the only owner of copy threads.

Knows slots and bytes. Without a GPU the slots lie in host memory and the same thread copies with the CPU.

Ordering: jobs are done one after another, in the order of the calls. A job first takes its unit from the tier
below (which may wait for the SSD), then, on CUDA, makes the copy stream wait for the event after which the slot may
be overwritten, copies, and waits for the copy's own event before it gives the lower slot back and calls itself done.
So nothing overtakes anything, a lower slot is never recycled under a copy, and a finished ticket means that the
bytes are there for any stream. Passes are expected on one compute stream, the one current when the model was opened.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_all
from dataclasses import dataclass

import torch

from policies.types import Key
from tiercache.tiers.device import Event, device_of
from tiercache.tiers.link import Link
from tiercache.tiers.tier import SlotSource


@dataclass(frozen=True)
class Span:
    """Bytes of a unit: where they lie in the lower slot, and where in the upper."""

    source: int
    target: int
    nbytes: int


class CopyTicket:
    """A unit on its way to the upper tier."""

    def __init__(self) -> None:
        self.future: Future[None] | None = None
        self.copy_began_at = 0.0  # when the tier below had the unit

    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self.future is not None and self.future.done()

    def wait(self) -> None:
        """Block until the unit has arrived; raise what went wrong."""
        assert self.future is not None
        self.future.result()

    def cancel(self) -> None:
        """Give up, if the copy has not begun; return when nothing writes any more."""
        assert self.future is not None
        if not self.future.cancel():
            wait_all([self.future])

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
        lower: SlotSource,
        spans: Mapping[Key, Sequence[Span]],
        device: torch.device,
        link: Link | None = None,
    ) -> None:
        self._lower, self._spans, self._link = lower, spans, link or Link()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tiercache-transfer")
        self._copies = device_of(device).copies()  # after the kernels under way, which may still use the slab's memory

    def fill(self, key: Key, slot: torch.Tensor, after: Event | None) -> CopyTicket:
        """Queue the copy of `key` into `slot`; see `Fill`."""
        ticket = CopyTicket()
        ticket.future = self._pool.submit(self._copy, key, slot, after, ticket)
        return ticket

    def close(self) -> None:
        """Stop the thread after the copy in flight; harmless when done twice."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _copy(self, key: Key, slot: torch.Tensor, after: Event | None, ticket: CopyTicket) -> None:
        source = self._lower.acquire(key)
        try:
            ticket.copy_began_at = time.perf_counter()
            with self._copies.after(() if after is None else (after,)):
                self._move(key, source, slot)
            self._copies.wait()
            self._link.carry(sum(span.nbytes for span in self._spans[key]), ticket.copy_began_at)
        finally:
            self._lower.release(key)

    def _move(self, key: Key, source: torch.Tensor, slot: torch.Tensor) -> None:
        for span in self._spans[key]:
            target = slot[span.target : span.target + span.nbytes]
            target.copy_(source[span.source : span.source + span.nbytes], non_blocking=True)
