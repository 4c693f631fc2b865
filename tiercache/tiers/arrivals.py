"""Bytes on their way into a slot. Knows slots and who still reads them; not where the bytes come from."""

from dataclasses import dataclass
from typing import Protocol

import torch

from policies.types import Load
from tiercache.tiers.device import Standstill
from tiercache.tiers.last_reads import Read


class Pending(Protocol):
    """Bytes on their way."""

    def done(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> Standstill | None:
        """Block until they are there for what the caller does next, be it on a GPU's stream; raise what went wrong.

        Returns:
            how long the stream stands still for them; None where nothing but the caller waits.
        """

    def cancel(self) -> None:
        """Give up; return when nothing writes any more."""


@dataclass(frozen=True)
class Failed:
    """A load that could not even begin."""

    error: Exception

    def done(self) -> bool:
        """It will never be more done."""
        return True

    def wait(self) -> Standstill | None:
        """Raise what went wrong."""
        raise self.error

    def cancel(self) -> None:
        """There is nothing to give up."""


@dataclass(frozen=True)
class Arrival:
    """A load that was begun.

    Attributes:
        load: what was decided.
        slot: where the bytes go.
        pending: the bytes.
        after: reads that were to be waited for.
    """

    load: Load
    slot: torch.Tensor
    pending: Pending
    after: list[Read]
