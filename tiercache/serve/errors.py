"""What went wrong, as the error that the client is told."""

import json
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from tiercache.errors import DoesNotFitError, UsageError
from tiercache.serve.refusal import RefusalError

_LONGEST = 200  # letters of a field's name that are repeated


class ErrorResponse(JSONResponse):
    """In ASCII: a request's own letters, which errors repeat, may be no Unicode."""

    def render(self, content: Any) -> bytes:
        """JSON."""
        return json.dumps(content).encode()


def refusal_of(error: Exception) -> RefusalError:
    """Any exception as a refusal. What is nobody's fault tells nothing of the machine."""
    if isinstance(error, RefusalError):
        return error
    if isinstance(error, RequestValidationError):
        return _invalid(error)
    if isinstance(error, HTTPException):
        if error.status_code == 400:  # the framework's own, of a body that it could not read
            return RefusalError(
                400, "the body cannot be read as JSON in UTF-8; send one JSON object", code="invalid_json"
            )
        return RefusalError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, UsageError | DoesNotFitError):
        return RefusalError(400, str(error))
    return RefusalError(500, "the server failed; its log says why", code="internal_error")


def _invalid(error: RequestValidationError) -> RefusalError:
    """The first thing that is wrong with a body."""
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return RefusalError(400, f"the body is no JSON ({_told(first)}); send one JSON object", code="invalid_json")
    if first["type"] == "missing" and first["loc"] == ("body",):
        return RefusalError(400, "the body is empty; send one JSON object", code="invalid_json")
    place = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "unsupported" and "field" in first.get("ctx", {}):
        place.append(first["ctx"]["field"])
    param = ".".join(place)[:_LONGEST] or None
    if first["type"] == "extra_forbidden":
        return RefusalError(400, f"unknown field {param}; leave it out", code="unknown_field", param=param)
    if first["type"] == "unsupported":
        return RefusalError(400, first["msg"], code="unsupported", param=param)
    what = f"{param}: {first['msg']}" if param else first["msg"]
    return RefusalError(400, what, code="invalid_value", param=param)


def _told(broken: dict[str, Any]) -> str:
    """What is wrong with JSON, and where."""
    return f"{broken.get('ctx', {}).get('error', broken['msg'])}, at character {broken['loc'][-1]}"


def add_shapes(app: FastAPI) -> None:
    """All errors of an app in OpenAI's shape."""

    async def refused(request: Request, error: Exception) -> Response:
        refusal = refusal_of(error)
        return ErrorResponse(refusal.body(), refusal.status, refusal.headers)

    for kind in (RefusalError, RequestValidationError, HTTPException, UsageError, DoesNotFitError, Exception):
        app.add_exception_handler(kind, refused)
