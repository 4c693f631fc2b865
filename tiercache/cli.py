"""The command line: `tiercache COMMAND`. Decides nothing of its own; see `tiercache.commands`."""

from tiercache.commands import base, measuring, running, stores

__all__ = ["app", "main", "measuring", "running", "stores"]

app = base.app


def main() -> None:
    """The entry point."""
    app()
