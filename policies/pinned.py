"""Which keys of a cyclic scan stay for good, and how large a ring the others pass through.

A scan over more bytes than the tier holds must bring back, each round, at least what does not stay, so bytes that
stay are the only saving there is: a pinned set and a ring reach Belady's bound up to the ring itself
(M2Cache, arXiv 2410.14740, section 5.4, calls them fixed and dynamic area). Two things are left to choose:

* how large the ring is. It must hold the largest key that passes through, and overlaps loading with use when it
  holds two and what the loader keeps in flight; so the largest keys are worth pinning first, for they shrink it.
* which keys stay. M2Cache pins a prefix; here they are spread evenly over the scan, since hits are the same and the
  loader then always has a pinned key's time to work ahead, with the same small ring.
"""

from collections.abc import Collection, Mapping, Sequence

from policies.types import Key, Placement


def smallest_bytes(order: Sequence[Key], sizes: Mapping[Key, int], always: Collection[Key] = ()) -> int:
    """The least capacity with which a scan can run: the keys that must stay, and the largest other one."""
    others = [sizes[key] for key in order if key not in set(always)]
    return sum(sizes[key] for key in set(always)) + max(others, default=0)


def place(
    order: Sequence[Key],
    sizes: Mapping[Key, int],
    capacity_bytes: int,
    ahead_bytes: int,
    always: Collection[Key] = (),
) -> Placement:
    """Divide `capacity_bytes` so that as many bytes as possible stay.

    Args:
        order: the keys of one scan, in order.
        sizes: bytes of each.
        capacity_bytes: what there is to divide.
        ahead_bytes: what the ring should hold beyond two of the largest keys that pass through.
        always: keys that must stay.

    Raises:
        ValueError: less than `smallest_bytes`.
    """
    if capacity_bytes < smallest_bytes(order, sizes, always):
        raise ValueError(f"{capacity_bytes} bytes are less than the smallest working set")
    keys = list(dict.fromkeys(order))
    best: tuple[int, int, set[Key]] | None = None
    for largest in sorted({0, *sizes.values()}):
        must = {key for key in keys if sizes[key] > largest or key in set(always)}
        rest = [key for key in keys if key not in must]
        spare = capacity_bytes - sum(sizes[key] for key in must)
        wanted = min(2 * largest + ahead_bytes, sum(sizes[key] for key in rest))
        least = max((sizes[key] for key in rest), default=0)
        if spare < least:
            continue
        pinned = must | _spread(rest, sizes, max(0, spare - wanted))
        score = (min(spare, wanted) >= wanted, sum(sizes[key] for key in pinned))
        if best is None or score > best[:2]:
            best = (*score, pinned)
    assert best is not None  # largest = max(sizes) always passes the test above
    stay = tuple(key for key in keys if key in best[2])
    stay_bytes = sum(sizes[key] for key in stay)
    ring_bytes = 0 if len(stay) == len(keys) else capacity_bytes - stay_bytes
    return Placement(stay, stay_bytes, ring_bytes)


def _spread(keys: Sequence[Key], sizes: Mapping[Key, int], budget_bytes: int) -> set[Key]:
    """Keys of at most `budget_bytes` in all, spread evenly over the scan, then filled up in order."""
    total = sum(sizes[key] for key in keys)
    chosen: set[Key] = set()
    seen = taken = 0
    for key in keys:
        seen += sizes[key]
        if taken + sizes[key] <= budget_bytes * seen // max(total, 1):
            chosen.add(key)
            taken += sizes[key]
    for key in keys:
        if key not in chosen and taken + sizes[key] <= budget_bytes:
            chosen.add(key)
            taken += sizes[key]
    return chosen
