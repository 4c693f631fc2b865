"""What rounds of drafting have shown: how often guesses were accepted, and the seconds of passes.

A round drafts a tree of guesses below the newest token, the *root*, and verifies it in one pass of the target. The
child of rank r is the r-th likeliest of its siblings. Knows counts and seconds; neither tokens nor models.
"""

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median_low

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_FIRST = 0.6  # of a drafter never seen: optimistic, so that it is tried
_KEEP = 0.99  # weight of a trial after another one of the same cell, and of a round after another
_PULL = 2.0  # trials that what is thought of a cell beforehand counts for
_SAMPLES = 15  # newest seconds kept per size
_STALE, _ENOUGH = 64, 5  # passes after which seconds do not count if so many newer ones are there
_FEW = 2  # passes of a size, below which they are forgotten for the line through all sizes
_HALF_LIFE = 24  # passes after which what another size took counts half
_JUMP = 2.0  # seconds so many times more or less are another machine's, if they come twice
_GUESS = 0.01  # weight of guessed costs beside one size that was measured
_PULL_ALL, _PULL_SIZE = 4.0, 24.0  # tokens and rounds that a promise counts for, beside what was measured
_FADE, _LEAST = 64.0, 8.0  # unused rounds after which trials count half, and how many are kept nevertheless
_PARTS = np.array((0.2, 0.75, 0.05))  # of drafting: start, passes and nodes


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
    level, best = np.ones((*lead, 1)), np.zeros((*lead, nodes))  # both likeliest first
    for depth in range(depths):
        below = level[..., :width, None] * ordered[..., depth, None, :]
        level = -np.sort(-below.reshape(*lead, -1), axis=-1)[..., :nodes]
        best = -np.sort(-np.concatenate((best, level), axis=-1), axis=-1)[..., :nodes]
        found[..., depth, :] = best.cumsum(axis=-1)
    return found + 1


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
        tried, accepted, prior = self._tried.sum(axis=0), self._accepted.sum(axis=0), self._prior.mean(axis=0)
        scale = np.empty_like(tried)  # of each rank: what is thought of it now over the prior
        left, before, given = 1.0, np.inf, 1.0
        for rank, share in enumerate(prior):
            thought = min(share / max(given, 1e-9) * left, before / 2)
            before = (accepted[rank] + _PULL * thought) / (tried[rank] + _PULL)
            left, given = max(0.0, left - before), given - share
            scale[rank] = before / max(share, 1e-9)
        pooled = np.minimum(self._prior * scale, 1.0)
        rates = (self._accepted + _PULL * pooled) / (self._tried + _PULL)
        return np.diff(np.minimum(rates.cumsum(axis=1), 1.0), axis=1, prepend=0.0)


class PassCosts:
    """Seconds of a pass by its tokens: medians of the newest ones per half power of two, and straight lines between.

    More tokens never cost less. Beyond the largest count seen, seconds grow on as they did up to it; from one count
    alone, as if a sixteenth of it were due to its tokens.
    """

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[float, ...]]] = {}
        self._when: dict[int, int] = {}
        self._passes = 0
        self._drawn: tuple[Floats, Floats] | None = None  # points of the line, until the next pass

    @property
    def largest(self) -> int:
        """Most tokens of a pass seen; 0 before any."""
        return int(max(tokens for tokens, *_ in self._seen[max(self._seen)])) if self._seen else 0

    def observe(self, tokens: int, seconds: float) -> None:
        """A pass of so many tokens, the root included, took so long.

        Raises:
            ValueError: no token, or seconds that are not above 0.
        """
        if tokens < 1 or not 0 < seconds < np.inf:
            raise ValueError(f"a pass of {tokens} tokens in {seconds} s; give 1 or more, and seconds above 0")
        self._passes, self._drawn = self._passes + 1, None
        bucket = int(2 * math.log2(tokens))
        seen = self._seen.setdefault(bucket, deque(maxlen=_SAMPLES))
        _add(seen, (int(tokens), self._passes, float(seconds)))
        self._when[bucket] = self._passes

    def at(self, tokens: ArrayLike) -> Floats:
        """Seconds at each count, of the same shape.

        Raises:
            ValueError: nothing was observed yet.
        """
        if not self._seen:
            raise ValueError("no pass was observed; observe one first")
        if self._drawn is None:
            self._drawn = self._points()
        counts, seconds = self._drawn
        wanted = np.asarray(tokens, dtype=np.float64)
        if len(counts) == 1:
            slope = seconds[0] / counts[0] / 16
        else:
            near = min(int(np.searchsorted(counts, counts[-1] / 8)), len(counts) - 2)
            slope = (seconds[-1] - seconds[near]) / (counts[-1] - counts[near])
        return np.asarray(np.interp(wanted, counts, seconds) + slope * np.maximum(0.0, wanted - counts[-1]))

    def _points(self) -> tuple[Floats, Floats]:
        """Counts and seconds to draw lines between, both ascending; where a larger count took less, both are pooled."""
        buckets = sorted(self._seen)
        counts, _, seconds = np.array([_typical(self._fresh(bucket)) for bucket in buckets]).T
        passes = np.array([len(self._seen[bucket]) for bucket in buckets], dtype=np.float64)
        weights = passes * [_faded(self._passes - self._when[bucket]) for bucket in buckets]
        seconds = _ascending(seconds, weights)
        if len(buckets) > 2:  # few passes of one size tell less than the line through all sizes
            shares = np.stack((1 / seconds, counts / seconds), axis=1)
            line = _fitted(shares, weights, np.array((seconds[0], seconds[0] / counts[-1])))
            sure = np.where(passes < _FEW, weights, passes)  # what was hardly seen is forgotten
            seconds = (sure * seconds + _PULL * (line[0] + line[1] * counts)) / (sure + _PULL)
        return counts, _ascending(seconds, weights)

    def _fresh(self, bucket: int) -> list[tuple[float, ...]]:
        """The measurements of a size that are not old, and a few in any case."""
        seen = list(self._seen[bucket])
        fresh = sum(when >= self._passes - _STALE for _, when, _ in seen)
        return seen[-max(fresh, _ENOUGH) :]


