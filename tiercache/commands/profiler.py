"""The entry point of `tiercache-profile`: its commands, which several files hold."""

from tiercache.commands import explaining, loading, measuring, planning, plotting, predicting, sweeping

__all__ = ["explaining", "main", "measuring", "planning", "plotting", "profile", "sweeping"]

profile = predicting.profile


def main() -> None:
    """Run a command."""
    try:
        profile()
    finally:
        loading.leave_uncollected()
