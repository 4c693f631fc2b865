"""Which keys are in a tier and at which bytes: a pinned area, and a ring for the keys that pass through.

The one place where a tier's decisions are made: the engine moves bytes as it says, and a replay of a recorded trace
asks the same object and gets the same hits, loads and evictions. Knows nothing of time, threads or bytes' contents.

On the layer loop (a cyclic scan) every pinned key hits and every other key is loaded once per round.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from policies.prefetch import CyclicPrefetch
from policies.types import Key, Load, UnitPlacement


@dataclass
class _Entry:
    load: Load
    held: bool = False
    free: bool = False


@dataclass(frozen=True)
class Acquired:
    """The answer to a request.

    Attributes:
        hit: the key stays in this tier.
        dropped: keys whose loads were given up because the scan jumped over them.
    """

    hit: bool
    dropped: tuple[Key, ...] = ()


class Residency:
    """The keys of one tier.

    Keys that pass through are used in the order of their loads, so the ring is a queue of byte ranges: a load takes
    the bytes behind the newest entry, and bytes come free at the oldest.

    Args:
        order: the keys of one round of the scan, in order.
        sizes: bytes of each.
        placement: which stay, and the size of the ring.
        once: the scan ends after one round.

    Attributes:
        all_stay: no key passes through.
    """

    def __init__(
        self, order: Sequence[Key], sizes: Mapping[Key, int], placement: UnitPlacement, *, once: bool = False
    ) -> None:
        self._sizes = sizes
        self._pinned: dict[Key, Load] = {}
        offset = 0
        for key in placement.pinned:
            self._pinned[key] = Load(key, offset, sizes[key])
            offset += sizes[key]
        self._base, self._ring_bytes = offset, placement.ring_bytes
        self._ring: deque[_Entry] = deque()
        self._prefetch = CyclicPrefetch(order, placement.pinned, once=once)
        self.all_stay = self._prefetch.peek() is None

    @property
    def pinned(self) -> tuple[Load, ...]:
        """The loads of the keys that stay, to be done once."""
        return tuple(self._pinned.values())

    @property
    def used_bytes(self) -> int:
        """Bytes of the keys that are here or on their way."""
        return self._base + sum(entry.load.nbytes for entry in self._ring)

    def next_load(self) -> Load | None:
        """The next key to bring, if there is room for it; its bytes are taken from now on."""
        key = self._prefetch.peek()
        if key is None:
            return None
        offset = self._room(self._sizes[key])
        if offset is None:
            return None
        self._prefetch.advance()
        load = Load(key, self._base + offset, self._sizes[key])
        self._ring.append(_Entry(load))
        return load

    def acquire(self, key: Key) -> Acquired:
        """Ask for `key`; unless it stays, its load is the next one to be used afterwards (call `next_load`).

        Raises:
            KeyError: a key this tier does not know.
        """
        if key in self._pinned:
            return Acquired(hit=True)
        waiting = [entry for entry in self._ring if not entry.held and not entry.free]
        ahead = next((place for place, entry in enumerate(waiting) if entry.load.key == key), None)
        if ahead is None:
            self._prefetch.seek(key)
        jumped = waiting if ahead is None else waiting[:ahead]
        for entry in jumped:
            entry.free = True
        if ahead is not None:
            waiting[ahead].held = True
        self._retire()
        return Acquired(hit=False, dropped=tuple(entry.load.key for entry in jumped))

    def hold(self, key: Key) -> Load:
        """The bytes of a key that was acquired; of a passing key they stay untouched until `release`."""
        if key in self._pinned:
            return self._pinned[key]
        for entry in self._ring:
            if entry.load.key == key and not entry.free:
                entry.held = True
                return entry.load
        raise KeyError(key)

    def release(self, key: Key) -> None:
        """The key is not needed any more; the bytes of a passing key may be used again."""
        if key in self._pinned:
            return
        for entry in self._ring:
            if entry.load.key == key and entry.held and not entry.free:
                entry.free = True
                break
        self._retire()

    def restart(self) -> None:
        """Forget what passes through: the next round begins with an empty ring."""
        self._ring.clear()
        self._prefetch.restart()

    def _retire(self) -> None:
        while self._ring and self._ring[0].free:
            self._ring.popleft()

    def _room(self, nbytes: int) -> int | None:
        """Where in the ring `nbytes` in one piece are free, or None."""
        if not self._ring:
            return 0 if nbytes <= self._ring_bytes else None
        oldest = self._ring[0].load.offset - self._base
        newest = self._ring[-1].load
        after = newest.offset - self._base + newest.nbytes
        if newest.offset - self._base >= oldest:  # not wrapped: room behind the newest, else before the oldest
            if after + nbytes <= self._ring_bytes:
                return after
            return 0 if nbytes <= oldest else None
        return after if after + nbytes <= oldest else None
