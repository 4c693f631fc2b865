"""Trees that end by themselves: how sure a guess is, what passes bring, and a budgeter that finds both out."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from test_combine import Fixed

from policies.budgeter import Budgeter
from policies.drafting import DrafterProfile, RoundPlan
from policies.temperature import TemperatureScaling
from policies.throughput import RoundOutcome, ThroughputEstimator
from tiercache.draft.base import Context, Feedback, TreeBudget
from tiercache.draft.cascade import Cascade
from tiercache.draft.grow import Static
from tiercache.draft.lm_base import GrownDrafter
from tiercache.draft.static import RankRates
from tiercache.draft.tree import DraftTree, chain

DEPTH, NODES = 16, 64


@pytest.mark.parametrize("true", [0.4, 1.0, 3.0, 6.0])
def test_temperature_scaling_makes_confidences_as_high_as_guesses_are_right(true: float) -> None:
    """A guess against one other, their scores a gap apart that is really worth `true` times as much."""
    chance, score_scale = np.random.default_rng(0), TemperatureScaling()
    thought = came = 0.0
    for step in range(3000):
        gap = float(chance.exponential(1.0))
        confidence = 1 / (1 + math.exp(-score_scale.value * gap))
        accepted = bool(chance.random() < 1 / (1 + math.exp(-true * gap)))
        score_scale.observe(confidence, accepted)
        if step >= 1000:
            thought, came = thought + confidence, came + accepted
    assert thought == pytest.approx(came, rel=0.03)
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="probability"):
            score_scale.observe(wrong, True)


def test_outcomes_follow_what_was_emitted() -> None:
    #                  root -> 5, 6; 6 -> 7, 8; 7 -> 9
    tree = DraftTree((5, 6, 7, 8, 9), (-1, -1, 1, 1, 2), logq=tuple(map(math.log, (0.3, 0.6, 0.2, 0.7, 0.9))))
    assert list(tree.outcomes((6, 7, 9, 1))) == [
        (pytest.approx(0.6), True),
        (pytest.approx(0.7), False),
        (pytest.approx(0.9), True),
    ]
    assert list(tree.outcomes((5, 1))) == [(pytest.approx(0.6), False)]
    assert list(tree.outcomes((3,))) == [(pytest.approx(0.6), False)]
    assert not list(chain([1]).outcomes((1,)))
    assert not list(DraftTree().outcomes((1,)))


def test_a_cascade_asks_on_where_the_budget_says_so_and_learns_from_all() -> None:
    sure, surer = chain([1, 2], [math.log(0.9), math.log(0.9)]), chain([3, 4, 5], [math.log(0.9)] * 3)
    table, model = Fixed(sure), Fixed(surer)
    cascade = Cascade([table, model], 9.0)
    assert cascade.propose(TreeBudget(8, enough=1.5)).tokens == (1, 2)
    assert not model.asked
    assert cascade.propose(TreeBudget(8, enough=math.inf)).tokens == (3, 4, 5)
    less = Cascade([Fixed(surer), Fixed(sure)], 9.0)
    assert less.propose(TreeBudget(8)).tokens == (3, 4, 5), "the surest"
    assert less.propose(TreeBudget(8, enough=math.inf)).tokens == (1, 2), "who is asked later knows better"
    before = table.score_scale.value
    cascade.observe(Feedback(surer, (0, 1), (3, 4, 8)))
    assert model.score_scale.value != 1.0
    assert table.score_scale.value < before, "its tree was not taken, but would have been wrong"
    after = table.score_scale.value
    cascade.observe(Feedback(DraftTree(), (), (1,)))
    assert table.score_scale.value == after, "nobody was asked"


def test_throughput_leans_on_what_was_promised_while_it_knows_little() -> None:
    throughput = ThroughputEstimator()
    assert throughput.nodes == 0
    assert throughput.round(5.0, 0.5) == (5.0, 0.5)
    assert throughput.enough(8.0, 4.0, 0.25) == pytest.approx(2.0)
    throughput.observe(RoundOutcome(1, 1.0, 6, 0, 0.0, 0.0))
    tokens, seconds = throughput.round(5.0, 0.5)
    assert 1 < tokens < 5
    assert 0.5 < seconds < 1
    assert (throughput.drafted, throughput.nodes) == (0, 6)
    for _ in range(200):
        throughput.observe(RoundOutcome(3, 0.4, 8, 4, 0.2, 0.2), whole=True)
        throughput.observe(RoundOutcome(2, 0.4, 8, 4, 0.2, 0.2))
    assert throughput.round(99.0, 9.0) == (pytest.approx(2.5, abs=0.05), pytest.approx(0.4, rel=1e-3))
    assert throughput.enough(5.0, 99.0, 9.0) == pytest.approx(1.0), "of the rounds that were drafted anyway"
    assert throughput.enough(50.0, 99.0, 9.0) == 0


@dataclass
class World:
    """A model that drafts chains, and tables that sometimes have a guess, before a target of known seconds.

    Each node's chance of being accepted is drawn anew and known to whoever drafts.
    """

    base: float
    each: float
    pass_s: float
    surest: float  # chances of a model's nodes are spread between half of this and this
    tables: float = 0.0  # share of the rounds in which there is a guess
    seed: int = 0
    seconds: float = 0.0
    tokens: int = 0
    chance: np.random.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.chance = np.random.default_rng(self.seed)

    def round(self, plan: RoundPlan) -> dict[str, float]:
        """What `observe` is told."""
        chances: list[float] = []
        passes = 0
        if plan.drafter is not None:
            guess = [0.95] * 8 if self.chance.random() < self.tables else []
            enough = math.inf if plan.enough is None else plan.enough
            path, paths = 1.0, []
            if sum(np.cumprod(guess)) <= enough:
                while len(chances) < min(plan.depth, plan.nodes) and path >= plan.grow_floor:
                    chances.append(float(self.chance.uniform(self.surest / 2, self.surest)))
                    path *= chances[-1]
                    paths.append(path)
            passes = len(chances)
            chances = guess if sum(np.cumprod(guess)) >= sum(paths) else chances  # the surer tree of the two
        accepted = 0
        while accepted < len(chances) and self.chance.random() < chances[accepted]:
            accepted += 1
        noise = self.chance.uniform(0.95, 1.05, 2)
        draft_s, verify_s = passes * self.pass_s * noise[0], (self.base + self.each * len(chances)) * noise[1]
        self.seconds, self.tokens = self.seconds + draft_s + verify_s, self.tokens + accepted + 1
        nodes = {"nodes": len(chances), "emitted": accepted + 1, "passes": passes}
        return {"draft_s": draft_s, "verify_s": verify_s, **nodes}

    def best(self) -> float:
        """Tokens per second with the best floor and the best bar for guesses, and without drafting; by trying all."""
        found = 1 / self.base
        for floor in (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.1):
            for enough in (0.0, 2.0, math.inf) if self.tables else (math.inf,):
                other = World(self.base, self.each, self.pass_s, self.surest, self.tables, self.seed + 1)
                plan = RoundPlan(0, NODES, DEPTH, 1, 0.0, 0.0, grow_floor=floor, enough=enough)
                for _ in range(1500):
                    other.round(plan)
                found = max(found, other.tokens / other.seconds)
        return found


WORLDS = {
    "from the disk": World(0.4, 0.002, 0.05, 1.0),
    "over the link": World(0.1, 0.001, 0.006, 1.0),
    "a poor model": World(0.4, 0.002, 0.05, 0.4),
    "a useless one": World(0.02, 0.004, 0.02, 0.1),
    "computed": World(0.006, 0.003, 0.003, 0.9),
    "guesses for nothing": World(0.4, 0.002, 0.05, 1.0, tables=0.5),
    "guesses alone": World(0.01, 0.0002, 0.009, 1.0, tables=0.5),
}


@pytest.mark.parametrize("name", WORLDS)
def test_it_comes_near_the_best_that_could_be_known(name: str) -> None:
    told = WORLDS[name]
    world = World(told.base, told.each, told.pass_s, told.surest, told.tables, seed=5)
    drafter = DrafterProfile("model", rates=[[0.8, 0.1]] * DEPTH, max_depth=DEPTH, max_nodes=NODES, open_ended=True)
    budgeter = Budgeter([drafter], max_nodes=NODES, max_depth=DEPTH, width=1)
    while world.tokens < 300:
        plan = budgeter.decide()
        budgeter.observe(plan, **world.round(plan))  # type: ignore[arg-type]
    assert world.tokens / world.seconds > 0.95 / world.base
    middle = world.tokens, world.seconds
    while world.tokens < 3000:
        plan = budgeter.decide()
        assert plan.drafter is None or plan.depth <= DEPTH
        budgeter.observe(plan, **world.round(plan))  # type: ignore[arg-type]
    speed = (world.tokens - middle[0]) / (world.seconds - middle[1])
    assert speed > 0.9 * world.best()
    assert speed > 0.98 / world.base


def test_another_text_is_another_chance() -> None:
    waits = []
    for renewed in (False, True):
        world, explored = World(0.006, 0.0005, 0.0, 0.1, seed=4), 0
        drafter = DrafterProfile("tables", max_depth=DEPTH, max_nodes=NODES, open_ended=True, passes=False)
        budgeter = Budgeter([drafter], max_nodes=NODES, max_depth=DEPTH, width=1)
        for turn in range(3000):
            plan = budgeter.decide()
            budgeter.observe(plan, **world.round(plan))  # type: ignore[arg-type]
            if plan.exploration and turn > 2000:
                break
        if renewed:
            budgeter.renew()
        while not (plan := budgeter.decide()).exploration:
            budgeter.observe(plan, **world.round(plan))  # type: ignore[arg-type]
            explored += 1
        waits.append(explored)
    assert waits[1] <= 8 < 16 <= waits[0]


def test_what_drafting_won_lets_it_bear_bad_luck() -> None:
    world = World(0.006, 0.0005, 0.0, 1.0, seed=2)
    drafter = DrafterProfile("tables", max_depth=DEPTH, max_nodes=NODES, open_ended=True, passes=False)
    budgeter = Budgeter([drafter], max_nodes=NODES, max_depth=DEPTH, width=1)
    for _ in range(300):
        plan = budgeter.decide()
        budgeter.observe(plan, **world.round(plan))  # type: ignore[arg-type]
    for _ in range(6):  # rounds that brought nothing
        plan = budgeter.decide()
        told = world.round(plan)
        budgeter.observe(plan, told["draft_s"], told["verify_s"] + 0.003, int(told["nodes"]), 1, passes=0)
    assert [budgeter.decide().drafter for _ in range(3)] == [0, 0, 0]


def test_tables_that_know_when_they_know_are_asked_for_all_they_have() -> None:
    """In a fifth of the rounds they have a sure guess, else poor ones: a size for the average fits neither."""
    assert np.mean([_bursts(seed, open_ended=True) for seed in range(4)]) > 1.75
    assert np.mean([_bursts(seed, open_ended=False) for seed in range(4)]) < 1.5, "a world that is no test"


def _bursts(seed: int, *, open_ended: bool) -> float:
    """Speed over plain decoding with such tables."""
    chance, base = np.random.default_rng(seed), 0.006
    drafter = DrafterProfile("tables", max_depth=DEPTH, max_nodes=NODES, open_ended=open_ended, passes=False)
    budgeter = Budgeter([drafter], max_nodes=NODES, max_depth=DEPTH)
    tokens = seconds = 0.0
    for turn in range(600):
        plan = budgeter.decide()
        rate = 0.95 if chance.random() < 0.2 else 0.1
        nodes = int((np.cumprod(np.full(min(plan.depth, plan.nodes), rate)) >= plan.floor).sum())
        accepted = 0
        while accepted < nodes and chance.random() < rate:
            accepted += 1
        tried, came = np.zeros((2, *budgeter.shape))
        tried[: min(accepted + 1, nodes), 0] = came[:accepted, 0] = 1
        draft_s, verify_s = 0.0 if plan.drafter is None else 0.0005, base + 0.001 * nodes
        budgeter.observe(plan, draft_s, verify_s, nodes, accepted + 1, tried, came, 0)
        if turn >= 100:
            tokens, seconds = tokens + accepted + 1, seconds + draft_s + verify_s
    return tokens / seconds * base


def test_a_disturbance_is_soon_forgotten() -> None:
    """Two passes in a row that took a hundred times as long, and one slow draft: it drafts on as before."""
    world = World(0.1, 0.001, 0.006, 1.0, tables=0.3, seed=6)
    drafter = DrafterProfile("model", rates=[[0.8, 0.1]] * DEPTH, max_depth=DEPTH, max_nodes=NODES, open_ended=True)
    budgeter = Budgeter([drafter], max_nodes=NODES, max_depth=DEPTH, width=1)
    drafters: list[int | None] = []
    for turn in range(800):
        plan = budgeter.decide()
        told = world.round(plan)
        if turn in (150, 151, 200):
            told["verify_s" if turn < 200 else "draft_s"] *= 100
        budgeter.observe(plan, **told)  # type: ignore[arg-type]
        drafters.append(plan.drafter)
        if turn == 400:
            calm = world.tokens, world.seconds
    assert np.mean([drafter == 0 for drafter in drafters[400:]]) > 0.9
    assert (world.tokens - calm[0]) / (world.seconds - calm[1]) > 0.85 * world.best()


def test_a_static_tree_follows_its_own_guesses_though_others_were_taken() -> None:
    static = Static()
    model, rates = GrownDrafter(static), static.rates
    model.begin(Context([1], 9))
    model._tree = DraftTree((5, 6, 7), (-1, -1, 0))
    model.observe(Feedback(chain([6, 8]), (0,), (6, 3)))
    assert rates()[0] < RankRates()()[0]
    assert rates()[1] > RankRates()()[1]
    before = rates()
    model.observe(Feedback(chain([6]), (0,), (6, 3)))
    assert rates() == before, "it was not asked"
