"""The entry point of `tiercache-profile`: its commands, which some files hold."""

from tiercache.commands import explaining, measuring, plotting, predicting, sweeping

__all__ = ["explaining", "main", "measuring", "plotting", "profile", "sweeping"]

profile = predicting.profile


def main() -> None:
    """Run a command."""
    profile()
