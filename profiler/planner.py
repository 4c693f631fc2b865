"""Picks among ways to run a model, by what the cost model says they take; keeps the second best.

Enumerates what it is given: there are few ways, and each costs microseconds. Knows workloads, plans and machines; how
the ways come about, and what does not fit, is its callers'.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from policies.plan import Plan
from policies.run_plan import Decision
from policies.settings import DEFAULT, Settings
from profiler.cost_model import Drafting, Prediction, predict
from profiler.figure import ERROR, Figure
from profiler.hardware import Hardware
from profiler.read_rates import ReadRate
from profiler.workload import Workload

# Predictions that differ by less are the same, and the way that was named first wins.
TIE = 0.02
# A ring takes memory from weights, which are read then: these bytes are counted, not guessed. What else a prediction
# gets wrong of one ring it gets wrong of the other. It leaves out that a larger one rides out uneven reads, so for less
# than this the rules of thumb stay.
RING_TIE = 0.05
# Rings to try, in bytes in flight: with one every read begins before the last has ended; more ride out uneven layers.
_RINGS = (1, 2)


@dataclass(frozen=True)
class Way:
    """A way to run a model.

    Attributes:
        choices: what was decided for it, by what is decided.
        workload, plan: the model cut as it is run, and where its units lie.
        settings: how it reads and prefetches.
        cpu_tokens: see `cost_model.pass_time`.
        drafting: how it drafts; None for plain decoding.
    """

    choices: Mapping[str, str]
    workload: Workload
    plan: Plan
    settings: Settings = DEFAULT
    cpu_tokens: int = 0
    drafting: Drafting | None = None


@dataclass(frozen=True)
class Refused:
    """A way that does not fit.

    Attributes:
        choices: as of `Way`.
        tier: that is too small.
        missing_bytes: of it.
    """

    choices: Mapping[str, str]
    tier: str
    missing_bytes: int


@dataclass(frozen=True)
class Ranked:
    """A way and what it would do."""

    way: Way
    prediction: Prediction


def rank(ways: Sequence[Way], hardware: Hardware, *, past: int = 0, tie: float = TIE) -> list[Ranked]:
    """The fastest first; of those that tie with it the one that was named first.

    Args:
        ways: at least one, the one of the rules of thumb first.
        hardware: the machine.
        past: tokens in the KV cache.
        tie: share by which another must be faster to be taken before the first.
    """
    found = [Ranked(way, _predicted(way, hardware, past)) for way in ways]
    best = max(each.prediction.tokens_per_s for each in found)
    first = next(each for each in found if each.prediction.tokens_per_s * (1 + tie) >= best)
    others = [each for each in found if each is not first]
    return [first, *sorted(others, key=lambda each: -each.prediction.tokens_per_s)]


def settings_to_try(hardware: Hardware) -> list[Settings]:
    """The default first; then rings that are no larger than reads need, with the reads that the probe found best.

    The default alone where nobody measured the reads: a data sheet does not tell ways apart that differ by so little.
    """
    if not hardware.reads:
        return [DEFAULT]
    best, fastest = DEFAULT, max(hardware.reads, key=lambda each: each.gbps.value)
    default = next((each for each in hardware.reads if _is(each, DEFAULT)), None)
    if default is None or fastest.gbps.value > default.gbps.value * (1 + _sure(default.gbps)):
        best = replace(DEFAULT, read_threads=fastest.threads, read_bytes=fastest.block_bytes)
    rings = [replace(best, prefetch_bytes=int(count * best.in_flight_bytes)) for count in _RINGS]
    return list(dict.fromkeys([DEFAULT, best, *rings]))


def _sure(rate: Figure) -> float:
    """By which share another must be faster that it is no matter of chance."""
    return max(rate.spread, ERROR[rate.basis])


def decisions(ranked: Sequence[Ranked], refused: Sequence[Refused] = ()) -> tuple[Decision, ...]:
    """What was decided: each thing in which the ways differ, with the best of the other choices.

    That is the best way that differs in this alone, where there is one.
    """
    best, found = ranked[0], []
    for what, choice in best.way.choices.items():
        others = [each for each in ranked if each.way.choices[what] != choice]
        alone = (each for each in others if {**each.way.choices, what: choice} == dict(best.way.choices))
        other = next(alone, others[0] if others else None)
        without = next((each for each in refused if each.choices.get(what, choice) != choice), None)
        if other is not None:
            gain = best.prediction.tokens_per_s / other.prediction.tokens_per_s - 1
            found.append(Decision(what, choice, other.way.choices[what], gain, _reason(best, other)))
        elif without is not None:
            reason = f"the other lacks {without.missing_bytes} bytes of {without.tier}"
            found.append(Decision(what, choice, without.choices[what], None, reason))
    return tuple(found)


def _predicted(way: Way, hardware: Hardware, past: int) -> Prediction:
    return predict(way.workload, way.plan, hardware, past=past, cpu_tokens=way.cpu_tokens, drafting=way.drafting)


def _is(rate: ReadRate, settings: Settings) -> bool:
    return (rate.threads, rate.block_bytes) == (settings.read_threads, settings.read_bytes)


def _reason(best: Ranked, other: Ranked) -> str:
    """What the two passes differ in most."""
    ours, theirs = best.prediction.pass_time, other.prediction.pass_time
    saved = {name: theirs.busy_s[name] - seconds for name, seconds in ours.busy_s.items()}
    saved["overhead"] = theirs.overhead_s - ours.overhead_s
    most = max(saved, key=lambda name: saved[name])
    if saved[most] <= 0:
        return "it was named first, and the other is not predicted to be faster by more than predictions can tell"
    names = {"compute": "the products", "cpu": "products in main memory", "link": "the link", "ssd": "the SSD"}
    return f"a pass takes {saved[most] * 1e3:.1f} ms less of {names.get(most, most)}"
