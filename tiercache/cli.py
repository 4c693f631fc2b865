"""The command line: `tiercache COMMAND`. Decides nothing of its own; see `tiercache.commands`."""

from tiercache.commands import base, bench, cache, calibrate, doctor, quality, running, stores

__all__ = ["app", "bench", "cache", "calibrate", "doctor", "main", "quality", "running", "stores"]

app = base.app


def main() -> None:
    """The entry point."""
    app()
