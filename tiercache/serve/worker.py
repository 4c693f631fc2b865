"""Answers one request in the generating thread, and tells the event loop what comes of it."""

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tiercache.generation.answer import Answer, PassProgress, Piece, TokenLogprob
from tiercache.generation.layer_watch import PassCancelledError
from tiercache.serve.question import Part
from tiercache.serve.queue import Job
from tiercache.serve.served import Served

_SNAPSHOT_S = 0.25  # between two looks at the statistics


@dataclass(frozen=True)
class Scored:
    """The log-probabilities of a prompt's own tokens."""

    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Event:
    """Something came of a part of the request: its number, and what came."""

    part: int
    what: Scored | Piece | Answer


@dataclass
class Outcome:
    """A whole request.

    Attributes:
        answers: of each part; an empty one where nothing was to be generated.
        before, after: the model's statistics.
        queue_s: seconds until its turn came.
        cancelled: whether it was broken off.
    """

    before: dict[str, Any]
    after: dict[str, Any] = field(default_factory=dict)
    queue_s: float = 0.0
    answers: list[Answer] = field(default_factory=list)
    cancelled: bool = False


class Worker:
    """Answers requests with one model.

    Args:
        served: the model.
        publish: is given the model's statistics every now and then.
        count: is given each outcome, whoever still waits for it.
    """

    def __init__(
        self, served: Served, publish: Callable[[dict[str, Any]], None], count: Callable[[Outcome], None]
    ) -> None:
        self._served, self._publish, self._count, self._published = served, publish, count, 0.0

    def answer(self, parts: tuple[Part, ...], job: Job) -> None:
        """Send each part's events, and the outcome last; or what was raised."""
        outcome = Outcome(self._snapshot(), queue_s=job.queue_s)
        with suppress(PassCancelledError):
            for number, part in enumerate(parts):
                if job.cancelled():
                    break
                outcome.answers.append(self._part(number, part, job))
        outcome.after, outcome.cancelled = self._snapshot(), job.cancelled()
        self._count(outcome)
        job.send(outcome)

    def _part(self, number: int, part: Part, job: Job) -> Answer:
        def told(progress: PassProgress) -> None:
            job.note = f"{progress.phase} layer {progress.layer} of {progress.layers}, {progress.tokens} tokens"
            if time.monotonic() - self._published > _SNAPSHOT_S:
                self._snapshot()

        if part.score is not None:
            scored = self._served.generator.score(part.ids, part.score, cancelled=job.cancelled, progress=told)
            job.send(Event(number, Scored(scored)))
        if part.request is None:
            answer = Answer("", (), "length", len(part.ids), 0, None, 0.0)
        else:
            answer = self._served.generator.generate(
                part.request,
                emit=lambda piece: job.send(Event(number, piece)),
                cancelled=job.cancelled,
                progress=told,
            )
        job.send(Event(number, answer))
        return answer

    def _snapshot(self) -> dict[str, Any]:
        found = self._served.statistics()
        self._publish(found)
        self._published = time.monotonic()
        return found
