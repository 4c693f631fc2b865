"""What happened between two moments, and at which rates: out of `Stats.to_dict()` at each of them. Plain data."""

from collections.abc import Iterable, Mapping
from typing import Any

_COUNTERS = ("passes", "ssd_bytes", "decode_tokens", "decode_s")
_OF_TIERS = ("hits", "misses", "hit_bytes", "miss_bytes", "needed_bytes", "loaded_bytes")
_OF_DRAFTING = ("rounds", "tokens", "nodes", "accepted", "draft_s", "verify_s")
_OF_NEURONS = ("moved_bytes", "dense_bytes", "read_bytes")


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Counters of the time between.

    Returns:
        `passes`, `ssd_bytes`, `decode_tokens`, `decode_s`; `tiers`, by name; `drafting` and `neurons`, None where
        there is no such thing; of drafting also `tokens_per_pass`, by the definition of `DraftStats`, None without a
        round.
    """
    drafting = _part(before["drafting"], after["drafting"], _OF_DRAFTING)
    if drafting is not None:
        drafting["tokens_per_pass"] = drafting["tokens"] / drafting["rounds"] if drafting["rounds"] else None
    return {
        **_less(before, after, _COUNTERS),
        "tiers": {name: _less(before["tiers"][name], tier, _OF_TIERS) for name, tier in after["tiers"].items()},
        "drafting": drafting,
        "neurons": _part(before["neurons"], after["neurons"], _OF_NEURONS),
    }


def moved_bytes(found: Mapping[str, Any]) -> dict[str, int]:
    """Of a difference: bytes read from the SSD, copied over the link to HBM, and asked of main memory.

    In mixed mode main memory is asked for whole units of which tokens read some neurons: those are told instead.
    """
    tiers, neurons = found["tiers"], found["neurons"]
    moved = {"ssd": found["ssd_bytes"]}
    if "hbm" in tiers:
        own = 0 if neurons is None else neurons["moved_bytes"] + neurons["dense_bytes"]
        moved["link"] = tiers["hbm"]["loaded_bytes"] + own
    if neurons is not None:
        moved["neurons"] = neurons["read_bytes"]
    elif "dram" in tiers:
        moved["dram"] = tiers["dram"]["needed_bytes"]
    return moved


def tokens_per_s(tokens: int, seconds: float) -> float | None:
    """Speed of the tokens behind an answer's first; None where there are none."""
    return tokens / seconds if tokens > 0 and seconds > 0 else None


def behind_first(answers: Iterable[tuple[int, float | None, float]]) -> tuple[int, float]:
    """Tokens behind the first of each answer, and their seconds.

    Args:
        answers: of each its tokens, seconds to the first (None where none came), and seconds in all.
    """
    timed = [(tokens - 1, whole - first) for tokens, first, whole in answers if first is not None and tokens > 1]
    return sum(tokens for tokens, _ in timed), sum(seconds for _, seconds in timed)


def _part(
    before: Mapping[str, Any] | None, after: Mapping[str, Any] | None, names: tuple[str, ...]
) -> dict[str, Any] | None:
    return None if before is None or after is None else _less(before, after, names)


def _less(before: Mapping[str, Any], after: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: after[name] - before[name] for name in names}
