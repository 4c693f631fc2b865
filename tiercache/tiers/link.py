"""The link that an upper tier is filled over: as fast as it is, or throttled to stand in for a slower one.

A throttled link delays copies until the bytes would have crossed; whatever is measured over it is labelled emulated.
"""

import threading
import time

from tiercache.errors import UsageError


class Link:
    """Bytes cross one copy after another.

    Args:
        gbps: rate to stand in for, in 1e9 bytes a second; None for the machine's own.

    Raises:
        UsageError: a rate that is not above zero.
    """

    def __init__(self, gbps: float | None = None) -> None:
        if gbps is not None and not gbps > 0:
            raise UsageError(f"link_gbps={gbps} must be above zero, or None for the machine's own link")
        self.gbps = gbps
        self._lock = threading.Lock()
        self._free_at = 0.0

    def carry(self, nbytes: int, began_at: float) -> None:
        """Return no sooner than `nbytes` that were sent at `began_at` (`time.perf_counter`) would have arrived."""
        if self.gbps is None or not nbytes:
            return
        with self._lock:
            self._free_at = max(self._free_at, began_at) + nbytes / self.gbps / 1e9
            arrival = self._free_at
        left = arrival - time.perf_counter()
        if left > 0:
            time.sleep(left)
