"""The command line: `tiercache COMMAND`. Decides nothing of its own; see `tiercache.commands`."""

from tiercache.commands import (
    base,
    bench,
    cache,
    calibrate,
    chatting,
    doctor,
    loading,
    quality,
    running,
    serving,
    stores,
)

# Each registers its commands when it is imported.
__all__ = [
    "app",
    "bench",
    "cache",
    "calibrate",
    "chatting",
    "doctor",
    "main",
    "quality",
    "running",
    "serving",
    "stores",
]

app = base.app


def main() -> None:
    """The entry point."""
    try:
        app()
    finally:
        loading.leave_uncollected()
