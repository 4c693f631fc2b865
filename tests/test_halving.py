"""Successive halving on made-up losses: who wins, what is measured, and what happens where the winner breaks."""

import math

from policies.precision import Recipe
from tiercache.calibrate import halving
from tiercache.calibrate.measure import Measured
from tiercache.calibrate.settings import Try

TRIES = [Try(0.5, 2, (Recipe("product", 2, 2, (part / 100, 0.0, 0.0)),)) for part in range(1, 10)]
LOSS = {one.key: abs(place - 6) + 1.0 for place, one in enumerate(TRIES)}  # the seventh is the best


def contest(groups: list[list[Try]], pieces: int, broken: tuple[int, ...] = ()) -> tuple[list[Try], list[int]]:
    """The winners, and of how many pieces each measurement was."""
    asked: dict[tuple[str, int], Measured] = {}
    breaks = {TRIES[place].key for place in broken}

    def measure(one: Try, some: int) -> Measured:
        loss = math.nan if some == pieces and one.key in breaks else LOSS[one.key]
        return asked.setdefault((one.key, some), Measured(loss, loss, loss, 0.5))

    found = halving.best(groups, pieces, measure, lambda measured: measured.kl)
    return found, sorted(some for _, some in asked)


def test_the_best_wins_and_few_are_measured_on_all_of_the_text() -> None:
    assert contest([TRIES], 9) == ([TRIES[6]], [1] * 9 + [3] * 3 + [9])
    assert halving.halving_passes([TRIES], 9) == 9 + 3 * 3 + 9
    assert contest([TRIES], 1) == ([TRIES[6]], [1] * 9)


def test_each_group_has_a_winner_of_its_own() -> None:
    found, asked = contest([TRIES[:3], TRIES[3:4]], 9)
    assert found == [TRIES[2], TRIES[3]]
    assert asked == [1, 1, 1, 9, 9]


def test_where_the_winner_breaks_on_the_whole_text_the_next_one_wins() -> None:
    assert contest([TRIES], 9, broken=(6,))[0] in ([TRIES[5]], [TRIES[7]])
    assert contest([TRIES], 9, broken=tuple(range(9)))[0] == []
