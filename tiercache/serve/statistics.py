"""What one answer cost, out of the model's statistics before and after it: the `tiercache` block of an answer."""

from typing import Any

from tiercache.serve.worker import Outcome
from tiercache.stats.difference import behind_first, difference, tokens_per_s

_STATE = ("precision", "device", "kernels", "lossy", "plan", "predicted_pass_s", "actual_pass_s")


def block(outcome: Outcome) -> dict[str, Any]:
    """Plain data.

    Returns:
        `queue_s`, `first_token_s` and `seconds`, summed over a request's prompts; `tokens_per_s` behind the first
        token, None where there are not two; `tiers`, bytes and requests by tier; `ssd_bytes`; `drafting`, None
        without a drafter; and how the model is run.
    """
    answers, found = outcome.answers, difference(outcome.before, outcome.after)
    first = [answer.first_token_s for answer in answers if answer.first_token_s is not None]
    timed = behind_first((len(answer.tokens), answer.first_token_s, answer.seconds) for answer in answers)
    return {
        "schema": "tiercache.answer/1",
        "queue_s": outcome.queue_s,
        "first_token_s": sum(first) if first else None,
        "seconds": sum(answer.seconds for answer in answers),
        "tokens_per_s": tokens_per_s(*timed),
        "reused_tokens": sum(answer.reused_tokens for answer in answers),
        **{name: found[name] for name in ("tiers", "ssd_bytes", "drafting")},
        **{name: outcome.after.get(name) for name in _STATE},
    }
