"""The words that policies speak: keys, placements and loads; plain data."""

from dataclasses import dataclass

Key = int


@dataclass(frozen=True)
class UnitPlacement:
    """How a tier's bytes are divided.

    Attributes:
        pinned: keys that never leave, in the order of use.
        pinned_bytes: what they take.
        ring_bytes: what is left for the keys that pass through.
    """

    pinned: tuple[Key, ...]
    pinned_bytes: int
    ring_bytes: int


@dataclass(frozen=True)
class Load:
    """A decision to bring `key` to the bytes [offset, offset + nbytes) of the tier."""

    key: Key
    offset: int
    nbytes: int
