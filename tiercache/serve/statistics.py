"""What one answer cost, out of the model's statistics before and after it: the `tiercache` block of an answer."""

from typing import Any

from tiercache.serve.worker import Outcome

_TIER_COUNTERS = ("hits", "misses", "hit_bytes", "miss_bytes", "loaded_bytes")
_DRAFT_COUNTERS = ("rounds", "tokens", "nodes", "accepted")
_STATE = ("precision", "device", "kernels", "lossy", "plan", "predicted_pass_s", "actual_pass_s")


def block(outcome: Outcome) -> dict[str, Any]:
    """Plain data.

    Returns:
        `queue_s`, `first_token_s` and `seconds`, summed over a request's prompts; `tokens_per_s` behind the first
        token, None where there are not two; `tiers`, bytes and requests by tier; `ssd_bytes`; `drafting`, None
        without a drafter; and how the model is run.
    """
    answers, before, after = outcome.answers, outcome.before, outcome.after
    first = [answer.first_token_s for answer in answers if answer.first_token_s is not None]
    return {
        "schema": "tiercache.answer/1",
        "queue_s": outcome.queue_s,
        "first_token_s": sum(first) if first else None,
        "seconds": sum(answer.seconds for answer in answers),
        "tokens_per_s": _tokens_per_s(outcome),
        "reused_tokens": sum(answer.reused_tokens for answer in answers),
        "tiers": {
            name: _difference(before["tiers"][name], tier, _TIER_COUNTERS) for name, tier in after["tiers"].items()
        },
        "ssd_bytes": after["ssd_bytes"] - before["ssd_bytes"],
        "drafting": _drafting(before.get("drafting"), after.get("drafting")),
        **{name: after.get(name) for name in _STATE},
    }


def _tokens_per_s(outcome: Outcome) -> float | None:
    timed = [one for one in outcome.answers if one.first_token_s is not None and len(one.tokens) > 1]
    seconds = sum(one.seconds - (one.first_token_s or 0.0) for one in timed)
    return sum(len(one.tokens) - 1 for one in timed) / seconds if seconds > 0 else None


def _drafting(before: dict[str, Any] | None, after: dict[str, Any] | None) -> dict[str, Any] | None:
    if before is None or after is None:
        return None
    found = _difference(before, after, _DRAFT_COUNTERS)
    return found | {"tokens_per_pass": found["tokens"] / found["rounds"] if found["rounds"] else None}


def _difference(before: dict[str, Any], after: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: after[name] - before[name] for name in names}
