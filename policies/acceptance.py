"""How often drafted guesses were accepted, and how many tokens a tree of guesses is worth.

A round drafts a tree of guesses below the newest token, the *root*, and verifies it in one pass of the target. The
child of rank r is the r-th likeliest of its siblings. Knows counts; neither tokens nor models.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from policies.arrays import ArrayLike, Floats, np

RANKS = 8  # children of a node whose acceptance is counted one by one; later ones are hardly ever accepted
_FIRST = 0.6  # of a drafter never seen: optimistic, so that it is tried
_KEEP = 0.99  # weight of a trial after another one of the same cell
_PULL = 2.0  # trials that what is thought of a cell beforehand counts for


def trials(parents: Sequence[int], path: Iterable[int], depth: int, ranks: int) -> tuple[Floats, Floats]:
    """What one verified tree says of ranks and depths.

    Args:
        parents: of each node, -1 for the root; parents come before children, siblings in order of rank.
        path: the accepted nodes.
        depth, ranks: of the tables; deeper nodes and later siblings are left out.

    Returns:
        Nodes tried, for their parent was accepted, and nodes accepted: each [depth, ranks]; row 0 has the children
        of the root.
    """
    tried, accepted = np.zeros((depth, ranks)), np.zeros((depth, ranks))
    taken = set(path)
    depths: list[int] = []
    siblings: dict[int, int] = {}
    for node, parent in enumerate(parents):
        depths.append(0 if parent < 0 else depths[parent] + 1)
        rank = siblings[parent] = siblings.get(parent, -1) + 1
        if (parent < 0 or parent in taken) and depths[node] < depth and rank < ranks:
            tried[depths[node], rank] += 1
            accepted[depths[node], rank] += node in taken
    return tried, accepted


def expected_tokens(rates: ArrayLike, nodes: int, width: int | None = None) -> Floats:
    """Tokens that a pass emits on average, the target's own one included, with the best tree of each size.

    A node is reached with the product of the rates along its path, and the best tree has the likeliest nodes: a
    child is no likelier than its parent, so they make a tree. This is what the dynamic program of Sequoia
    (arXiv 2402.12374, section 4.1) finds, where a rank is accepted equally often at each depth.

    Args:
        rates: [..., depths, ranks]; how often the child of a rank is accepted once its parent is. At most one of
            siblings is.
        nodes: at most.
        width: nodes of one depth that may have children, and children of a node; None for any number.

    Returns:
        [..., depths, nodes]: of trees no deeper than 1.. and of no more nodes than 1...

    Raises:
        ValueError: a rate outside of [0, 1], or no depth, rank, node or width.
    """
    rates = np.asarray(rates, dtype=np.float64)
    if rates.ndim < 2 or 0 in rates.shape or nodes < 1 or (width is not None and width < 1):
        raise ValueError(f"rates of shape {rates.shape}, {nodes} nodes, width {width}: give one of each or more")
    if not (rates.min() >= 0 and rates.max() <= 1):  # NaN fails too
        raise ValueError(f"rates between {rates.min()} and {rates.max()}; a share lies in [0, 1]")
    ordered = -np.sort(-rates, axis=-1)[..., :width]
    *lead, depths, _ = ordered.shape
    found = np.empty((*lead, depths, nodes))
    # All below 0, so that what is sorted lies likeliest first: of a depth, and the best of all so far.
    level, best = np.full((*lead, 1), -1.0), np.zeros((*lead, nodes))
    for depth in range(depths):
        below = level[..., :width, None] * ordered[..., depth, None, :]
        level = below.reshape(*lead, -1)
        level.sort(axis=-1)
        level = level[..., :nodes]
        best = np.concatenate((best, level), axis=-1)
        best.sort(axis=-1)
        best = best[..., :nodes]
        best.cumsum(axis=-1, out=found[..., depth, :])
    return 1 - found


class Acceptance:
    """How often the child of a rank at a depth was accepted, lately.

    Args:
        depth, ranks: of the table.
        prior: [depth, ranks], what to think of it before any trial; by default the first child is taken in
            60 %, and each further one in 60 % of what is left.

    Raises:
        ValueError: an empty table, or a prior of another shape or outside of [0, 1].
    """

    def __init__(self, depth: int, ranks: int, prior: ArrayLike | None = None) -> None:
        if depth < 1 or ranks < 1:
            raise ValueError(f"a table of {depth} depths and {ranks} ranks; give one of each or more")
        if prior is None:
            prior = np.broadcast_to(_FIRST * (1 - _FIRST) ** np.arange(ranks), (depth, ranks))
        self._prior = np.asarray(prior, dtype=np.float64)
        if self._prior.shape != (depth, ranks) or not (self._prior.min() >= 0 and self._prior.max() <= 1):
            raise ValueError(f"the prior must be shares of shape {(depth, ranks)}; it has {self._prior.shape}")
        self._shares = self._prior.mean(axis=0).tolist()  # by rank
        self._tried, self._accepted = np.zeros((depth, ranks)), np.zeros((depth, ranks))

    @property
    def tried(self) -> Floats:
        """Trials that still count [depth, ranks]."""
        return self._tried.copy()

    def observe(self, tried: ArrayLike, accepted: ArrayLike) -> None:
        """Adds trials and acceptances, both [depth, ranks]; see `trials`.

        Raises:
            ValueError: another shape, or more accepted than tried, or less than none.
        """
        tried, accepted = np.asarray(tried, dtype=np.float64), np.asarray(accepted, dtype=np.float64)
        if tried.shape != self._tried.shape or accepted.shape != self._tried.shape:
            raise ValueError(f"trials of shape {tried.shape} and {accepted.shape}; the table is {self._tried.shape}")
        if not ((accepted >= 0) & (accepted <= tried) & np.isfinite(tried)).all():
            raise ValueError("of each rank and depth, 0 or more are accepted, and no more than were tried")
        kept = _KEEP**tried
        self._tried = self._tried * kept + tried
        self._accepted = self._accepted * kept + accepted

    def fade(self, keep: float, least: float) -> None:
        """Lets each cell count for the share `keep` of its trials, but no less than `least` trials if it has them."""
        share = np.maximum(keep, np.minimum(1.0, least / np.maximum(self._tried, 1e-9)))
        self._tried, self._accepted = self._tried * share, self._accepted * share

    def rates(self) -> Floats:
        """Smoothed [depth, ranks]; no row sums to more than 1.

        A cell of few trials leans on its rank at all depths. A rank of few trials leans on the prior's share of what
        earlier ranks leave, but is held for no better than half the rank before it, for a drafter whose first guess
        fails has rarely a good second one.
        """
        tried_by_rank, accepted_by_rank = self._tried.sum(axis=0).tolist(), self._accepted.sum(axis=0).tolist()
        scale = []  # of each rank: what is thought of it now over the prior
        left, before, given = 1.0, np.inf, 1.0
        for tried, accepted, share in zip(tried_by_rank, accepted_by_rank, self._shares, strict=True):
            thought = min(share / max(given, 1e-9) * left, before / 2)
            before = (accepted + _PULL * thought) / (tried + _PULL)
            left, given = max(0.0, left - before), given - share
            scale.append(before / max(share, 1e-9))
        pooled = np.minimum(self._prior * np.array(scale), 1.0)
        rates: Floats = (self._accepted + _PULL * pooled) / (self._tried + _PULL)
        sums = np.minimum(rates.cumsum(axis=1), 1.0)
        rates[:, 0] = sums[:, 0]
        np.subtract(sums[:, 1:], sums[:, :-1], out=rates[:, 1:])
        return rates
