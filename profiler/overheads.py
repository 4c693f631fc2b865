"""What a pass costs beside its bytes and operations where nobody has measured the machine: what other machines took.

Both are of docs/measured.md: an H100 with its host, and two CPU cores. A unit that comes to a card costs less since
calls of streamed layers are remembered; the figure stands until a card has run.
"""

from typing import NamedTuple

from profiler.figure import Figure


def _elsewhere(seconds: float) -> Figure:
    return Figure(seconds, "spec", "measured on another machine")


class Overheads(NamedTuple):
    """Seconds of a layer module by module, and fused; of what is around the layers; of a unit that comes to a card."""

    layer_s: Figure
    fused_layer_s: Figure
    pass_s: Figure
    unit_s: Figure


ON_A_CARD = Overheads(_elsewhere(3e-3), _elsewhere(0.25e-3), _elsewhere(0.0), _elsewhere(0.35e-3))
ON_THE_CPU = Overheads(_elsewhere(0.9e-3), _elsewhere(0.1e-3), _elsewhere(2e-3), _elsewhere(0.0))
