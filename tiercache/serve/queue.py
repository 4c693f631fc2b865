"""One generation at a time: the thread that generates, and the bounded line of requests before it.

Ordering: the event loop submits and cancels jobs; one thread runs them in the order they came. A job's events go to the
loop by `call_soon_threadsafe`, so they arrive in the order they were sent, and its end after all of them.
"""

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from tiercache.serve.refusal import RefusalError

_NEWEST = 8  # jobs whose seconds say how long one takes
_LONGEST_WAIT_S = 600


class _End:
    """The last event of a job."""


class Job:
    """One request's work: its events, and whether they are still wanted.

    Attributes:
        work: what is done when its turn comes; None once nobody will do it, for it holds the whole request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, work: "Callable[[Job], None]") -> None:
        self._loop, self._events = loop, asyncio.Queue[Any]()
        self.work: Callable[[Job], None] | None = work
        self._cancelled = threading.Event()
        self._asked, self.queue_s = time.monotonic(), 0.0
        self.note = "queued"  # for people who wait; the generating thread changes it

    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self._cancelled.is_set()

    def cancel(self) -> None:
        """End it at the next layer."""
        self._cancelled.set()

    def begin(self) -> None:
        """Its turn has come."""
        self.queue_s = time.monotonic() - self._asked

    def send(self, event: Any) -> None:
        """From the generating thread: an event, or the exception that ended the job."""
        self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def end(self) -> None:
        """From the event loop: there will be no more events."""
        self._events.put_nowait(_End())

    async def events(self, heartbeat_s: float) -> AsyncIterator[Any]:
        """All events to the end; None whenever so many seconds brought none. Raises what the job raised."""
        while True:
            try:
                event = await asyncio.wait_for(self._events.get(), heartbeat_s)
            except TimeoutError:
                yield None
                continue
            if isinstance(event, _End):
                return
            if isinstance(event, BaseException):
                raise event
            yield event


class GenerationQueue:
    """Runs jobs one after the other in one thread; at most `bound` wait beside the one that runs."""

    def __init__(self, bound: int) -> None:
        self._bound = bound
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generation")
        self._jobs: dict[Job, Future[None]] = {}  # touched by the event loop alone
        self._seconds: deque[float] = deque(maxlen=_NEWEST)
        self.closed = False

    @property
    def running(self) -> int:
        """Jobs that run: 0 or 1."""
        return min(1, len(self._jobs))

    @property
    def waiting(self) -> int:
        """Jobs that wait for their turn."""
        return max(0, len(self._jobs) - 1)

    def check_room(self) -> None:
        """Whether one more job may come; asked before a request is read, and again before it is queued.

        Raises:
            RefusalError: 429 where the line is full, with the seconds after which to try again; 503 once closed.
        """
        if self.closed:
            raise RefusalError(503, "the server is shutting down", code="shutting_down")
        if len(self._jobs) > self._bound:
            wait_s = self._retry_after_s()
            raise RefusalError(
                429,
                f"{self.running} request is answered and {self.waiting} wait, which is all that may; try again in "
                f"{wait_s} s",
                code="queue_full",
                headers={"Retry-After": str(wait_s)},
            )

    def submit(self, work: Callable[[Job], None]) -> Job:
        """Queue `work`, which is given its job in the generating thread.

        Raises:
            RefusalError: as of `check_room`.
        """
        self.check_room()
        loop = asyncio.get_running_loop()
        job = Job(loop, work)
        future = self._jobs[job] = self._thread.submit(self._run, job)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._ended, job))
        return job

    def cancel(self, job: Job) -> None:
        """Nobody waits for it: end it at the next layer, or give up its place in the line."""
        job.cancel()
        if (future := self._jobs.get(job)) is not None and future.cancel():
            job.work = None  # the thread keeps the job itself until it comes to it

    def close(self) -> None:
        """Take no more jobs, and end those there are."""
        self.closed = True
        for job in list(self._jobs):
            self.cancel(job)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _run(self, job: Job) -> None:
        job.begin()
        began, work = time.monotonic(), job.work
        try:
            if work is not None:
                work(job)
        except BaseException as error:
            job.send(error)
        self._seconds.append(time.monotonic() - began)

    def _ended(self, job: Job) -> None:
        del self._jobs[job]
        job.work = None
        job.end()

    def _retry_after_s(self) -> int:
        """Seconds until a place becomes free, by what the newest jobs took."""
        each = sum(self._seconds) / len(self._seconds) if self._seconds else 1.0
        return max(1, min(_LONGEST_WAIT_S, math.ceil(each)))
