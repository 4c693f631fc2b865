"""What a pass of a model multiplies by and keeps: bytes and operations, without a machine.

The engine makes one from the same manifest and the same trace that it allocates by (`tiercache.engine.workload`), so
the two cannot differ.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from policies.plan import PlanInputs
from policies.types import Key


@dataclass(frozen=True)
class Matmul:
    """A matrix, or some that lie in one bundle, and the units that hold it.

    Attributes:
        units: their keys.
        weights: how many numbers each token is multiplied by.
        width: rows and columns, summed: what of activations a token brings and takes.
    """

    units: tuple[Key, ...]
    weights: int
    width: int = 0


@dataclass(frozen=True)
class Workload:
    """A model as it is run.

    Attributes:
        precision: of its weights.
        layers: of its decoder.
        matmuls: in the order of a pass.
        needs: units and reserves, as the planner wants them.
        payload: bytes that a pass reads of each unit, padding left out.
        context: tokens that the KV cache is reserved for.
        kv_bytes: what it takes then.
        attention_width: heads x their dimension, over all layers: each pair of a new token and one in the cache costs
            four operations of each.
        reads: of each unit, the bytes of the direct reads that bring it from the SSD.
        readers: how many of them are under way at once.
        fused: of each layer whose attention half is one call of the kernels, the units of its halves that are.
        table: the token embedding's unit; where it stays in no tier, each token's row is read from the SSD on its own.
    """

    precision: str
    layers: int
    matmuls: tuple[Matmul, ...]
    needs: PlanInputs
    payload: Mapping[Key, int]
    context: int
    kv_bytes: int
    attention_width: int
    reads: Mapping[Key, tuple[int, ...]] = field(default_factory=dict)
    readers: int = 1
    fused: tuple[tuple[tuple[Key, ...], ...], ...] = ()
    table: Key | None = None

    @property
    def bytes_per_weight(self) -> float:
        """Of most matrices: the head may be of another precision."""
        found = sorted(sum(self.payload[key] for key in each.units) / each.weights for each in self.matmuls)
        return found[(len(found) - 1) // 2]  # the lower median; `statistics` takes as long to import as this package

    @property
    def pass_bytes(self) -> int:
        """What a pass reads of the weights."""
        return sum(self.payload[key] for key in self.needs.order)
