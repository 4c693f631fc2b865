"""Trees keep to their budgets, and are the best ones where a grower says so."""

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tiercache.draft.base import Context, TreeBudget
from tiercache.draft.grow import Static, grower
from tiercache.draft.growing_tree import Grower, GrowingTree, TokenCandidates
from tiercache.draft.noise import GumbelNoise
from tiercache.draft.sampled_growers import Branching, StochasticBeam
from tiercache.draft.static import best_template
from tiercache.draft.tree import ROOT, DraftTree
from tiercache.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 6
RANKING = {"best-first": {}, "fixed-width": {}, "sequoia": {}}
DRAWING = {"rsd-c": {}, "rsd-s": {}}
GROWERS = [*RANKING.items(), *DRAWING.items(), ("rsd-c", {"branching": (3, 2)})]
named = pytest.mark.parametrize(("name", "options"), GROWERS, ids=lambda value: str(value))


def grower_of(name: str, **options: Any) -> Grower:
    """The grower of a name; those that draw take options."""
    return {"rsd-c": Branching, "rsd-s": StochasticBeam}[name](**options) if name in DRAWING else grower(name)


class Toy:
    """Scores that depend on the whole path, looked up; counts its calls and refuses what a scorer may refuse.

    `partial` gives the likeliest tokens only, in a mixed order and with padding.
    """

    def __init__(self, seed: int = 0, *, partial: int = 0, root: Sequence[int] = ()) -> None:
        self._seed, self._partial, self._root, self.calls = seed, partial, tuple(root), 0
        self._asked: set[int] = set()

    def logq(self, path: tuple[int, ...]) -> Tensor:
        return table(self._seed, (*self._root, *path))

    def __call__(self, sketch: GrowingTree, nodes: Sequence[int]) -> TokenCandidates:
        self.calls += 1
        assert nodes
        for node in nodes:
            assert node not in self._asked
            assert node == ROOT or sketch.parents[node] in self._asked
        self._asked |= {*nodes}
        rows = torch.stack([self.logq(path_in(sketch, node)) for node in nodes])
        if not self._partial:
            return TokenCandidates(rows)
        best = rows.topk(self._partial)
        nothing = torch.full((len(nodes), 1), -torch.inf)
        outside = torch.tensor([[-1, VOCABULARY + 3]]).expand(len(nodes), 2)
        return TokenCandidates(
            torch.cat([nothing, best.values.flip(1), torch.zeros(len(nodes), 2)], 1),
            torch.cat([torch.zeros(len(nodes), 1, dtype=torch.long), best.indices.flip(1), outside], 1),
        )


@cache
def table(seed: int, path: tuple[int, ...]) -> Tensor:
    chance = torch.Generator().manual_seed(hash((seed, path)) % (1 << 31))
    return torch.log_softmax(2 * torch.randn(VOCABULARY, generator=chance), -1)


def path_in(tree: GrowingTree | DraftTree, node: int) -> tuple[int, ...]:
    tokens: list[int] = []
    while node != ROOT:
        tokens.append(tree.tokens[node])
        node = tree.parents[node]
    return tuple(reversed(tokens))


def grow(name: str, options: dict, scorer: Toy, budget: TreeBudget, **context: object) -> DraftTree:
    return grower_of(name, **options)(scorer, Context([1, 2, 3], VOCABULARY, **context), budget)


def z_of(toy: Toy, path: tuple[int, ...], noise: GumbelNoise | None, length: int = 3) -> Tensor:
    return toy.logq(path) if noise is None else toy.logq(path) + noise(length + len(path))


def every_path(toy: Toy, depth: int, noise: GumbelNoise | None) -> dict[tuple[int, ...], float]:
    """All paths of at most `depth` tokens with their confidence: the slow oracle."""
    found: dict[tuple[int, ...], float] = {}
    level = {(): 1.0}
    for _ in range(depth):
        below = {}
        for path, confidence in level.items():
            for token, share in enumerate(torch.softmax(z_of(toy, path, noise), -1).tolist()):
                below[(*path, token)] = confidence * share
        found |= below
        level = below
    return found


