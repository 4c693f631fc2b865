"""What may be done in the next round, and what of it is thought best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from policies.arrays import np
from policies.costs import PassCosts
from policies.drafting import RoundPlan, SpeedUpTable
from policies.history import DrafterHistory

NOISE = 0.03  # a difference in speed that is not told from the machine's own; no reason to change the drafter


@dataclass(frozen=True)
class PlanChoice:
    """The plans among which the next rounds have a choice.

    Attributes:
        plain: a pass without drafting.
        best: the fastest.
        others: what may be explored beside it, the fastest first.
    """

    plain: RoundPlan
    best: RoundPlan
    others: tuple[RoundPlan, ...] = ()


def plan_choice(
    histories: Sequence[DrafterHistory], verify: PassCosts, used: int | None, limits: Mapping[str, int]
) -> PlanChoice:
    """Finds them in the speed-up table that follows from all that was measured.

    Args:
        histories: of the drafters.
        verify: the seconds of the target's passes.
        used: the drafter of the best plan so far; another one must be faster by more than noise. None for none.
        limits: `max_nodes`, `max_depth` and `width`, see `SpeedUpTable`.
    """
    profiles = [history.profile(verify.largest) for history in histories]
    most = max(profile.max_nodes for profile in profiles)
    table = SpeedUpTable(profiles, verify.at(np.arange(1, most + 2)), **limits)
    plans, plain = [table.best(place) for place in range(len(profiles))], table.plain
    by_floors = [place for place, history in enumerate(histories) if history.ends_trees]
    rates = [histories[place].throughput.tokens_per_s(plans[place]) for place in by_floors]
    fastest = max([*rates, plain.tokens_per_s])
    for place in by_floors:
        plans[place] = histories[place].by_floors(plans[place], table.largest(place), fastest, verify.at)
    before = plain if used is None else plans[used]
    best = max(plans, key=lambda plan: plan.tokens_per_s)
    best = best if best.tokens_per_s > before.tokens_per_s * (1 + NOISE) else before
    best = best if best.tokens_per_s > plain.tokens_per_s else plain
    others = [plan for place, plan in enumerate(plans) if place != best.drafter]
    if best.drafter is not None:
        others += [plain, *_beside(best, best.drafter, table)]
    return PlanChoice(plain, best, tuple(sorted(others, key=lambda plan: -plan.tokens_per_s)))


def _beside(best: RoundPlan, drafter: int, table: SpeedUpTable) -> Iterator[RoundPlan]:
    """Other sizes of the best drafter's trees; of trees that end by themselves, passes where cheap guesses would do."""
    if best.enough is None:
        for nodes in (best.nodes * 2 // 3, max(best.nodes + 1, best.nodes * 3 // 2)):
            if 1 <= nodes <= table.largest(drafter):
                yield table.best(drafter, nodes)
    elif best.enough < np.inf:
        yield replace(best, enough=np.inf)
