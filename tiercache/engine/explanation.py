"""Where the milliseconds of a token go, and what binds: of a prediction, or of a run that has been.

Takes the plain data that `predict --json` and `run --json` print, and gives plain data that shows itself as tables;
measures nothing.
"""

from collections.abc import Mapping
from typing import Any

from policies.tables import Shown, Table
from tiercache.errors import UsageError

SCHEMA = "tiercache.explanation/1"
_PREDICTION, _RUN = "tiercache.prediction/1", "tiercache.run/1"
WANTED = "what 'tiercache-profile predict --json' or 'tiercache run --json' printed"
REST, DRAFTING = "products, Python and launches", "drafting"


class Explanation(Shown, dict[str, Any]):
    """Plain data that shows itself: what adds to a token, and what binds in turn."""

    def tables(self) -> tuple[Table, Table]:
        whole = self["token_ms"]
        adds = sorted(self["adds_ms"].items(), key=lambda pair: -pair[1])
        rows = [(name, f"{each:.1f}", f"{each / whole:.0%}") for name, each in adds if each]
        title = f"{self['subject']}: {whole:.1f} ms a token"
        turns = []
        for step in self["bottlenecks"]:
            speeds = step["tokens_per_s"], step["twice_as_fast"]["tokens_per_s"]
            gone = "" if step["infinitely_fast"] is None else f"{step['infinitely_fast']['tokens_per_s']:.2f}"
            turns.append((step["binding_tier"], *(f"{each:.2f}" for each in speeds), gone))
        headings = ("bound by", "tokens/s", "if it were twice as fast", "if it took no time")
        return Table(title, ("what", "adds ms", "of a token"), tuple(rows)), Table("In turn", headings, tuple(turns))


def explanation(found: Mapping[str, Any]) -> Explanation:
    """Of what a command printed.

    Raises:
        UsageError: it is neither a prediction nor a run, or lacks what is explained.
    """
    schema = found.get("schema")
    if schema not in (_PREDICTION, _RUN):
        raise UsageError(f"this is {schema or 'no JSON of tiercache'}; give {WANTED}")
    try:
        return _of_prediction(found) if schema == _PREDICTION else explanation_of_run(found["stats"])
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"this {schema} lacks {error}; it is another version's: make it again") from error


def _of_prediction(found: Mapping[str, Any]) -> Explanation:
    drafting = found["drafting"]
    emitted, draft_s = (1.0, 0.0) if drafting is None else (drafting["tokens_per_pass"], drafting["draft_s"])
    whole = found["pass_s"] + draft_s
    adds = {**found["exposed_s"], DRAFTING: draft_s}
    busy = {**found["busy_s"], "overhead": found["overhead_s"], DRAFTING: draft_s}
    return Explanation(
        {
            "schema": SCHEMA,
            "of": "prediction",
            "subject": f"{found['model']}, {found['precision']}, on {found['gpu']} with {found['dram']}",
            "tokens_per_s": found["tokens_per_s"],
            "token_ms": _ms(whole, emitted),
            "tokens_per_pass": emitted,
            "adds_ms": {name: _ms(seconds, emitted) for name, seconds in adds.items()},
            "busy_ms": {name: _ms(seconds, emitted) for name, seconds in busy.items()},
            "by_kind_ms": {
                kind: {name: _ms(seconds, emitted) for name, seconds in each.items()}
                for kind, each in found["by_kind_s"].items()
            },
            "bytes_per_token": {"weights": found["pass_bytes"] / emitted},
            "binding_tier": found["bottlenecks"][0]["binding_tier"],
            "bottlenecks": found["bottlenecks"],
            "basis": found["basis"],
        }
    )


def explanation_of_run(stats: Mapping[str, Any]) -> Explanation:
    """Of a run's statistics as plain data: all passes, the prompt's with them, since waiting is counted over all.

    Raises:
        UsageError: no pass was made.
    """
    drafting, tokens = stats["drafting"], stats["prefills"] + stats["decode_tokens"]
    total_s, draft_s = stats["prefill_s"] + stats["decode_s"], 0.0
    if drafting is not None and drafting["rounds"]:
        tokens, draft_s = stats["prefills"] + drafting["tokens"], drafting["draft_s"]
        total_s = stats["prefill_s"] + draft_s + drafting["verify_s"]
    if not total_s:
        raise UsageError("this run made no pass; generate some tokens")
    adds = {
        f"{name} waits for {cause}": seconds
        for name, tier in stats["tiers"].items()
        for cause, seconds in tier["stall_s"].items()
    }
    adds |= {DRAFTING: draft_s} if draft_s else {}
    total_s = max(total_s, sum(adds.values()))  # a text's last step is in no sum of seconds, its waits are
    adds[REST] = total_s - sum(adds.values())
    binding = max(adds, key=lambda name: adds[name])
    return Explanation(
        {
            "schema": SCHEMA,
            "of": "run",
            "subject": f"{stats['precision']} on {stats['device']}, {stats['passes']} passes, {tokens} tokens",
            "tokens_per_s": tokens / total_s,
            "token_ms": _ms(total_s, tokens),
            "tokens_per_pass": tokens / stats["passes"],
            "adds_ms": {name: _ms(seconds, tokens) for name, seconds in adds.items()},
            "busy_ms": None,
            "by_kind_ms": None,
            "bytes_per_token": {
                **{f"brought to {name}": tier["miss_bytes"] / tokens for name, tier in stats["tiers"].items()},
                "from the SSD": stats["ssd_bytes"] / tokens,
            },
            "binding_tier": binding,
            "bottlenecks": _without_each(adds, total_s, tokens),
            "basis": "measured",
        }
    )


def _without_each(adds: Mapping[str, float], total_s: float, tokens: float) -> list[dict[str, Any]]:
    """What takes longest, and the speed if it were halved or gone; then of what is left, and so on.

    A run counts only waits that nothing hid, so that each leaves as many seconds as it took: the estimate is what would
    be seen if nothing else became longer.
    """
    found, left = [], total_s
    longest = sorted((name for name in adds if adds[name] > 0), key=lambda name: -adds[name])
    for place, name in enumerate(longest):
        seconds, after = adds[name], longest[place + 1 : place + 2]
        then = next(iter(after), name)
        halved = max(name, then, key=lambda each: adds[each] / (2 if each == name else 1))
        found.append(
            {
                "tokens_per_s": tokens / left,
                "binding_tier": name,
                "twice_as_fast": {"tokens_per_s": tokens / (left - seconds / 2), "binding_tier": halved},
                "infinitely_fast": {"tokens_per_s": tokens / (left - seconds), "binding_tier": then} if after else None,
            }
        )
        left -= seconds
    return found


def _ms(seconds: float, tokens: float) -> float:
    return 1e3 * seconds / tokens
