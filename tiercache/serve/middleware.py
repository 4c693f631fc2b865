"""What every request passes before the app sees it: a number, the access policy, a limit of its body, the log."""

import json
import re
import time
import uuid
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiercache.serve.refusal import RefusalError
from tiercache.serve.security import AccessPolicy

_REQUEST_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
_SAFE = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}

Log = Callable[[str, str, int, float], None]  # method, path, status, seconds


class Middleware:
    """Wraps the app.

    Args:
        app: what answers.
        access: who may ask.
        check_room: raises where nothing more can be asked for now.
        max_bytes: of a request's body.
        log: is told of each answer.
    """

    def __init__(
        self, app: ASGIApp, access: AccessPolicy, check_room: Callable[[], None], max_bytes: int, log: Log
    ) -> None:
        self._app, self._access, self._check_room = app, access, check_room
        self._max_bytes, self._log = max_bytes, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers, began, status = Headers(scope=scope), time.monotonic(), 0
        given = headers.get("x-request-id", "")
        ident = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

        async def numbered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update({"X-Request-Id": ident, **_SAFE})
            await send(message)

        try:
            self._access.check(scope["path"], headers)
            if scope["method"] == "POST":  # whatever is posted asks for an answer
                _check_type(headers)
                self._check_room()
            body = await self._body(receive)
            if body is not None:
                await self._app(scope, _replayed(body, receive), numbered)
        except RefusalError as refusal:
            if not status:
                await refuse(refusal, numbered)
        finally:
            self._log(scope["method"], scope["path"], status, time.monotonic() - began)

    async def _body(self, receive: Receive) -> bytes | None:
        """All of it, since an answer depends on all of it; None where the client is gone already."""
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._max_bytes:
                raise RefusalError(
                    413, f"a request's body may have {self._max_bytes} bytes; send less", code="too_large"
                )
            if not message.get("more_body", False):
                return b"".join(parts)


def _check_type(headers: Headers) -> None:
    """Of other types a page of another site could send a body without being asked."""
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise RefusalError(
            415,
            "the body has to be JSON, and to say so; send it with the header Content-Type: application/json",
            code="unsupported_media_type",
        )


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that begins with the whole body."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return first.pop() if first else await receive()

    return replayed


async def refuse(refusal: RefusalError, send: Send) -> None:
    """Send an error. Plain ASCII, whatever strange letters the request had."""
    body = json.dumps(refusal.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    raw: list[Any] = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
