"""Measures what of two kinds of work overlaps where both run at once. Knows neither of them."""

import threading
from collections.abc import Callable
from functools import partial

from profiler.figure import Figure
from tiercache.bench.undisturbed import Watch, seconds_of

REPEATS = 7
Work = Callable[[], object]


def overlap_of(watch: Watch, compute: Work, bring: Work, both: Work, source: str, repeats: int = REPEATS) -> Figure:
    """w of: bringing and computing at once take w max + (1 - w) sum of what each takes alone.

    Args:
        watch: looks for what disturbs.
        compute, bring: each of them alone, until it is done.
        both: both at once, until both are done. Where a card does the work, one thread queues both and waits once: a
            thread of each takes milliseconds to begin, and then nothing is seen to overlap.
        source: what is measured, in words.
        repeats: of each.
    """
    works = {name: partial(seconds_of, work) for name, work in (("a", compute), ("b", bring), ("both", both))}
    found = watch.by_turns(works, dict.fromkeys(works, repeats))
    # The least of each: what disturbs one of three is no w.
    computed, brought, together_s = (min(sample.what for sample in found[name]) for name in works)
    share = (computed + brought - together_s) / min(computed, brought)
    return Figure(min(max(share, 0.0), 1.0), "measured", source)


def together(first: Work, second: Work) -> None:
    """Run both at once on the processor, the second on a thread of its own, until both are done."""
    beside = threading.Thread(target=second)
    beside.start()
    first()
    beside.join()
