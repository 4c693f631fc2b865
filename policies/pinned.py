"""Which keys of a cyclic scan stay for good, and how large a ring the others pass through.

A scan over more bytes than the tier holds must bring back, each round, at least what does not stay, so bytes that
stay are the only saving there is: a pinned set and a ring reach Belady's bound up to the ring itself
(M2Cache, arXiv 2410.14740, section 5.4, calls them fixed and dynamic area). Two things are left to choose:

* how large the ring is. It must hold the largest key that passes through, and overlaps loading with use when it
  holds two and what the loader keeps in flight; so the largest keys are worth pinning first, for they shrink it.
* which keys stay. M2Cache pins a prefix; here they are spread evenly over the scan, since hits are the same and the
  loader then always has a pinned key's time to work ahead, with the same small ring. Some keys may be worth more than
  others where they are (planes that are used without the passing ones): they get room first, level by level.

Keys may be held together: the planes of one matrix are. Those of them that pass then lie in the ring at once, one
behind the other, and one that does not fit before the ring's end begins at its start: what lies empty at the end is
less than that one, so a ring of all of them and the largest but the first is always enough.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence

from policies.types import Key, UnitPlacement

Groups = Sequence[Sequence[Key]]
"""Keys that are held at once, in their order in the scan; a key in none is held alone."""


def smallest_bytes(
    order: Sequence[Key], sizes: Mapping[Key, int], always: Collection[Key] = (), together: Groups = ()
) -> int:
    """The least capacity with which a scan can run: the keys that must stay, and a ring for the others."""
    stay = set(always)
    return sum(sizes[key] for key in stay) + _least_ring(_groups(order, together), sizes, stay)


def place(
    order: Sequence[Key],
    sizes: Mapping[Key, int],
    capacity_bytes: int,
    ahead_bytes: int,
    always: Collection[Key] = (),
    *,
    prefer: Sequence[Collection[Key]] = (),
    together: Groups = (),
) -> UnitPlacement:
    """Divide `capacity_bytes` so that as many bytes as possible stay.

    Args:
        order: the keys of one scan, in order.
        sizes: bytes of each.
        capacity_bytes: what there is to divide.
        ahead_bytes: what the ring should hold beyond twice the most that passes through at once.
        always: keys that must stay.
        prefer: levels of keys, disjoint: beside a ring as many bytes as possible of the first one stay, then of the
            next; keys in none come last. Between rings, a byte of a level counts once more than one of the next.
        together: keys that are held at once.

    Raises:
        ValueError: less than `smallest_bytes`.
    """
    if capacity_bytes < smallest_bytes(order, sizes, always, together):
        raise ValueError(f"{capacity_bytes} bytes are less than the smallest working set")
    keys, groups = list(dict.fromkeys(order)), _groups(order, together)
    levels, stay = _levels(keys, prefer), set(always).intersection(keys)
    best: tuple[bool, int, set[Key]] | None = None
    for largest in sorted({0, *sizes.values(), *_passing(groups, sizes, stay)}):
        must = stay.union(*(_first(group, sizes, stay, largest) for group in groups))
        spare = capacity_bytes - sum(sizes[key] for key in must)
        least = _least_ring(groups, sizes, must)
        rest_bytes = sum(sizes[key] for key in keys if key not in must)
        wanted = max(least, min(2 * largest + ahead_bytes, rest_bytes))
        if spare < least:
            continue
        pinned, worth = _filled(levels, sizes, must, max(0, spare - wanted))
        score = (spare >= wanted, worth)
        if best is None or score > best[:2]:
            best = (*score, pinned)
    assert best is not None  # with the most that passes at once nothing more must stay, and the least fits
    placed = tuple(key for key in keys if key in best[2])
    placed_bytes = sum(sizes[key] for key in placed)
    ring_bytes = 0 if len(placed) == len(keys) else capacity_bytes - placed_bytes
    return UnitPlacement(placed, placed_bytes, ring_bytes)


def _filled(
    levels: Sequence[Sequence[Key]], sizes: Mapping[Key, int], must: set[Key], left: int
) -> tuple[set[Key], int]:
    """What stays beside `must` in so many bytes, the first level first; and its bytes, weighted by level."""
    pinned, worth = set(must), 0
    for count, level in zip(range(len(levels), 0, -1), levels, strict=True):
        chosen = _spread([key for key in level if key not in must], sizes, left)
        left -= sum(sizes[key] for key in chosen)
        pinned |= chosen
        worth += count * sum(sizes[key] for key in level if key in pinned)
    return pinned, worth


def _groups(order: Sequence[Key], together: Groups) -> list[list[Key]]:
    """Every key of the scan in a group, alone or with those that it is held with."""
    left = set(order)
    groups = [[key for key in group if key in left] for group in together]
    for group in groups:
        left.difference_update(group)
    return [*filter(None, groups), *([key] for key in dict.fromkeys(order) if key in left)]


def _levels(keys: Sequence[Key], prefer: Sequence[Collection[Key]]) -> list[list[Key]]:
    """The keys of each level that has some, in the order of the scan, and last those of none."""
    level_of = {key: place for place, level in enumerate(prefer) for key in level}
    levels: list[list[Key]] = [[] for _ in range(len(prefer) + 1)]
    for key in keys:
        levels[level_of.get(key, len(prefer))].append(key)
    return [level for level in levels if level]


def _least_ring(groups: Groups, sizes: Mapping[Key, int], staying: Collection[Key]) -> int:
    """What a ring must have for the keys of any group that pass; see the module."""
    least = 0
    for group in groups:
        passing = [sizes[key] for key in group if key not in staying]
        least = max(least, sum(passing) + max(passing[1:], default=0))
    return least


def _passing(groups: Groups, sizes: Mapping[Key, int], staying: Collection[Key]) -> Iterator[int]:
    """What may pass of a group at once, in bytes: all that need not stay, or without the first ones."""
    for group in groups:
        total = 0
        for key in reversed(group):
            if key not in staying:
                total += sizes[key]
                yield total


def _first(group: Sequence[Key], sizes: Mapping[Key, int], staying: Collection[Key], most_bytes: int) -> Iterator[Key]:
    """The first keys of a group that must stay so that what passes of it is at most so many bytes."""
    passing = [key for key in group if key not in staying]
    left = sum(sizes[key] for key in passing)
    for key in passing:
        if left <= most_bytes:
            return
        left -= sizes[key]
        yield key


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
