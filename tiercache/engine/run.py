"""How the passes of an exact run go: one kind, or with resident passes two. Mixed runs are `engine.mixed`'s.

Knows plans and requirements; moves nothing.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

from policies.plan import Plan
from policies.types import Key
from tiercache.engine.memory import MemoryRequirements
from tiercache.errors import UsageError
from tiercache.model.choosing import Choosing, Kind, holding
from tiercache.model.mixed import MixedBlock
from tiercache.model.pass_hooks import NextPass

# Of each matrix that is cut by plane, the units that hold its planes: those that a resident pass multiplies by.
Views = Mapping[tuple[Key, ...], tuple[Key, ...]]


class ExactRun:
    """Every pass multiplies by whole weights.

    Attributes:
        blocks: feed-forward blocks that are run neuron by neuron: none.
        choosing: what these blocks share.
        part_units: units of which a token reads only a part.
        next_pass: which kind of pass comes next.
        views: see `Views`; empty where there are no resident passes.
        resident_bytes: what a resident pass reads.
        cpu_tokens: up to how many tokens a pass lets the CPU multiply, in DRAM, by what does not stay in HBM.
        notice: what a person is told before the first token; empty for nothing.
    """

    blocks: tuple[MixedBlock, ...] = ()
    choosing: Choosing | None = None
    part_units: frozenset[Key] = frozenset()
    resident_bytes = 0
    notice = ""

    def __init__(self, cpu_tokens: int) -> None:
        self.cpu_tokens = cpu_tokens
        self.next_pass = NextPass()
        self.views: Views = {}

    def pass_bytes(self) -> dict[str, int]:
        """What a token reads of the units of `part_units` ("needed"), and what further kinds of passes read."""
        return {"needed": 0}

    def passes(self, kind: Kind) -> AbstractContextManager[None]:
        """Passes that begin within are of this kind.

        Raises:
            UsageError: there are none of it.
        """
        raise UsageError("this model is run exactly; open it with mode='mixed' to choose neurons")


class ResidentRun(ExactRun):
    """Exact passes, and resident ones: these multiply by the lowest planes alone, as many as stay in the fastest tier.

    Args:
        cpu_tokens: see `ExactRun`.
        asked: what the model asked of memory; its matrices are cut by plane.
        plan: what stays where.
    """

    def __init__(self, cpu_tokens: int, asked: MemoryRequirements, plan: Plan) -> None:
        super().__init__(cpu_tokens)
        matrices: Sequence[tuple[Key, ...]] = asked.matrices
        self.views = dict(zip(matrices, plan.resident(matrices), strict=True))
        self.resident_bytes = sum(asked.payload[key] for view in self.views.values() for key in view)

    def pass_bytes(self) -> dict[str, int]:
        return {"needed": 0, "resident": self.resident_bytes}

    def passes(self, kind: Kind) -> AbstractContextManager[None]:
        if kind == "mixed":
            raise UsageError("passes of a model that is run exactly are 'exact' or 'resident', not 'mixed'")
        return holding(self.next_pass, "resident", kind == "resident")
