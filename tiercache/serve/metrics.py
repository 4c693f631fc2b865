"""What Prometheus reads. A registry of its own, so several servers in one process count apart."""

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from tiercache.serve.queue import GenerationQueue
from tiercache.serve.worker import Outcome

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500)
# (name, what it says, the statistic of a tier)
_OF_TIERS = (
    ("hits", "Requests for a unit that stayed in the tier.", "hits"),
    ("misses", "Requests for a unit that had to be brought.", "misses"),
    ("hit_bytes", "Bytes of what stayed in the tier.", "hit_bytes"),
    ("miss_bytes", "Bytes of what had to be brought.", "miss_bytes"),
    ("loaded_bytes", "Bytes brought, the first filling included.", "loaded_bytes"),
    ("dropped_bytes", "Bytes brought that no pass used.", "dropped_bytes"),
)
_COUNTED = (
    ("ssd_bytes", "Bytes that the SSD delivered."),
    ("passes", "Forward passes."),
    ("tokens", "Tokens that passes carried."),
    ("decode_tokens", "Tokens of passes of one token; what a drafter's rounds emit is told apart."),
    ("decode_s", "Seconds of passes of one token."),
    ("cpu_passes", "Passes with multiplications on the CPU, in main memory."),
)
_MEASURED = (
    ("tokens_per_s", "Decoding speed since the start, with a drafter over its rounds."),
    ("actual_pass_s", "Median seconds of the newest passes of one token."),
    ("predicted_pass_s", "What the cost model says of them."),
    ("first_pass_s", "Seconds of the newest prefill."),
    ("peak_rss_bytes", "The process's peak."),
    ("peak_device_bytes", "The GPU allocator's peak."),
)
# (name, what it says, the statistic of drafting)
_DRAFTED = (
    ("draft_rounds", "Passes that verified, or had no tree.", "rounds"),
    ("draft_tokens", "Tokens that they emitted.", "tokens"),
    ("draft_nodes", "Drafted tokens that were verified.", "nodes"),
    ("draft_accepted", "Drafted tokens that were accepted.", "accepted"),
    ("draft_s", "Seconds of drafting and learning.", "draft_s"),
    ("draft_verify_s", "Seconds of the passes.", "verify_s"),
)


class Metrics:
    """Counts requests and answers, and shows the model's newest statistics.

    Args:
        queue: the line of requests.
        statistics: the model's, at the start.

    Attributes:
        statistics: the newest, as `stats().to_dict()` has them.
    """

    def __init__(self, queue: GenerationQueue, statistics: dict[str, Any]) -> None:
        self.statistics = statistics
        self._registry = to = CollectorRegistry()
        self._requests = Counter("tiercache_requests", "Answers by path and status.", ["path", "status"], registry=to)
        self._prompt = Counter("tiercache_prompt_tokens", "Tokens of prompts.", registry=to)
        self._reused = Counter("tiercache_reused_tokens", "Prompt tokens whose KV cache was kept.", registry=to)
        self._new = Counter("tiercache_generated_tokens", "New tokens.", registry=to)
        self._answers = Counter("tiercache_answers", "Answers by why they ended.", ["finish_reason"], registry=to)
        self._first, self._whole, self._queued = (
            Histogram(f"tiercache_{name}_seconds", about, buckets=_SECONDS, registry=to)
            for name, about in (
                ("first_token", "Until the first new token."),
                ("answer", "Of an answer, without the queue."),
                ("queue", "Until a request's turn came."),
            )
        )
        self._registry.register(_Snapshot(self, queue))

    def publish(self, statistics: dict[str, Any]) -> None:
        """Newer statistics; from the generating thread."""
        self.statistics = statistics

    def count_request(self, path: str, status: int) -> None:
        """An answer of the server; `path` is one of its own, or "other"."""
        self._requests.labels(path, str(status)).inc()

    def count_answers(self, outcome: Outcome) -> None:
        """The model's answers to a request, those that were broken off included; from the generating thread."""
        self._queued.observe(outcome.queue_s)
        for answer in outcome.answers:
            self._prompt.inc(answer.prompt_tokens)
            self._reused.inc(answer.reused_tokens)
            self._new.inc(len(answer.tokens))
            self._answers.labels(answer.finish_reason).inc()
            self._whole.observe(answer.seconds)
            if answer.first_token_s is not None:
                self._first.observe(answer.first_token_s)

    def text(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self._registry)


class _Snapshot(Collector):
    """The newest statistics and the queue, at the moment they are read."""

    def __init__(self, metrics: Metrics, queue: GenerationQueue) -> None:
        self._metrics, self._queue = metrics, queue

    def collect(self) -> Iterator[Metric]:
        """Counters of the tiers, the passes and the drafts, and the queue."""
        found = self._metrics.statistics
        yield GaugeMetricFamily("tiercache_running_requests", "Requests that are answered.", self._queue.running)
        yield GaugeMetricFamily("tiercache_waiting_requests", "Requests that wait.", self._queue.waiting)
        yield from _tiers(found["tiers"])
        for name, about in _COUNTED:
            yield CounterMetricFamily(_named(name), about, found[name])
        for name, about in _MEASURED:
            if found[name] is not None:
                yield GaugeMetricFamily(_named(name), about, found[name])
        for name, about, statistic in _DRAFTED if found["drafting"] is not None else ():
            yield CounterMetricFamily(_named(name), about, found["drafting"][statistic])


def _named(statistic: str) -> str:
    """With its unit written out, as Prometheus has it."""
    for ending, written in (("_per_s", "_per_second"), ("_s", "_seconds")):
        if statistic.endswith(ending):
            return f"tiercache_{statistic.removesuffix(ending)}{written}"
    return f"tiercache_{statistic}"


def _tiers(tiers: dict[str, dict[str, Any]]) -> Iterator[Metric]:
    for name, about, statistic in _OF_TIERS:
        counter = CounterMetricFamily(f"tiercache_tier_{name}", about, labels=["tier"])
        for tier, found in tiers.items():
            counter.add_metric([tier], found[statistic])
        yield counter
    stalls = CounterMetricFamily("tiercache_tier_stall_seconds", "Waits by cause.", labels=["tier", "cause"])
    capacity = GaugeMetricFamily("tiercache_tier_capacity_bytes", "The tier's budget.", labels=["tier"])
    for tier, found in tiers.items():
        capacity.add_metric([tier], found["capacity_bytes"])
        for cause, seconds in found["stall_s"].items():
            stalls.add_metric([tier, cause], seconds)
    yield from (stalls, capacity)
