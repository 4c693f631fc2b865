"""Which bytes of a tier a GPU still reads, and until which event. Knows offsets; nothing of keys."""

from collections.abc import Iterable
from dataclasses import dataclass

from policies.types import Load
from tiercache.tiers.device import Event


@dataclass(frozen=True)
class Read:
    """Bytes [start, end) that are read until an event."""

    start: int
    end: int
    until: Event


class LastReads:
    """The reads of a tier's bytes that nobody who fills them waits for yet."""

    def __init__(self) -> None:
        self._reads: list[Read] = []

    def add(self, slot: Load, until: Event | None) -> None:
        """A slot is read until then; nothing reads it where there is no event."""
        if until is not None:
            self._reads.append(Read(slot.offset, slot.offset + slot.nbytes, until))

    def put_back(self, reads: Iterable[Read]) -> None:
        """Whoever was to wait for them may not have done so."""
        self._reads += reads

    def over(self, slot: Load) -> list[Read]:
        """What overlaps with a slot that is to be filled."""
        return [read for read in self._reads if read.start < slot.offset + slot.nbytes and slot.offset < read.end]

    def covered(self, slot: Load) -> None:
        """Whoever fills the slot waits for what overlaps with it: the rest of each is kept."""
        start, end, kept = slot.offset, slot.offset + slot.nbytes, list[Read]()
        for read in self._reads:
            parts = ((read.start, min(read.end, start)), (max(read.start, end), read.end))
            kept += [Read(low, high, read.until) for low, high in parts if low < high]
        self._reads = kept
