"""The chat in a browser: one file, which loads nothing else."""

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import HTMLResponse

_FILE = Path(__file__).parent / "page.html"


async def response() -> HTMLResponse:
    """A chat with the model, and what its answers cost."""
    return HTMLResponse(_text(), headers={"Content-Security-Policy": policy(_text()), "Cache-Control": "no-cache"})


@cache
def _text() -> str:
    return _FILE.read_text(encoding="utf-8")


def policy(text: str) -> str:
    """The Content-Security-Policy of a page: its own script and style by their hashes, this server alone to talk to."""
    script, style = (_hashes(text, tag) for tag in ("script", "style"))
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hashes(text: str, tag: str) -> str:
    inside = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(one.encode()).digest()).decode()}'" for one in inside)
