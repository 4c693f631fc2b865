"""What the peers of a benchmark share: the prompt, the clock, and the line of JSON each ends with.

It knows how to time a greedy decode, and nothing of any peer's library or of tiercache's own engine.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from tiercache.stats.run import peak_rss_bytes

PROMPT_IDS = (
    1,
    15,
    3,
    92,
    65,
    35,
    89,
    79,
)  # any ids do: the weights are random, and every vocabulary has these

BATCH_IDS = PROMPT_IDS * 4  # a drafted tree or a short prompt: 32 tokens in one pass

Step = Callable[[Sequence[int]], int]  # appends ids to the context, returns the likeliest next id


@dataclass(frozen=True, kw_only=True)
class PeerReport:
    """What one peer measured of itself."""

    peer: str
    version: str
    settings: str  # what was chosen in its favour
    seconds_per_token: float  # the median of all_s
    all_s: tuple[float, ...]  # one per decoded token, the first pass left out
    first_pass_s: float  # the prompt, in one pass
    batch_s: float | None  # `BATCH_IDS` in one pass, the second time
    load_s: float
    peak_rss_bytes: int
    token_ids: tuple[int, ...]

    def to_json(self) -> str:
        """The line that the benchmark reads."""
        return json.dumps(asdict(self))


def time_decode(
    peer: str, version: str, step: Step, *, num_tokens: int, load_s: float, settings: str, batch: bool = False
) -> PeerReport:
    """Feed the prompt in one pass, then decode greedily, one token and one measurement at a time; then batches."""
    seconds: list[float] = []
    token_ids: list[int] = []
    fed: Sequence[int] = PROMPT_IDS
    for _ in range(num_tokens + 1):
        started_s = time.perf_counter()
        token_ids.append(step(fed))
        seconds.append(time.perf_counter() - started_s)
        fed = token_ids[-1:]
    batch_s = None
    for _ in range(2 if batch else 0):
        started_s = time.perf_counter()
        step(BATCH_IDS)
        batch_s = time.perf_counter() - started_s
    return PeerReport(
        peer=peer,
        version=version,
        settings=settings,
        seconds_per_token=statistics.median(seconds[1:]),
        all_s=tuple(seconds[1:]),
        first_pass_s=seconds[0],
        batch_s=batch_s,
        load_s=load_s,
        peak_rss_bytes=peak_rss_bytes(),
        token_ids=tuple(token_ids),
    )
