"""Loads torch and transformers for a command, sooner than their plain imports would.

What they bring stays until the process ends, so the collector need not look through it: without it, imports take a
fifth less, and the end of the process a tenth. Only a command may decide so, for the process is its own.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# transformers imports these where they are installed, for models that detect objects alone.
_LEFT_OUT = ("scipy",)


def loaded() -> bool:
    """Whether both are there already."""
    return "transformers" in sys.modules and "tiercache.compat" in sys.modules


def load() -> None:
    """Import both, and the parts of transformers that every model needs.

    Raises:
        EnvironmentUnsupportedError: transformers lacks a part.
    """
    with _uncollected():
        import torch  # noqa: F401

        with _absent(_LEFT_OUT):
            import tiercache.compat  # noqa: F401


def leave_uncollected() -> None:
    """The process is about to end: no more searches for what nobody refers to."""
    gc.freeze()


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the collector; what came within is not looked at later, either."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def _absent(packages: tuple[str, ...]) -> Iterator[None]:
    """Within it these packages look as if they were not installed; who imports them afterwards gets them."""
    hidden = [name for name in packages if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]
