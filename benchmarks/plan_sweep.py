"""Is the plan good? Runs every way at a dozen budgets and holds the planned one against the best of them.

`python -m benchmarks.plan_sweep STORE CHECKPOINT`. Each round opens every way once, in turn, so that what disturbs the
machine disturbs all; the plan and the best of the sweep then meet in pairs, for the best of many is partly luck.
"""

import itertools
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from policies.settings import Settings
from tiercache.bench.settling import in_turn
from tiercache.config.drafting import DraftConfig
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import Budget
from tiercache.engine.drafting_choice import NGRAMS, NOBODY, OWN_PLANES
from tiercache.engine.session import plan_model
from tiercache.errors import DoesNotFitError

MIB = 1 << 20
SHARES = (0.45, 0.65, 0.85)  # of the weights, that main memory holds
RINGS = (8 * MIB, 16 * MIB, 32 * MIB)
READS = ((4, 2 * MIB), (8, MIB))
ROUNDS, PAIRS = 1, 5  # texts of each way in the sweep; then of two in pairs
_CONTEXT, _NODES, _TOKENS = 256, 16, 12


@dataclass(frozen=True)
class Case:
    """A budget and what became of its plan.

    Attributes:
        name: model, precision, share of the weights in memory, drafter.
        ways: that were run.
        planned, best: settings and drafters of the plan, and of the fastest way of the sweep.
        behind: by which share the plan is slower than the best, by pairs; 0 where they are one.
        noise: half the range of the plan's own runs, as a share of their median.
        over_default: by which share the plan is faster than the rules of thumb, by pairs; 0 where they are one.
    """

    name: str
    ways: int
    planned: str
    best: str
    behind: float
    noise: float
    over_default: float


def main() -> None:
    """Print a row a case, and JSON at the end."""
    store, checkpoint = (Path(argument).expanduser() for argument in sys.argv[1:3])
    cases = []
    for name, place, config in _settings(store, checkpoint):
        case = _case(name, place, config)
        cases.append(case)
        print(
            f"{case.name}: planned {case.planned}; best of {case.ways} {case.best}: behind {case.behind:+.1%}, noise "
            f"{case.noise:.1%}; over the rules of thumb {case.over_default:+.1%}",
            file=sys.stderr,
            flush=True,
        )
    print(json.dumps({"schema": "tiercache.plan-sweep/1", "cases": [asdict(case) for case in cases]}))


def _settings(store: Path, checkpoint: Path) -> Iterator[tuple[str, Path, OffloadConfig]]:
    """Twelve: source, int8 and int4 plainly, int8 with drafters, each with three budgets."""
    auto = DraftConfig(drafter="auto", nodes=_NODES)
    kinds: tuple[tuple[Any, Path, DraftConfig | None], ...] = (
        ("source", checkpoint, None),
        ("int8", store, None),
        ("int4", store, None),
        ("int8", store, auto),
    )
    for (precision, place, draft), share in itertools.product(kinds, SHARES):
        config = OffloadConfig(
            hbm=None, dram=Budget(), precision=precision, context=_CONTEXT, logits=_NODES + 1, draft=draft
        )
        dram_bytes = _budget(place, replace(config, draft=None), share)
        drafts = ", drafter=auto" if draft else ""
        yield f"{precision}, {share:.0%} in memory{drafts}", place, replace(config, dram=Budget(size_bytes=dram_bytes))


def _budget(place: Path, config: OffloadConfig, share: float) -> int:
    """Bytes of main memory that hold what is reserved and a share of the weights."""
    tier = plan_model(place, config, show_progress=False).placement["dram"]
    return sum(tier["reserved_bytes"].values()) + int(share * tier["placement"]["pinned_bytes"])


def _case(name: str, place: Path, config: OffloadConfig) -> Case:
    plan = plan_model(place, config, show_progress=False)
    ways = {}
    whos = (OWN_PLANES, NGRAMS, NOBODY) if config.draft else ("",)
    for ring, (threads, nbytes), who in itertools.product(RINGS, READS, whos):
        settings = Settings(ring, threads, nbytes)
        own = replace(config, plan="default", settings=settings, drafts=who)
        try:
            plan_model(place, own, show_progress=False)
        except DoesNotFitError:
            continue
        ways[_named(settings, who)] = own
    planned = _named(plan.settings, str(plan.options["drafts"]))
    ways[planned] = replace(config, plan="default", settings=plan.settings, drafts=str(plan.options["drafts"]))
    found = in_turn(place, list(ways.items()), rounds=ROUNDS, tokens=_TOKENS, show_progress=False)
    best = min(found, key=lambda each: each.middle_s)
    rules = ("rules of thumb", replace(config, plan="default"))
    chosen = (planned, ways[planned])
    behind, noise = (0.0, 0.0) if best.name == planned else _paired(place, chosen, (best.name, ways[best.name]))
    default_plan = plan_model(place, rules[1], show_progress=False)
    same = default_plan.hash == plan.hash
    over = 0.0 if same else -_paired(place, chosen, rules)[0]
    own_noise = next(each.spread for each in found if each.name == planned)
    return Case(name, len(ways), planned, best.name, behind, max(noise, own_noise), over)


def _paired(place: Path, first: tuple[str, Any], second: tuple[str, Any]) -> tuple[float, float]:
    """By which share the first is slower than the second, the median of pairs; and the first's own spread."""
    ways = [("first", first[1]), ("second", second[1])]
    one, other = in_turn(place, ways, rounds=PAIRS, tokens=_TOKENS, show_progress=False)
    ratios = [mine / theirs - 1 for mine, theirs in zip(one.token_s, other.token_s, strict=True)]
    return statistics.median(ratios), one.spread


def _named(settings: Settings, who: str) -> str:
    drafts = f", drafts: {who}" if who else ""
    return (
        f"{settings.prefetch_bytes // MIB} MiB ring, {settings.read_threads} x {settings.read_bytes // MIB} MiB{drafts}"
    )


if __name__ == "__main__":
    main()
