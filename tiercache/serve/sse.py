"""Server-sent events, as the WHATWG's HTML standard has them: https://html.spec.whatwg.org/multipage/server-sent-events.html"""

import json
from typing import Any

MEDIA_TYPE = "text/event-stream"
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # proxies shall not gather them
DONE = b"data: [DONE]\n\n"


def event(data: dict[str, Any]) -> bytes:
    """An event with an object of JSON."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def comment(text: str) -> bytes:
    """What clients skip: it keeps the connection alive. `text` is one line."""
    return b": " + text.encode() + b"\n\n"
