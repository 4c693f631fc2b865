"""How a run reads and prefetches: what a plan chooses beside places. Numbers only."""

from dataclasses import dataclass

BLOCK_BYTES = 4096  # direct reads are of whole ones
# What no machine of this kind can use; a plan that asks for more was not made by the planner.
_MOST_BYTES, _MOST_PREFETCH_BYTES, _MOST_THREADS = 1 << 30, 1 << 50, 64


@dataclass(frozen=True)
class Settings:
    """See the module; the defaults are the rules of thumb of a machine that nobody has measured.

    Attributes:
        prefetch_bytes: what a tier's ring holds beyond twice the most that passes through at once. The more, the less
            stays; below `in_flight_bytes` reads would wait for room.
        read_threads: reads of the SSD at once.
        read_bytes: of one read at most.
    """

    prefetch_bytes: int = 32 << 20
    read_threads: int = 4
    read_bytes: int = 2 << 20

    def __post_init__(self) -> None:
        if self.read_bytes % BLOCK_BYTES or not BLOCK_BYTES <= self.read_bytes <= _MOST_BYTES:
            raise ValueError(f"read_bytes={self.read_bytes} is no number of {BLOCK_BYTES}-byte blocks up to 1 GiB")
        if not 1 <= self.read_threads <= _MOST_THREADS:
            raise ValueError(f"read_threads={self.read_threads} is not between 1 and {_MOST_THREADS}")
        if not 1 <= self.prefetch_bytes <= _MOST_PREFETCH_BYTES:
            raise ValueError(f"prefetch_bytes={self.prefetch_bytes} is not between 1 and {_MOST_PREFETCH_BYTES}")

    @property
    def in_flight_bytes(self) -> int:
        """What the reading threads ask for at once."""
        return self.read_threads * self.read_bytes


DEFAULT = Settings()
