"""The server's paths, by OpenAI's API: what is asked goes into the queue, what comes of it goes out."""

import asyncio
import logging
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, StreamingResponse

from tiercache import __version__
from tiercache.serve import page, question, sse
from tiercache.serve.chat_reply import ChatReply
from tiercache.serve.completion_reply import CompletionReply
from tiercache.serve.errors import add_shapes, refusal_of
from tiercache.serve.logprobs import LogprobWriter
from tiercache.serve.metrics import CONTENT_TYPE_LATEST, Metrics
from tiercache.serve.question import Part
from tiercache.serve.queue import GenerationQueue, Job
from tiercache.serve.refusal import RefusalError
from tiercache.serve.reply import Reply
from tiercache.serve.schema import ChatRequest, CompletionRequest, Sampling
from tiercache.serve.served import Served
from tiercache.serve.worker import Outcome, Worker

_LOG = logging.getLogger(__name__)
HEARTBEAT_S = 2.0  # without a chunk, until a comment keeps the stream alive
_GONE = 499  # nobody reads this answer; the number is nginx's


class Server:
    """Answers requests with one model. `app` is what a web server runs.

    Args:
        served: the model.
        waiting: requests that may wait at most.
        heartbeat_s: without a chunk, until a comment keeps a stream alive.
    """

    def __init__(self, served: Served, *, waiting: int, heartbeat_s: float = HEARTBEAT_S) -> None:
        self._served, self._heartbeat_s = served, heartbeat_s
        self.queue = GenerationQueue(waiting)
        self.metrics = Metrics(self.queue, served.statistics())
        self._worker = Worker(served, self.metrics.publish, self.metrics.count_answers)
        self._writer = LogprobWriter(served.tokenizer)
        self.app = FastAPI(title="tiercache", version=__version__, docs_url=None, redoc_url=None)
        self._add_paths()
        add_shapes(self.app)

    def _add_paths(self) -> None:
        get, post = self.app.get, self.app.post
        post("/v1/chat/completions")(self._chat)
        post("/v1/completions")(self._complete)
        get("/v1/models")(self._models)
        get("/v1/models/{name:path}")(self._model)
        get("/health")(self._health)
        get("/stats")(self._stats)
        get("/metrics", response_class=Response)(self._metrics)
        get("/", response_class=Response)(page.response)

    async def _chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        parts = await run_in_threadpool(question.of_chat, self._served, body)
        writer = self._writer if body.logprobs else None
        reply = ChatReply(self._served.name, parts, writer, with_usage=body.with_usage)
        return await self._answer(parts, reply, body, request)

    async def _complete(self, body: CompletionRequest, request: Request) -> Response:
        """Continue one or several prompts."""
        parts = await run_in_threadpool(question.of_completion, self._served, body)
        writer = self._writer if body.logprobs is not None else None
        reply = CompletionReply(self._served.name, parts, writer, with_usage=body.with_usage)
        return await self._answer(parts, reply, body, request)

    async def _models(self) -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [self._described()]}

    async def _model(self, name: str) -> dict[str, Any]:
        """Describe the model."""
        if name != self._served.name:
            raise RefusalError(404, f"this server has the model {self._served.name!r} alone", code="model_not_found")
        return self._described()

    async def _health(self) -> dict[str, Any]:
        """Whether it serves, and how many wait."""
        return {"status": "ok", "running": self.queue.running, "waiting": self.queue.waiting}

    async def _stats(self) -> dict[str, Any]:
        """The model's statistics, a quarter of a second old at most while it answers."""
        return self.metrics.statistics

    async def _metrics(self) -> Response:
        """Metrics for Prometheus."""
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def _described(self) -> dict[str, Any]:
        about = {"id": self._served.name, "object": "model", "created": self._served.created, "owned_by": "tiercache"}
        return about | {"max_model_len": self._served.generator.context}

    async def _answer(self, parts: tuple[Part, ...], reply: Reply, body: Sampling, request: Request) -> Response:
        job = self.queue.submit(partial(self._worker.answer, parts))
        watching = asyncio.create_task(self._watch(job, request))  # at once: a stream may never begin
        if body.stream:
            stream = self._streamed(job, reply, watching)
            return StreamingResponse(stream, media_type=sse.MEDIA_TYPE, headers=sse.HEADERS)
        try:
            async for event in job.events(self._heartbeat_s):
                if isinstance(event, Outcome):
                    return self._cut_off() if event.cancelled else await run_in_threadpool(_whole, reply, event)
                if event is not None:
                    reply.take(event)
            return self._cut_off()
        finally:
            watching.cancel()

    def _cut_off(self) -> Response:
        """The answer to a request that was cancelled."""
        if self.queue.closed:
            raise RefusalError(503, "the server is shutting down", code="shutting_down")
        return Response(status_code=_GONE)

    async def _streamed(self, job: Job, reply: Reply, watching: asyncio.Task[None]) -> AsyncIterator[bytes]:
        last, outcome = None, None
        try:
            for chunk in reply.opening():
                yield sse.event(chunk)
            async for event in job.events(self._heartbeat_s):
                if event is None:
                    yield sse.comment(job.note)
                elif isinstance(event, Outcome):
                    outcome = event
                elif (written := await run_in_threadpool(reply.chunk, event)) is not None:
                    if reply.is_last(event):
                        last = written  # the statistics come with it
                    else:
                        yield sse.event(written)
            if outcome is None or outcome.cancelled:
                self._cut_off()
                return
            for chunk in reply.closing(last, outcome):
                yield sse.event(chunk)
            yield sse.DONE
        except Exception as error:  # the status is sent already; clients read an error out of the stream
            refusal = refusal_of(error)
            if refusal.status == 500:
                _LOG.exception("an answer failed")
            yield sse.event(refusal.body())
        finally:
            watching.cancel()
            self.queue.cancel(job)

    async def _watch(self, job: Job, request: Request) -> None:
        """Cancel a job once its client is gone."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.queue.cancel(job)


def _whole(reply: Reply, outcome: Outcome) -> Response:
    """As JSON, which takes seconds where a long text has log-probabilities."""
    return JSONResponse(reply.whole(outcome))
