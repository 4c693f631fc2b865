"""A share of a count, for all who count hits."""


def rate(part: float, whole: float) -> float | None:
    """`part` of `whole`; None of nothing."""
    return float(part / whole) if whole else None
