"""torch's settings of precision: full within, and as they were behind, whichever setter the program has used."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tiercache.kernels.cuda.precision import full_precision

CUDA: Any = torch.backends.cuda.matmul
NEWER = hasattr(CUDA, "fp32_precision")


def _read(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except RuntimeError:  # torch finds that two settings contradict each other
        return "contradiction"


def settings() -> list[Any]:
    found = [lambda: CUDA.allow_tf32, torch.get_float32_matmul_precision]
    if NEWER:
        backends: list[Any] = [CUDA, torch.backends, torch.backends.cudnn, torch.backends.mkldnn.matmul]
        found += [lambda each=each: each.fp32_precision for each in backends]
    return [_read(read) for read in found]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A program that has set nothing, before and behind each test."""
    _reset()
    yield
    _reset()


def _reset() -> None:
    if NEWER:
        torch.backends.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    if NEWER:
        CUDA.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore[attr-defined]


def _set(owner: Any, value: str) -> Callable[[], None]:
    return lambda: setattr(owner, "fp32_precision", value)


OLDER = {
    "nothing": lambda: None,
    "older": lambda: setattr(CUDA, "allow_tf32", True),
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
}
PROGRAMS = OLDER | ({"newer": _set(CUDA, "tf32"), "all": _set(torch.backends, "tf32")} if NEWER else {})


@pytest.mark.parametrize("program", PROGRAMS)
def test_products_are_in_full_precision_within(program: str) -> None:
    PROGRAMS[program]()
    before = settings()
    with full_precision():
        assert CUDA.allow_tf32 is False  # torch would refuse to say if the two settings differed
        assert not NEWER or CUDA.fp32_precision in ("none", "ieee")
    assert settings() == before


def test_an_error_within_leaves_nothing_behind() -> None:
    PROGRAMS["older"]()
    with pytest.raises(ZeroDivisionError), full_precision():
        raise ZeroDivisionError
    assert CUDA.allow_tf32 is True