@named
@pytest.mark.parametrize("nodes", [0, 1, 2, 7, 64, 512])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_tree_keeps_to_its_budget(name: str, options: dict, nodes: int, sampled: bool) -> None:
    noise = GumbelNoise(5, VOCABULARY) if sampled else None
    for depth, width, partial, room in itertools.product([1, 5], [1, 3, 8], [0, 2], [1, 3, 100]):
        toy = Toy(partial=partial)
        tree = grow(name, options, toy, TreeBudget(nodes, depth, width), noise=noise, room=room)
        deepest = min(depth, room - 1)
        if nodes == 0 or deepest == 0:
            assert (len(tree), toy.calls) == (0, 0)
            continue
        assert 1 <= len(tree) <= nodes
        assert max(tree.depths) <= deepest
        assert 1 <= toy.calls <= deepest
        assert max(map(len, tree.children.values())) <= width
        assert set(tree.tokens) <= set(range(VOCABULARY))
        if name == "rsd-s" and nodes >= deepest:
            assert max(tree.depths) == deepest
        drawn = name.startswith("rsd")
        assert tree.order == ("without_replacement" if drawn else "shared_gumbel" if sampled else "deterministic")
        assert tree.logq is not None
        for node, step in enumerate(tree.logq):
            path = path_in(tree, node)
            z = z_of(toy, path[:-1], None if drawn else noise)
            kept = torch.full_like(z, -torch.inf)
            likely = toy.logq(path[:-1]).topk(partial or VOCABULARY).indices
            kept[likely] = z[likely]
            assert step == pytest.approx(float(torch.log_softmax(kept, -1)[path[-1]]), abs=1e-5)
            if drawn:
                torch.testing.assert_close(tree.q[tree.parents[node]], torch.softmax(kept, -1))


