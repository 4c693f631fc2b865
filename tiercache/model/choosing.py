"""How the passes of a model choose neurons: what all of its feed-forward blocks share.

mixed     each token's neurons at the recipe's precisions; a pass of many tokens runs dense, at the top precision
exact     every neuron at the top precision
resident  as mixed, with what lies in the slots of an HBM tier, which stay as they are (without one: as mixed)
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from tiercache.stats.neurons import NeuronStats

Kind = Literal["mixed", "exact", "resident"]
TOKENS_AT_ONCE = 128
"""Tokens whose neurons are chosen at a time in passes of many."""


@dataclass
class Choosing:
    """What all blocks of a model share: how the passes at hand choose neurons.

    Attributes:
        kind: see the module.
        few: the most tokens, over the batch, of passes that choose neurons token by token.
        always: passes of more tokens choose neurons for each token as well.
        stats: where to count.
        in_order: neurons are wanted most important first within a precision, too (where fetches are capped).
        trace: is told each token's choice of each block, in turn: (block, neurons by importance).
    """

    kind: Kind = "mixed"
    few: int = 4
    always: bool = False
    stats: NeuronStats = field(default_factory=NeuronStats)
    trace: Callable[[int, np.ndarray], None] | None = None
    in_order: bool = False

    def chooses(self, tokens: int) -> bool:
        """Whether a pass of so many tokens, over the batch, chooses for each of them."""
        return self.kind == "resident" or (self.kind == "mixed" and (self.always or tokens <= self.few))

    def passes(self, kind: Kind) -> AbstractContextManager[None]:
        """Passes within run as `kind`."""
        return holding(self, "kind", kind)

    def every_token(self) -> AbstractContextManager[None]:
        """Passes of any length within choose neurons for each token, as single tokens do."""
        return holding(self, "always", True)


@contextmanager
def holding(owner: object, name: str, value: object) -> Iterator[None]:
    """Within it the attribute `name` of `owner` is `value`; afterwards it is what it was."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)
