"""Sizes as people write and read them: `Budget.parse("22GiB")`, `human(1536)`.

A fraction and "auto" stay as they are until `Budget.resolve` is given the numbers of a machine.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from policies.tables import human as human
from tiercache.errors import UsageError

SizeLike = int | float | str

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{p}b": 1000**n for n, p in enumerate("kmgt", start=1)}
_UNITS |= {f"{p}ib": 1024**n for n, p in enumerate("kmgt", start=1)}
_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z%]*)\s*", re.IGNORECASE)

# Whoever writes a smaller number has left the unit out.
_LEAST_BYTES = 1000

# What "auto" leaves to the rest of the machine.
AUTO_FRACTION = 0.9


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Bytes, a share of what the tier has, or "auto" (nine tenths of what is free).

    >>> Budget.parse("22GiB").resolve(total_bytes=24 << 30, free_bytes=23 << 30) == 22 << 30
    True
    """

    size_bytes: int | None = None
    fraction: float | None = None

    @classmethod
    def parse(cls, value: SizeLike) -> "Budget":
        """Read `"22GiB"`, `"48GB"`, `"50%"`, `0.5`, `"auto"` or a count of bytes.

        Raises:
            UsageError: the value is none of these, or not above zero.
        """
        if isinstance(value, str) and value.strip().lower() == "auto":
            return cls()
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise UsageError(f"a budget is a size, a fraction or 'auto', not {value!r}; try '22GiB'")
        if isinstance(value, float):
            return cls._share(value, value)
        if isinstance(value, str):
            return cls._read(value)
        return cls._of_bytes(value, value, bare=True)

    @classmethod
    def _read(cls, text: str) -> "Budget":
        match = _SIZE.fullmatch(text)
        if match is None:
            raise UsageError(f"cannot read the size {text!r}; write it as '22GiB', '48GB', '50%' or 'auto'")
        number, unit = Fraction(match[1]), match[2].lower()
        if unit == "%":
            return cls._share(float(number / 100), text)
        if unit not in _UNITS:
            raise UsageError(f"unknown unit in {text!r}; use B, KB, MB, GB, TB, KiB, MiB, GiB, TiB or %")
        if unit == "" and "." in text:
            return cls._share(float(number), text)
        return cls._of_bytes(int(number * _UNITS[unit]), text, bare=unit == "")

    @classmethod
    def _of_bytes(cls, size_bytes: int, shown: object, *, bare: bool) -> "Budget":
        if size_bytes <= 0:
            told = f"{shown!r}" if isinstance(shown, str) else f"{shown} bytes"
            raise UsageError(f"a budget of {told} holds nothing; give a size above zero, such as '8GiB'")
        if bare and size_bytes < _LEAST_BYTES:
            raise UsageError(f"a budget of {shown!r} has no unit and is {size_bytes} bytes; write it as '8GiB'")
        return cls(size_bytes=size_bytes)

    @classmethod
    def _share(cls, fraction: float, shown: object) -> "Budget":
        if not 0 < fraction <= 1:
            raise UsageError(f"a fraction lies above 0 and at most 1, not {shown!r}; bytes have a unit: '1.5GiB'")
        return cls(fraction=fraction)

    def resolve(self, *, total_bytes: int, free_bytes: int) -> int:
        """Bytes of this budget on a tier that has `total_bytes`, of which `free_bytes` are free."""
        if self.size_bytes is not None:
            return self.size_bytes
        if self.fraction is not None:
            return int(self.fraction * total_bytes)
        return int(AUTO_FRACTION * free_bytes)
