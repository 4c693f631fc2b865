"""How a run reads and prefetches: what a plan chooses beside places. Numbers only."""

from dataclasses import dataclass


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

    @property
    def in_flight_bytes(self) -> int:
        """What the reading threads ask for at once."""
        return self.read_threads * self.read_bytes


DEFAULT = Settings()
