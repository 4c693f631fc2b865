"""The base of drafters by a language model: its grower takes the request's seed and learns what was accepted.

Knows growers; it does not know which model scores the nodes.
"""

from tiercache.draft.base import Context, Drafter, Feedback
from tiercache.draft.grow import Ranked, Static
from tiercache.draft.growing_tree import Grower
from tiercache.draft.noise import GumbelNoise
from tiercache.draft.sampled_growers import Branching, StochasticBeam
from tiercache.draft.tree import DraftTree


class GrownDrafter(Drafter):
    """Drafts trees of one grower.

    Args:
        grower: its own alone, for it may keep state.
    """

    runs_model = True

    def __init__(self, grower: Grower) -> None:
        self._grower = grower
        self.open_ended = isinstance(grower, Ranked)
        self._tree = DraftTree()

    def begin(self, context: Context) -> None:
        """See `Drafter`. Growers that draw begin anew with the request's seed, so that it decides everything."""
        super().begin(context)
        self._tree = DraftTree()
        if isinstance(self._grower, Branching | StochasticBeam) and isinstance(context.noise, GumbelNoise):
            self._grower.draws.seed(context.noise.seed)

    def observe(self, feedback: Feedback) -> None:
        """See `Drafter`. A static tree follows the acceptance of its own trees by rank, taken or not."""
        if isinstance(self._grower, Static):
            self._grower.rates.observe(self._tree, self._tree.along(feedback.emitted))
        self._tree = DraftTree()
