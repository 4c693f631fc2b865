"""The entry point of `tiercache-profile`: its commands, which two files hold."""

from tiercache.commands import measuring, predicting

__all__ = ["main", "measuring"]


def main() -> None:
    """Run a command."""
    predicting.profile()
