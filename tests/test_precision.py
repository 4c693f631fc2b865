"""Recipes: counts, bytes, what fits a budget, how budgets and slots are divided; against counting by hand."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies import precision
from policies.precision import Recipe, Sizes

neurons = st.integers(1, 400)
sizes = st.builds(
    Sizes,
    st.tuples(st.integers(1, 50), st.integers(1, 50), st.integers(1, 100)),
    st.integers(0, 20),
    st.integers(1, 2),
)


@st.composite
def recipes(draw: Callable[..., Any]) -> Recipe:
    cuts = sorted(draw(st.tuples(*[st.integers(0, 100)] * 3)))
    shares = (cuts[0] / 100, (cuts[1] - cuts[0]) / 100, (cuts[2] - cuts[1]) / 100)
    rank = draw(st.integers(0, 3))
    return Recipe("product", rank, draw(st.integers(1, 2)) if rank else 0, shares)


def by_hand(recipe: Recipe, count: int, size: Sizes) -> int:
    """Bytes that a token reads, neuron by neuron and row by row."""
    high, middle, low = recipe.counts(count)
    levels = [3] * high + [2] * middle + [1] * low + [0] * (count - high - middle - low)
    total = 0
    for level in levels:
        for row in range(size.parts):
            ranked = row < recipe.ranked
            if ranked:
                total += size.row(recipe.rank)
            if level and not (ranked and level <= recipe.rank):
                total += size.row(level)
    return total


@given(recipes(), neurons)
def test_counts(recipe: Recipe, count: int) -> None:
    counts = recipe.counts(count)
    assert all(0 <= some <= count for some in counts)
    assert sum(counts) == round(sum(recipe.shares) * count) <= count
    for some, share in zip(counts, recipe.shares, strict=True):
        assert abs(some - share * count) <= 1
    low, middle, high = recipe.wanted(count)
    assert (low, middle, high) == (sum(counts), counts[0] + counts[1], counts[0])


@pytest.mark.parametrize("shares", [(-0.1, 0, 0), (0.5, 0.5, 0.1), (float("nan"), 0, 0), (1.0, 0.0, 0.1)])
def test_shares_that_are_no_division(shares: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="division"):
        Recipe("gate", 1, 1, shares)


@pytest.mark.parametrize(("rank", "ranked"), [(4, 1), (-1, 1), (0, 1), (1, 0)])
def test_ranking_that_cannot_be(rank: int, ranked: int) -> None:
    with pytest.raises(ValueError, match="planes"):
        Recipe("gate", rank, ranked, (0.1, 0, 0))


@given(recipes(), neurons, sizes)
def test_read_bytes_by_hand(recipe: Recipe, count: int, size: Sizes) -> None:
    if recipe.ranked <= size.inward:
        assert recipe.read_bytes(count, size) == by_hand(recipe, count, size)


@given(recipes(), neurons, st.integers(1, 3))
def test_capped(recipe: Recipe, count: int, precision: int) -> None:
    capped, whole = recipe.capped(precision), recipe.counts(count)
    assert sum(capped.counts(count)) == sum(whole), "nobody is left out who was in"
    expected = [0, 0, 0, 0]
    for place, number in zip((3, 2, 1), whole, strict=True):
        expected[min(place, precision)] += number
    assert list(capped.counts(count)) == expected[:0:-1]
    assert capped.rank == min(recipe.rank, precision)
    assert capped.capped(precision) == capped
    assert recipe.capped(3) == recipe


@given(sizes, neurons)
def test_sizes(size: Sizes, count: int) -> None:
    assert size.row(0) == size.neuron(0) == 0
    assert [size.row(precision) for precision in (1, 2, 3)] == [
        size.planes[0] + size.scales,
        size.planes[0] + size.planes[1] + size.scales,
        sum(size.planes) + size.scales,
    ]
    assert precision.exact_bytes(count, size) == count * (size.inward + 1) * size.row(3)


@given(recipes(), st.floats(0.01, 1.0), neurons, sizes)
def test_fitted_is_the_most_that_fits(recipe: Recipe, share: float, count: int, size: Sizes) -> None:
    if recipe.ranked > size.inward:
        return
    made, budget = precision.fitted_recipe(recipe, share, count, size), share * precision.exact_bytes(count, size)
    used = [place for place, part in enumerate(recipe.shares) if part > 0]

    def other(more: int) -> Recipe | None:
        shares = list(recipe.shares)
        shares[used[-1]] = more / count
        return Recipe(recipe.scorer, recipe.rank, recipe.ranked, tuple(shares)) if sum(shares) <= 1 + 1e-9 else None

    if made is None:
        one = other(1) if used else None
        assert one is None or one.read_bytes(count, size) > budget or sum(one.counts(count)) == 0
        return
    assert made.read_bytes(count, size) <= budget
    assert (made.scorer, made.rank, made.ranked) == (recipe.scorer, recipe.rank, recipe.ranked)
    assert [part for place, part in enumerate(made.shares) if place != used[-1]] == [
        part for place, part in enumerate(recipe.shares) if place != used[-1]
    ]
    further = other(round(made.shares[used[-1]] * count) + 2)  # one more may go to a rounding of the classes above
    assert further is None or further.read_bytes(count, size) > budget


@given(st.floats(0.1, 1.0), st.sampled_from([64, 104, 400, 1000]), st.integers(1, 2))
def test_candidates(share: float, count: int, inward: int) -> None:
    size = Sizes((16, 16, 32), 4, inward)
    scorers = {"product": 2, "gate": 1}
    found = precision.candidate_recipes(share, count, size, scorers)
    budget = share * precision.exact_bytes(count, size)
    reads = [recipe.read_bytes(count, size) for recipe in found]
    assert all(read <= budget for read in reads)
    assert len({(r.scorer, r.rank, r.counts(count)) for r in found}) == len(found)
    assert {recipe.rank for recipe in found} <= {1, 2}
    assert all(recipe.ranked == min(scorers[recipe.scorer], inward) for recipe in found)
    if max(reads, default=0) >= 0.9 * budget:
        assert min(reads) >= 0.9 * budget, "a recipe that leaves bytes unused beside one that uses them"
    if share > 0.5:
        assert found


def test_search_takes_the_least() -> None:
    asked: list[int] = []

    def loss(option: int) -> float:
        asked.append(option)
        return abs(option - 7)

    assert precision.search([3, 6, 9, 8], loss) == (6, 1.0)
    assert asked == [3, 6, 9, 8]
    with pytest.raises(ValueError, match="nothing"):
        precision.search([], loss)


def best_division(losses: list[list[float]], size: list[list[int]], budget: int) -> float:
    """The least loss there is, by trying everything."""
    found = [
        sum(row[at] for row, at in zip(losses, chosen, strict=True))
        for chosen in product(*(range(len(row)) for row in losses))
        if sum(row[at] for row, at in zip(size, chosen, strict=True)) <= budget
    ]
    return min(found)


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 100), min_size=3, max_size=3)), min_size=1, max_size=5),
    st.integers(0, 200),
    st.integers(0, 2),
)
def test_divide(rows: list[tuple[list[int]]], spare: int, start: int) -> None:
    losses = [sorted((float(loss) for loss in row[0]), reverse=True) for row in rows]
    size = [[10, 20 + 3 * place, 50 + place] for place in range(len(rows))]
    floor = sum(row[start] for row in size)
    chosen = precision.divide(losses, size, floor + spare, start)
    spent = sum(row[at] for row, at in zip(size, chosen, strict=True))
    got = sum(row[at] for row, at in zip(losses, chosen, strict=True))
    assert spent <= floor + spare
    assert all(at >= start for at in chosen), "sizes rise, so nobody goes below the start"
    above = [row[start:] for row in losses]
    least = best_division(above, [row[start:] for row in size], floor + spare)
    worst_step = max(max(row) - min(row) for row in above)
    assert least <= got <= least + worst_step + 1e-9, "at most one step of one layer from the best"
    assert got <= sum(row[start] for row in losses)


def test_divide_without_room_keeps_the_start() -> None:
    assert precision.divide([[3, 2, 1]] * 2, [[1, 2, 4]] * 2, -5) == [0, 0]
    assert precision.divide([[3, 2, 1]] * 2, [[1, 2, 4]] * 2, 1e9) == [2, 2]
    assert precision.divide([], [], 5) == []


wishes = st.lists(st.lists(st.integers(0, 100), min_size=2, max_size=2), min_size=1, max_size=6)


@given(wishes, st.tuples(st.integers(1, 90), st.integers(1, 90)), st.integers(-10, 60_000))
def test_share_slots(wanted: list[list[int]], widths: tuple[int, int], budget: int) -> None:
    slots = precision.share_slots(wanted, widths, 100, budget)
    used = sum(count * width for row in slots for count, width in zip(row, widths, strict=True))
    assert [len(row) for row in slots] == [len(row) for row in wanted]
    assert all(0 <= count <= 100 for row in slots for count in row)
    assert used <= max(0, budget)
    for row, want in zip(slots, wanted, strict=True):
        assert all(wish or not count for count, wish in zip(row, want, strict=True)), "slots that nobody wants"
    open_widths = [
        width
        for row, want in zip(slots, wanted, strict=True)
        for count, wish, width in zip(row, want, widths, strict=True)
        if wish and count < 100
    ]
    if budget > 0 and open_widths:  # what is left is less than a row of each plane that could take one
        assert budget - used < 2 * sum(open_widths) + 2 * max(widths), (slots, used, budget)


@given(wishes, st.integers(0, 3_000))
def test_share_slots_in_proportion(wanted: list[list[int]], budget: int) -> None:
    slots = precision.share_slots(wanted, (3, 5), 10**9, budget)
    need = sum(count * width for row in wanted for count, width in zip(row, (3, 5), strict=True))
    for row, want in zip(slots, wanted, strict=True):
        for count, wish in zip(row, want, strict=True):
            assert count <= 2 * wish * budget / max(1, need) + 2, "what rounding leaves goes to all"
