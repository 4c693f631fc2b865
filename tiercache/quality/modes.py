"""The modes that quality is measured in, as people write them. Knows the words; opens nothing."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from tiercache.config.options import STORE_PRECISION, Precision, of_planes
from tiercache.config.sizes import Budget
from tiercache.errors import UsageError

FORMS = (
    "write source, int8, int4 or int3 for exact weights of that precision; mixed:0.5 (a share), mixed:1.2GB (bytes a "
    "token) or 'mixed:<=0.01' (nats a token that may be lost) for a mixed mode, with /int4 behind it for the precision "
    "of its other matrices"
)


@dataclass(frozen=True)
class Mode:
    """One way to run.

    Attributes:
        name: as it was written, without blanks.
        precision: of all matrices, or of those that are no neurons.
        bytes_per_token, max_loss: a mixed mode has one of them, an exact mode none.
    """

    name: str
    precision: str
    bytes_per_token: float | str | None = None
    max_loss: float | None = None

    @property
    def mixed(self) -> bool:
        """Whether neurons are chosen token by token."""
        return self.bytes_per_token is not None or self.max_loss is not None

    def options(self) -> dict[str, Any]:
        """What `offload` is told."""
        if not self.mixed:
            return {"precision": self.precision}
        limits = {"bytes_per_token": self.bytes_per_token, "max_loss": self.max_loss}
        return {"mode": "mixed", **limits, "precision": self.precision}


def parse(text: str) -> Mode:
    """Read one mode; raises UsageError with the forms where it is none."""
    name = re.sub(r"\s", "", text)
    precisions = get_args(Precision)
    if name in precisions:
        return Mode(name, name)
    kind, colon, rest = name.partition(":")
    budget, slash, precision = rest.partition("/")
    if kind != "mixed" or not colon or not budget:
        raise UsageError(f"unknown mode {text!r}: {FORMS}")
    precision = precision if slash else STORE_PRECISION
    if precision not in precisions or not of_planes(precision):
        raise UsageError(f"a mixed mode's other matrices are int8, int4 or int3, not {precision!r}: {FORMS}")
    if budget.startswith("<="):
        return Mode(name, precision, max_loss=_loss(budget[2:], text))
    try:
        read = Budget.parse(budget)
    except UsageError as error:
        raise UsageError(f"cannot read the bytes a token of mode {text!r} ({error}): {FORMS}") from error
    if read == Budget():
        raise UsageError(f"mode {text!r} names no bytes a token: {FORMS}")
    return Mode(name, precision, bytes_per_token=budget if read.fraction is None else read.fraction)


def parse_all(texts: Iterable[str]) -> list[Mode]:
    """Read modes, several of them in one text where commas part them; each is kept once. Raises as `parse`."""
    found = [parse(part) for text in texts for part in text.split(",") if part.strip()]
    if not found:
        raise UsageError(f"no mode was named: {FORMS}")
    return list({mode.name: mode for mode in found}.values())


def _loss(number: str, text: str) -> float:
    try:
        loss = float(number)
    except ValueError as error:
        raise UsageError(f"cannot read the loss of mode {text!r}: {FORMS}") from error
    if not 0 < loss < math.inf:
        raise UsageError(f"mode {text!r} allows a loss of {number}; give a number of nats above 0: {FORMS}")
    return loss
