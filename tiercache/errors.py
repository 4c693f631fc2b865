"""Every error tiercache raises on purpose: one small tree, one exit code per branch.

TiercacheError                      1
├── UsageError                      2   a value, name or call that cannot be meant
│   ├── UnsupportedModelError       2   an architecture, layout or feature tiercache does not run
│   ├── DraftError                  2   a drafted tree that cannot be verified by the rule that was chosen
│   └── ClosedError                 2   a resource used after it was closed
├── DoesNotFitError                 3   a budget too small, with the bytes that are missing
│   └── ContextExceededError        3   a pass that would outgrow what was reserved for it
├── StoreError                      4   a checkpoint or store that is corrupt, cut short or another's
│   └── QuantizationError           4   weights that the codes cannot hold
└── EnvironmentUnsupportedError     5   this machine lacks something: a device, disk space, a permission

Each message says what happened, with the numbers, and one concrete way out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class TiercacheError(Exception):
    """Base of every error that tiercache raises on purpose; `exit_code` is that of the command line."""

    exit_code = 1


class UsageError(TiercacheError):
    """A value, name or call that cannot be meant."""

    exit_code = 2


class UnsupportedModelError(UsageError):
    """An architecture, layout or feature that tiercache does not run."""


class DraftError(UsageError):
    """A drafted tree that is malformed, or that the rule of verification cannot take."""


class ClosedError(UsageError):
    """A resource used after it was closed."""


class DoesNotFitError(TiercacheError):
    """A budget is too small; `missing_bytes` more would do.

    Raised before anything large is allocated or read. `tier` is whose budget it is, where one alone is to blame.
    """

    exit_code = 3

    def __init__(self, message: str, *, missing_bytes: int = 0, tier: str = "") -> None:
        super().__init__(message)
        self.missing_bytes, self.tier = missing_bytes, tier


class ContextExceededError(DoesNotFitError):
    """A forward pass would outgrow the KV cache or the activations that were reserved for it."""


class StoreError(TiercacheError):
    """A checkpoint or store that is corrupt, cut short, incomplete, or another model's."""

    exit_code = 4


class QuantizationError(StoreError):
    """Weights that the codes cannot hold: not finite, or outside the range of the scales."""


class EnvironmentUnsupportedError(TiercacheError):
    """This machine lacks something that was asked for: a device, disk space, a permission."""

    exit_code = 5


@contextmanager
def permissions_named(path: Path) -> Iterator[None]:
    """Turns a refusal of the system to read `path` into an `EnvironmentUnsupportedError`."""
    try:
        yield
    except PermissionError as error:
        raise EnvironmentUnsupportedError(f"{path} may not be read; change its permissions") from error
