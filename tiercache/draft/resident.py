"""Drafts by the target model itself, on the planes (bit planes of its weights) that are in the fastest tier already.

Such a pass moves no weights, needs no second model, and its KV entries go into the target's own cache, to be dropped
before the target verifies (SubSpec, arXiv 2509.18344, has a quantised copy of the target draft like this).

Knows the run that it shares; it does not know where planes lie, which `resident` decides.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager

from tiercache.draft.base import DrafterRequirements, TreeBudget
from tiercache.draft.growing_tree import Grower
from tiercache.draft.lm_base import GrownDrafter
from tiercache.draft.scorer import RunScorer
from tiercache.draft.tree import DraftTree


class ResidentDrafter(GrownDrafter):
    """Drafts by passes of the target itself.

    Args:
        resident: passes of the target within it use the resident planes alone.
        grower: how trees grow.
    """

    name = "resident"
    requirements = DrafterRequirements(shared_kv=True)

    def __init__(self, resident: Callable[[], AbstractContextManager[None]], grower: Grower) -> None:
        super().__init__(grower)
        self._resident = resident

    def propose(self, budget: TreeBudget) -> DraftTree:
        run = self.context.run
        assert run is not None
        try:
            with self._resident():
                scores = RunScorer(run, self.context)
                self._tree = self._grower(scores, self.context, budget)
                self.passes = scores.passes
                return self._tree
        finally:
            run.drop()