class DraftCosts:
    """Seconds of drafting as `start + passes * pass + nodes * node`, none below 0, fitted to medians per size.

    Args:
        guess: the three seconds, before any is measured; measured ones keep their proportions where too few sizes
            were seen to tell them apart.
    """

    def __init__(self, guess: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> None:
        self._guess = np.array(guess, dtype=np.float64)
        self._seen: dict[tuple[int, int], deque[tuple[float, ...]]] = {}
        self._when: dict[tuple[int, int], int] = {}
        self._rounds = 0

    def observe(self, passes: int, nodes: int, seconds: float) -> None:
        """Drafting `nodes` nodes in so many passes took so long."""
        self._rounds += 1
        size = (passes.bit_length(), nodes.bit_length())
        _add(self._seen.setdefault(size, deque(maxlen=_SAMPLES)), (passes, nodes, max(seconds, 1e-6)))
        self._when[size] = self._rounds

    def estimate(self) -> tuple[float, float, float]:
        """Seconds of a proposal whatever its size, of a drafting pass, and of a node."""
        if not self._seen:
            start, each, node = self._guess
            return float(start), float(each), float(node)
        rows = np.array([[1.0, *_typical(seen)] for seen in self._seen.values()])
        weights = np.array([_faded(self._rounds - self._when[size]) for size in self._seen])
        shares = rows[:, :3] / rows[:, 3:]
        guess, promised = self._guess, float(_typical((shares @ self._guess)[:, None])[0])
        if promised > 0:
            guess = guess / promised
        else:  # passes are what costs most, as far as one can know; nothing is known of what there was none of
            usual = np.array([median_low(one[one > 0]) if one.any() else 0.0 for one in shares.T])
            guess = np.divide(_PARTS, usual, out=np.zeros(3), where=usual > 0)
        start, each, node = _fitted(shares, weights, guess)
        return float(start), float(each), float(node)


class Record:
    """What a drafter has shown: acceptance, costs, and by size of tree what came of what both had promised.

    What was measured of a size is believed over the promise the more, the more rounds there were.

    Args:
        depth, nodes: of its largest tree.
        ranks: of the table of acceptance.
        guess: see `DraftCosts`.
        rates: [depths, ranks] to think of before any trial, the last row of what is deeper; None for those of
            `Acceptance`.

    Attributes:
        acceptance, costs: as far as measured.
        rounds: that it drafted.
        depth, nodes: the most that it was asked for.
    """

    def __init__(
        self, depth: int, nodes: int, ranks: int, guess: tuple[float, float, float], rates: ArrayLike | None = None
    ) -> None:
        prior = None
        if rates is not None:
            given = np.asarray(rates, dtype=np.float64)[:depth, :ranks]
            prior = np.zeros((depth, ranks))
            prior[:, : given.shape[1]] = given[np.minimum(np.arange(depth), len(given) - 1)]
        self.acceptance, self.costs = Acceptance(depth, ranks, prior), DraftCosts(guess)
        sizes = (depth.bit_length(), nodes.bit_length())
        self._tokens, self._seconds = np.zeros((2, *sizes)), np.zeros((2, *sizes))  # measured and promised
        self.rounds = self.depth = self.nodes = self._last = 0

    def drafted(self, now: int, depth: int, nodes: int) -> None:
        """It was asked for such a tree in round `now`; what was known counts less the longer it was not asked."""
        keep = 0.5 ** ((now - self._last - 1) / _FADE)
        self.acceptance.fade(keep, _LEAST)
        self._tokens, self._seconds = self._tokens * keep, self._seconds * keep
        self._last, self.rounds = now, self.rounds + 1
        self.depth, self.nodes = max(self.depth, depth), max(self.nodes, nodes)

    def compare(self, depth: int, nodes: int, tokens: tuple[float, float], seconds: tuple[float, float]) -> None:
        """Tokens beyond the target's own, and seconds: measured and promised, of a tree that was asked for."""
        size = (slice(None), depth.bit_length() - 1, nodes.bit_length() - 1)
        self._tokens, self._seconds = self._tokens * _KEEP, self._seconds * _KEEP
        self._tokens[size] += tokens
        self._seconds[size] += seconds[0] / seconds[1], 1.0

    def correction(self, depth: int, nodes: int) -> Floats:
        """Tokens beyond the target's own over those that rates promise [depth, nodes]."""
        return _by_size(self._tokens, depth, nodes)

    def stretch(self, depth: int, nodes: int) -> Floats:
        """Seconds over those that costs promise [depth, nodes]."""
        return _by_size(self._seconds, depth, nodes)


def _by_size(sums: Floats, depth: int, nodes: int) -> Floats:
    """Measured over promised for each size, leaning on that of all sizes, which leans on 1."""
    measured, promised = sums
    overall = (_PULL_ALL + measured.sum()) / (_PULL_ALL + promised.sum())
    table = (_PULL_SIZE * overall + measured) / (_PULL_SIZE + promised)
    rows, columns = (np.frexp(np.arange(1, most + 1))[1] - 1 for most in (depth, nodes))  # logarithms to base 2
    return np.asarray(table[rows[:, None], columns])


def _add(seen: deque[tuple[float, ...]], row: tuple[float, ...]) -> None:
    """Adds a measurement, seconds last; two in a row that are far from all before mean that the machine changed."""
    if len(seen) > 2:
        usual, last = median_low(each[-1] for each in seen), seen[-1]
        if min(last[-1], row[-1]) > _JUMP * usual or max(last[-1], row[-1]) < usual / _JUMP:
            seen.clear()
            seen.append(last)
    seen.append(row)


def _ascending(values: Floats, weights: Floats) -> Floats:
    """The nearest values that never fall (pool adjacent violators; Ayer et al., 1955)."""
    blocks: list[tuple[float, float, int]] = []
    for one, light in zip(values, weights, strict=True):
        blocks.append((one, light, 1))
        while len(blocks) > 1 and blocks[-1][0] <= blocks[-2][0]:
            (one, light, few), (other, heavy, many) = blocks.pop(), blocks.pop()
            blocks.append(((one * light + other * heavy) / (light + heavy), light + heavy, few + many))
    return np.repeat([block[0] for block in blocks], [block[2] for block in blocks])


def _fitted(shares: Floats, weights: Floats, guess: Floats) -> Floats:
    """Coefficients of 0 or more that give every row of `shares` [rows, coefficients] a product near 1.

    Least squares of relative errors, for rows are divided by what was measured; drawn a little to `guess`, which
    decides where rows are too alike. A coefficient that would be negative, or was guessed as 0, is 0.
    """
    free = guess > 0
    fitted: Floats = np.zeros(0)
    while free.any():
        unit = shares[:, free] * guess[free]
        rows = np.concatenate((np.sqrt(weights)[:, None] * unit, np.sqrt(_GUESS) * np.eye(int(free.sum()))))
        wanted = np.concatenate((np.sqrt(weights), np.full(int(free.sum()), np.sqrt(_GUESS))))
        fitted = np.asarray(np.linalg.lstsq(rows, wanted)[0], dtype=np.float64)
        if (fitted >= 0).all():
            break
        free[np.flatnonzero(free)[fitted < 0]] = False
    found = np.zeros_like(guess)
    found[free] = fitted * guess[free]
    return found


def _typical(seen: Iterable[ArrayLike]) -> Floats:
    """The median of each column; the lower one of two, for what disturbs a measurement makes it longer."""
    ordered = np.sort(np.array(list(seen), dtype=np.float64), axis=0)
    return np.asarray(ordered[(len(ordered) - 1) // 2])


def _faded(passes: int) -> float:
    """What an old measurement counts beside a new one."""
    return float(max(0.5 ** (passes / _HALF_LIFE), 1e-6))
