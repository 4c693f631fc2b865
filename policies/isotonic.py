"""Isotonic regression: the nearest values that never fall."""

from __future__ import annotations

from collections.abc import Sequence

from policies.arrays import NDArray, np


def ascending(
    values: Sequence[float] | NDArray[np.float64], weights: Sequence[float] | NDArray[np.float64]
) -> NDArray[np.float64]:
    """The nearest values that never fall, by weighted squares (pool adjacent violators; Ayer et al., 1955)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, how many
    for one, light in zip(np.asarray(values).tolist(), np.asarray(weights).tolist(), strict=True):
        blocks.append((one, light, 1))
        while len(blocks) > 1 and blocks[-1][0] <= blocks[-2][0]:
            (one, light, few), (other, heavy, many) = blocks.pop(), blocks.pop()
            blocks.append(((one * light + other * heavy) / (light + heavy), light + heavy, few + many))
    return np.repeat([block[0] for block in blocks], [block[2] for block in blocks])
