"""The seconds of the target's passes and of drafting, from measurements that may be disturbed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median_low

from policies.arrays import ArrayLike, Floats, np
from policies.isotonic import ascending

_SAMPLES = 15  # newest seconds kept per size
_STALE, _ENOUGH = 64, 5  # passes after which seconds do not count if so many newer ones are there
_FEW = 2  # passes of a size, below which they are forgotten for the line through all sizes
_LINE = 2.0  # passes that the line through all sizes counts for beside those of one size
_HALF_LIFE = 24  # passes after which what another size took counts half
_JUMP = 2.0  # seconds so many times more or less are another machine's, if they come twice
_GUESS = 0.01  # weight of guessed costs beside one size that was measured
_PARTS = (0.2, 0.75, 0.05)  # of drafting: start, passes and nodes


class PassCosts:
    """Seconds of a pass by its tokens: medians of the newest ones per half power of two, and straight lines between.

    More tokens never cost less. Beyond the largest count seen, seconds grow on as they did up to it; from one count
    alone, as if a sixteenth of it were due to its tokens.
    """

    def __init__(self) -> None:
        self._seen: dict[int, deque[tuple[float, ...]]] = {}
        self._when: dict[int, int] = {}
        self._medians: dict[int, tuple[int, list[float]]] = {}  # of how many of a size's, until the next of this size
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
        self._medians.pop(bucket, None)

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
        counts, _, seconds = np.array([self._median(bucket) for bucket in buckets]).T
        passes = np.array([len(self._seen[bucket]) for bucket in buckets], dtype=np.float64)
        weights = passes * [_faded(self._passes - self._when[bucket]) for bucket in buckets]
        seconds = ascending(seconds, weights)
        if len(buckets) > 2:  # few passes of one size tell less than the line through all sizes
            shares = np.stack((1 / seconds, counts / seconds), axis=1)
            line = _fitted(shares, weights, np.array((seconds[0], seconds[0] / counts[-1])))
            sure = np.where(passes < _FEW, weights, passes)  # what was hardly seen is forgotten
            seconds = (sure * seconds + _LINE * (line[0] + line[1] * counts)) / (sure + _LINE)
        return counts, ascending(seconds, weights)

    def _median(self, bucket: int) -> list[float]:
        """Of the measurements of a size that are not old, and of a few in any case."""
        seen, oldest = self._seen[bucket], self._passes - _STALE
        fresh = len(seen) if seen[0][1] >= oldest else sum(when >= oldest for _, when, _ in seen)
        count = max(fresh, _ENOUGH)
        of, median = self._medians.get(bucket, (0, []))
        if of != count:
            median = _typical(list(seen)[-count:])
            self._medians[bucket] = count, median
        return median


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
        self._medians: dict[tuple[int, int], list[float]] = {}  # until the next drafting of this size
        self._found: tuple[float, float, float] | None = None  # until the next drafting

    def observe(self, passes: int, nodes: int, seconds: float) -> None:
        """Drafting `nodes` nodes in so many passes took so long."""
        self._rounds += 1
        size = (passes.bit_length(), nodes.bit_length())
        _add(self._seen.setdefault(size, deque(maxlen=_SAMPLES)), (passes, nodes, max(seconds, 1e-6)))
        self._when[size] = self._rounds
        self._medians.pop(size, None)
        self._found = None

    def estimate(self) -> tuple[float, float, float]:
        """Seconds of a proposal whatever its size, of a drafting pass, and of a node."""
        if self._found is None:
            start, each, node = self._fitted() if self._seen else self._guess
            self._found = float(start), float(each), float(node)
        return self._found

    def _fitted(self) -> Floats:
        for size, seen in self._seen.items():
            if size not in self._medians:
                self._medians[size] = _typical(seen)
        rows = np.array([[1.0, *self._medians[size]] for size in self._seen])
        weights = np.array([_faded(self._rounds - self._when[size]) for size in self._seen])
        shares = rows[:, :3] / rows[:, 3:]
        guess, promised = self._guess, median_low((shares @ self._guess).tolist())
        if promised > 0:
            guess = guess / promised
        else:  # passes are what costs most, as far as one can know; nothing is known of what there was none of
            usual = np.array([median_low(one[one > 0]) if one.any() else 0.0 for one in shares.T])
            guess = np.divide(_PARTS, usual, out=np.zeros(3), where=usual > 0)
        return _fitted(shares, weights, guess)


def _add(seen: deque[tuple[float, ...]], row: tuple[float, ...]) -> None:
    """Adds a measurement, seconds last; two in a row that are far from all before mean that the machine changed."""
    if len(seen) > 2:
        usual, last = median_low(each[-1] for each in seen), seen[-1]
        if min(last[-1], row[-1]) > _JUMP * usual or max(last[-1], row[-1]) < usual / _JUMP:
            seen.clear()
            seen.append(last)
    seen.append(row)


def _fitted(shares: Floats, weights: Floats, guess: Floats) -> Floats:
    """Coefficients of 0 or more that give every row of `shares` [rows, coefficients] a product near 1.

    Least squares of relative errors, for rows are divided by what was measured; drawn a little to `guess`, which
    decides where rows are too alike. A coefficient that would be negative, or was guessed as 0, is 0.
    """
    free, roots = guess > 0, np.sqrt(weights)
    fitted: Floats = np.zeros(0)
    while count := int(free.sum()):
        unit = shares[:, free] * guess[free]
        rows = np.concatenate((roots[:, None] * unit, np.sqrt(_GUESS) * np.eye(count)))
        wanted = np.concatenate((roots, np.full(count, np.sqrt(_GUESS))))
        fitted = np.asarray(np.linalg.lstsq(rows, wanted)[0], dtype=np.float64)
        if (fitted >= 0).all():
            break
        free[np.flatnonzero(free)[fitted < 0]] = False
    found = np.zeros_like(guess)
    found[free] = fitted * guess[free]
    return found


def _typical(seen: Iterable[tuple[float, ...]]) -> list[float]:
    """The median of each column; the lower one of two, for what disturbs a measurement makes it longer."""
    return [median_low(column) for column in zip(*seen, strict=True)]


def _faded(passes: int) -> float:
    """What an old measurement counts beside a new one."""
    return float(max(0.5 ** (passes / _HALF_LIFE), 1e-6))
