"""torch's fp32 products in full precision, whatever the program has allowed: TF32 keeps 11 bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Products on a card are in fp32 within.

    torch has two settings, `allow_tf32` and since 2.9 `fp32_precision`, and refuses to multiply where they contradict
    each other: the older setter writes both, so it is the one that is used.
    """
    owner = torch.backends.cuda.matmul
    newer = getattr(owner, "fp32_precision", None)
    older = _older()
    if older == "highest" and newer in (None, "none", "ieee"):
        yield
        return
    owners: list[Any] = [owner, getattr(torch.backends.mkldnn, "matmul", None)]  # the older setter changes both
    settings = [(each, each.fp32_precision) for each in owners if hasattr(each, "fp32_precision")]
    owner.allow_tf32 = False
    try:
        yield
    finally:
        if older is None:  # they contradicted each other: the older one is what the newer one is not
            owner.allow_tf32 = newer != "tf32"
        else:
            torch.set_float32_matmul_precision(older)
        for each, before in settings:
            for setting in ("none", before):  # an owner without a setting of its own reads as what is above it
                if each.fp32_precision != before:
                    each.fp32_precision = setting


def _older() -> str | None:
    """`torch.get_float32_matmul_precision`; None where torch finds that it contradicts the newer setting."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None
