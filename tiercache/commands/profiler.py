"""The entry point of `tiercache-profile`: its commands, which several files hold."""

from tiercache.commands import measuring, planning, predicting

__all__ = ["main", "measuring", "planning"]


def main() -> None:
    """Run a command."""
    predicting.profile()