@pytest.mark.parametrize("nodes", [1, 2, 7, 64, 512])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("name", ["best-first", "fixed-width"])
def test_the_likeliest_tree_is_found(name: str, nodes: int, sampled: bool) -> None:
    noise = GumbelNoise(9, VOCABULARY) if sampled else None
    for seed, depth in itertools.product(range(3), [1, 2, 3, 4]):
        toy = Toy(seed)
        every = every_path(toy, depth, noise)
        best = sorted(every, key=lambda path: -every[path])[:nodes]
        tree = grow(name, {}, toy, TreeBudget(nodes, depth, width=600), noise=noise)
        assert {path_in(tree, node) for node in range(len(tree))} == set(best)
        floor = every[best[len(best) // 2]] * 1.0001
        floored = grow(name, {}, Toy(seed), TreeBudget(nodes, depth, 600, floor=floor), noise=noise)
        likely = {path for path in best if every[path] > floor} or {best[0]}
        assert {path_in(floored, node) for node in range(len(floored))} == likely


def test_siblings_lie_best_first() -> None:
    tree = grow("best-first", {}, Toy(), TreeBudget(64, 3, 6))
    for children in tree.children.values():
        steps = [tree.logq[child] for child in children]
        assert steps == sorted(steps, reverse=True)


def test_fixed_width_expands_its_width_at_each_depth() -> None:
    toy = Toy()
    asked: list[list[int]] = []

    def scorer(sketch: GrowingTree, nodes: Sequence[int]) -> TokenCandidates:
        asked.append([sketch.depth(node) for node in nodes])
        return toy(sketch, nodes)

    grower("fixed-width")(scorer, Context([1], VOCABULARY), TreeBudget(500, 4, 3))
    assert asked == [[0], [1] * 3, [2] * 3, [3] * 3]


def test_best_first_goes_back_for_what_is_likelier() -> None:
    def scorer(sketch: GrowingTree, nodes: Sequence[int]) -> TokenCandidates:
        depths.append([sketch.depth(node) for node in nodes])
        return TokenCandidates(torch.tensor([[0.5, 0.45, 0.05]]).log().expand(len(nodes), 3))

    depths: list[list[int]] = []
    grower("best-first")(scorer, Context([1], 3), TreeBudget(20, 4, 1))
    chain = [[0], [1], [2], [3]]
    assert depths == chain
    depths.clear()
    grower("best-first")(scorer, Context([1], 3), TreeBudget(20, 4, 2))
    assert depths == [[0], [1, 1], [2, 2], [2, 2]]  # .5 * .45 = .225 beats the chain's .125


@named
def test_drafting_ends_where_it_is_not_worth_it(name: str, options: dict) -> None:
    toy = Toy()
    tree = grow(name, options, toy, TreeBudget(64, 5, 4, grow_floor=1.0))
    assert toy.calls == 1
    assert set(tree.depths) == {1}


@pytest.mark.parametrize(("name", "options"), DRAWING.items())
def test_a_floor_never_takes_a_drawn_child(name: str, options: dict) -> None:
    """Or it would not have been drawn from q: what would be drawn below it is left out."""
    rare = 0
    for seed in range(20):
        tree = grow(name, options | {"seed": seed}, Toy(), TreeBudget(30, 2, 4, floor=0.3))
        confidence = [math.exp(step) for step in tree.logq]
        assert len(tree.children[ROOT]) >= 4
        assert all(tree.parents[node] == ROOT or confidence[tree.parents[node]] >= 0.29 for node in range(len(tree)))
        rare += sum(share < 0.3 for share in confidence)
    assert rare


@pytest.mark.parametrize(("name", "options"), DRAWING.items())
def test_drawn_children_come_from_q_and_chance_goes_on(name: str, options: dict) -> None:
    context, budget, toy = Context([1], VOCABULARY), TreeBudget(4, 2, 2), Toy()

    def firsts_of(count: int) -> list[int]:
        draw = grower_of(name, seed=3, **options)
        return [draw(Toy(), context, budget).tokens[0] for _ in range(count)]

    firsts = firsts_of(1500)
    assert firsts[:30] == firsts_of(30)
    expected = 1500 * torch.exp(toy.logq(()))
    counts = torch.bincount(torch.tensor(firsts), minlength=VOCABULARY)
    statistic = ((counts - expected) ** 2 / expected).sum()
    assert torch.special.gammaincc(torch.tensor((VOCABULARY - 1) / 2), statistic / 2) > 1e-4


def test_the_beam_draws_paths_without_replacement() -> None:
    toy, draw = Toy(), StochasticBeam(4)
    share = torch.tensor(list(every_path(toy, 2, None).values())[VOCABULARY:])
    counts = torch.zeros(2, len(share))
    for _ in range(1200):
        tree = draw(Toy(), Context([1], VOCABULARY), TreeBudget(6, 2, 3))
        leaves = [node for node, depth in enumerate(tree.depths) if depth == 2]
        for place, node in enumerate(leaves[:2]):
            first, second = path_in(tree, node)
            counts[place, first * VOCABULARY + second] += 1
    after = share / (1 - share)  # the second, once another is out: the sum over all others
    for seen, p in zip(counts, (share, share * (after.sum() - after)), strict=True):
        expected = 1200 * p
        often = expected >= 5
        cells = (
            torch.cat([seen[often], seen[~often].sum()[None]]),
            torch.cat([expected[often], expected[~often].sum()[None]]),
        )
        statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum()
        assert torch.special.gammaincc(torch.tensor((len(cells[0]) - 1) / 2), statistic / 2) > 1e-4


def test_a_node_without_candidates_gets_no_children() -> None:
    def nothing(sketch: GrowingTree, nodes: Sequence[int]) -> TokenCandidates:
        logq = torch.full((len(nodes), VOCABULARY), -torch.inf)
        for row, node in enumerate(nodes):
            logq[row, :2] = torch.tensor([0.0, -1.0]) if node == ROOT else -torch.inf
            if node == 1:
                logq[row] = torch.nan
        return TokenCandidates(logq)

    for name, options in GROWERS:
        assert grow(name, options, nothing, TreeBudget(20, 4, 4)).depths == (1, 1)  # type: ignore[arg-type]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown grower 'beam'; choose one of best-first"):
        grower("beam")


def sequoia(rates: Sequence[float], nodes: int, depth: int) -> float:
    """Expected accepted nodes by Sequoia's dynamic program, over nodes, depth and first rank to use."""

    @cache
    def best(nodes: int, depth: int, rank: int) -> float:
        if nodes == 0 or depth == 0 or rank == len(rates):
            return 0.0
        given = range(1, nodes + 1)  # to this child and what is below it
        return max(
            0.0, *(rates[rank] * (1 + best(n - 1, depth - 1, 0)) + best(nodes - n, depth, rank + 1) for n in given)
        )

    return best(nodes, depth, 0)


def shapes(nodes: int) -> Iterator[tuple[int, ...]]:
    """Every tree of `nodes` nodes, as parents."""
    return itertools.product(*(range(-1, node) for node in range(nodes)))


def worth(parents: Sequence[int], rates: Sequence[float], depth: int) -> float:
    """Expected accepted nodes; -1 where the tree is too deep or too wide."""
    worths, depths, ranks = {ROOT: 1.0}, {ROOT: 0}, {}
    for node, parent in enumerate(parents):
        rank = ranks[parent] = ranks.get(parent, -1) + 1
        depths[node] = depths[parent] + 1
        if rank >= len(rates) or depths[node] > depth:
            return -1.0
        worths[node] = worths[parent] * rates[rank]
    return sum(worths.values()) - 1


rates_ = st.lists(st.floats(0.01, 1.0), min_size=1, max_size=4).map(lambda rates: sorted(rates, reverse=True))


@given(rates_, st.integers(0, 5), st.integers(0, 5))
def test_the_template_is_the_best_of_all_trees(rates: list[float], nodes: int, depth: int) -> None:
    found = best_template(rates, nodes, depth, width=10)
    best = max(worth(parents, rates, depth) for count in range(nodes + 1) for parents in shapes(count))
    assert worth(found, rates, depth) == pytest.approx(best)


@given(rates_, st.integers(0, 40), st.integers(0, 8))
def test_the_template_is_what_sequoia_finds(rates: list[float], nodes: int, depth: int) -> None:
    found = best_template(rates, nodes, depth, width=64)
    assert worth(found, rates, depth) == pytest.approx(sequoia(rates, nodes, depth))


@given(rates_, st.integers(1, 60), st.integers(1, 6), st.integers(1, 4))
def test_a_template_keeps_to_its_width(rates: list[float], nodes: int, depth: int, width: int) -> None:
    found = best_template(rates, nodes, depth, width)
    tree = DraftTree(tuple(range(len(found))), found)
    parents_at: dict[int, int] = {}
    for parent, children in tree.children.items():
        level = 0 if parent == ROOT else tree.depths[parent]
        parents_at[level] = parents_at.get(level, 0) + 1
        assert len(children) <= width
    assert max(parents_at.values()) <= width


def test_observed_ranks_shape_the_next_tree() -> None:
    grow_ = Static()
    rates = grow_.rates
    context, budget = Context([1], VOCABULARY), TreeBudget(6, 6, 4)
    third = DraftTree((0, 1, 2), (ROOT, ROOT, ROOT))
    chain = DraftTree((0, 1), (ROOT, 0))
    for _ in range(200):
        rates.observe(third, (2,))
    assert rates()[:3] == (pytest.approx(1 / 3, abs=0.02),) * 3  # as much together as they were, and none rises
    assert len(grow_(Toy(), context, budget).children[ROOT]) == 3
    for _ in range(5000):
        rates.observe(chain, (0, 1))
    assert grow_(Toy(), context, budget).is_chain
    assert rates()[0] > 0.9
