"""A number about hardware, with what it rests on: a data sheet, a measurement, or a fit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from policies.tables import Table

Basis = Literal["spec", "measured", "fitted"]

# By how much predictions from figures of each basis are off: from data sheets +-50 %, from measured limits +-20 %, and
# with a few fitted terms beside them +-10 % (inference-sim #415, #436 and #1525 report 48, 36 and 7 % for LLM serving).
ERROR: dict[Basis, float] = {"spec": 0.5, "measured": 0.2, "fitted": 0.1}


@dataclass(frozen=True)
class Figure:
    """A number and its basis.

    Attributes:
        value: in the unit that the figure's name says.
        basis: "spec" from a data sheet, "measured" on the machine, or "fitted" to measured passes.
        source: where it is from, for people.
        spread: half the range of repeated measurements, as a share of the value.
    """

    value: float
    basis: Basis = "spec"
    source: str = ""
    spread: float = 0.0

    def scaled(self, share: float) -> "Figure":
        """A share of it, on the same basis."""
        return replace(self, value=self.value * share)


def measured(values: list[float], source: str) -> Figure:
    """The median of repeated measurements, with their spread."""
    from statistics import median  # takes a third of this package's import, which who only predicts need not wait for

    middle = median(values)
    return Figure(middle, "measured", source, (max(values) - min(values)) / 2 / middle if middle else 0.0)


def weakest(figures: list[Figure]) -> Basis:
    """The basis that is trusted least among some figures."""
    return max((figure.basis for figure in figures), key=lambda basis: ERROR[basis], default="spec")


def table_of(title: str, figures: Mapping[str, Figure]) -> Table:
    """Figures by their names, with what they rest on."""
    rows = [
        (name, f"{each.value:.4g}", f"{each.spread:.0%}" if each.spread else "", each.basis, each.source)
        for name, each in figures.items()
    ]
    return Table(title, ("figure", "value", "spread", "basis", "source"), tuple(rows))
