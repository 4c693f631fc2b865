"""Main memory in huge pages, for the tiers and for the probes that measure what the tiers can reach.

Direct reads into ordinary pages spend more on pinning each 4 KiB page than a fast disk takes to fill it: on one
machine they reached 0.8-1.7 GB/s, and 1.9-3.0 GB/s into huge pages.
"""

import ctypes
import mmap

HUGE_PAGE_BYTES = 2 << 20


def map_huge_pages(nbytes: int) -> memoryview:
    """Writable memory whose first byte lies at a multiple of 2 MiB, in huge pages where the system has them.

    Less than half a huge page stays in ordinary pages. The memory goes when the last view of it does.
    """
    region = mmap.mmap(-1, nbytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE") and 2 * nbytes >= HUGE_PAGE_BYTES:
        region.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(region)) % HUGE_PAGE_BYTES
    return memoryview(region)[start : start + nbytes]
