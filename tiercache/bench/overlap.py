"""Measures what of two kinds of work overlaps where both run at once. Knows neither of them."""

import threading
from collections.abc import Callable
from functools import partial

from profiler.figure import Figure
from tiercache.bench.undisturbed import Watch, seconds_of

REPEATS = 7


def overlap_of(watch: Watch, compute: Callable[[], object], bring: Callable[[], object], source: str) -> Figure:
    """w of: bringing and computing at once take w max + (1 - w) sum of what each takes alone."""
    works = {name: partial(seconds_of, work) for name, work in (("a", compute), ("b", bring))}
    works["both"] = partial(seconds_of, partial(together, compute, bring))
    found = watch.by_turns(works, dict.fromkeys(works, REPEATS))
    # The least of each: what disturbs one of three is no w.
    computed, brought, both = (min(sample.what for sample in found[name]) for name in works)
    share = (computed + brought - both) / min(computed, brought)
    return Figure(min(max(share, 0.0), 1.0), "measured", source)


def together(first: Callable[[], object], second: Callable[[], object]) -> None:
    """Run both at once, the second on a thread of its own, until both are done."""
    beside = threading.Thread(target=second)
    beside.start()
    first()
    beside.join()
