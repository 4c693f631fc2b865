"""Whether this runs in a notebook, and the bars that are drawn there: tqdm's."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def here() -> bool:
    """Whether a notebook's kernel runs this. IPython at a terminal is none."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


@contextmanager
def bar(title: str, total_bytes: int, done_bytes: int = 0) -> Iterator[Callable[[int], None]]:
    """A bar that goes when its work is done; calls of what it yields add bytes."""
    from tqdm.auto import tqdm  # what is drawn depends on what is installed beside it

    sizes: dict[str, Any] = {"unit": "B", "unit_scale": True, "unit_divisor": 1024}
    with tqdm(total=total_bytes, initial=done_bytes, desc=title, leave=False, **sizes) as shown:

        def advance(nbytes: int) -> None:
            shown.update(nbytes)

        yield advance
