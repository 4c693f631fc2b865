"""The entry point of `tiercache-profile`: its commands, which two files hold."""

from tiercache.commands import measuring, profiling

__all__ = ["main", "measuring"]


def main() -> None:
    """Run a command."""
    profiling.profile()
