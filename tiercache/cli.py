"""The command line: `tiercache COMMAND`. Decides nothing of its own; see `tiercache.commands`."""

from tiercache.commands import base, bench, calibrate, chatting, doctor, quality, running, serving, stores

__all__ = ["app", "bench", "calibrate", "chatting", "doctor", "main", "quality", "running", "serving", "stores"]

app = base.app


def main() -> None:
    """The entry point."""
    app()
