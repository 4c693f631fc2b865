"""Importance against plain loops: scores, recall, and predictors that find a planted rule."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from tiercache.calibrate.predictors import train_predictor
from tiercache.errors import UsageError
from tiercache.model.importance import (
    SCORERS,
    first,
    largest,
    needed,
    previous,
    recall,
    scores,
)

pytestmark = pytest.mark.usefixtures("one_thread")

TOKENS, FEATURES, NEURONS = 37, 24, 60


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def naive_recall(guess: torch.Tensor, truth: torch.Tensor, count: int) -> float:
    found = 0
    for mine, real in zip(guess.tolist(), truth.tolist(), strict=True):
        best = sorted(range(len(real)), key=lambda n: -real[n])[:count]
        found += len(set(best) & set(sorted(range(len(mine)), key=lambda n: -mine[n])[:count]))
    return found / (count * len(truth))


@pytest.mark.parametrize("share", [0.001, 0.25, 0.5, 1.0])
def test_recall_counts_what_sets_share(rng: torch.Generator, share: float) -> None:
    truth = torch.rand(TOKENS, NEURONS, generator=rng)
    guess = truth + 0.4 * torch.rand(TOKENS, NEURONS, generator=rng)
    count = max(1, round(share * NEURONS))
    assert recall(guess, truth, share) == pytest.approx(naive_recall(guess, truth, count))
    assert recall(truth, truth, share) == 1


def test_the_token_before_is_one_row_up(rng: torch.Generator) -> None:
    truth = torch.rand(TOKENS, NEURONS, generator=rng)
    expected = naive_recall(truth[:-1], truth[1:], NEURONS // 2)
    assert recall(previous(truth), truth[1:], 0.5) == pytest.approx(expected)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", SCORERS)
def test_scores_are_what_their_papers_say(rng: torch.Generator, name: str, gated: bool) -> None:
    gate, up = torch.randn(2, TOKENS, NEURONS, generator=rng)
    norms = torch.rand(NEURONS, generator=rng)
    if name == "up" and not gated:
        with pytest.raises(UsageError, match=r"gated.*'product'"):
            needed(name, 1)
        return
    parts = needed(name, 2 if gated else 1)
    assert set(parts) == {"product": {0, 1}, "gate": {0}, "up": {1}, "inputs": {0, 1}}[name] & set(range(1 + gated))
    values = [value if part in parts else None for part, value in enumerate((gate, up)[: 1 + gated])]
    found = scores(values, functional.silu, norms)
    for token in range(TOKENS):
        for n in range(NEURONS):
            g, u = functional.silu(gate[token, n]), up[token, n]
            plain = {(0, 1): g * u, (0,): g, (1,): u}[parts]
            assert found[token, n] == pytest.approx(float(abs(plain) * norms[n]), rel=1e-5)


def test_an_unknown_scorer_is_refused_with_those_there_are() -> None:
    with pytest.raises(UsageError, match=r"unknown scorer 'magic'.*product.*up"):
        needed("magic", 2)


def test_the_larger_half_of_the_inputs_stays(rng: torch.Generator) -> None:
    x = torch.randn(TOKENS, FEATURES, generator=rng)
    kept = largest(x, 0.5)
    for token in range(TOKENS):
        order = sorted(range(FEATURES), key=lambda c: -abs(float(x[token, c])))
        assert kept[token, order[: FEATURES // 2]].equal(x[token, order[: FEATURES // 2]])
        assert not kept[token, order[FEATURES // 2 :]].any()
    assert largest(x, 1.0) is x
    assert (largest(x, 1e-9) != 0).sum(dim=1).eq(1).all()


def test_a_predictor_learns_a_planted_rule(rng: torch.Generator) -> None:
    x = torch.randn(700, FEATURES, generator=rng)
    rule = torch.randn(FEATURES, 6, generator=rng) @ torch.randn(6, NEURONS, generator=rng)
    truth = (x @ rule).relu() + 1e-3 * torch.rand(700, NEURONS, generator=rng)
    before = torch.get_rng_state()
    made = train_predictor(x[:500], truth[:500], rank=16, steps=150)
    assert torch.get_rng_state().equal(before)
    assert recall(made(x[500:]), truth[500:], 0.5) > 0.8  # chance is 0.5
    again = train_predictor(x[:500], truth[:500], rank=16, steps=150)
    assert all(again.state_dict()[name].equal(value) for name, value in made.state_dict().items())
    assert not any(parameter.requires_grad for parameter in made.parameters())
    shuffled = train_predictor(x[:500], truth[:500].roll(250, 0), rank=16, steps=150)
    assert recall(shuffled(x[500:]), truth[500:], 0.5) < 0.65


@given(st.data(), st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_the_first_of_each_class_are_the_larger_ones(data: st.DataObject, numbers: list[int]) -> None:
    left, counts = len(numbers), []
    for _ in range(3):
        counts.append(data.draw(st.integers(0, left)))
        left -= counts[-1]
    score = torch.tensor(numbers, dtype=torch.float32)
    order = first(score, counts, in_order=False)
    assert len(set(order.tolist())) == len(order) == sum(counts)
    rest = torch.tensor([place for place in range(len(numbers)) if place not in set(order.tolist())], dtype=torch.int64)
    classes = [score[some] for some in (*order.split(counts), rest)]
    best = score.sort(descending=True).values.split([*counts, left])
    assert all(torch.equal(some.sort(descending=True).values, want) for some, want in zip(classes, best, strict=True))


def test_scores_that_are_no_numbers_lose_no_neuron() -> None:
    score = torch.tensor([1.0, torch.nan, 3.0, torch.nan, 2.0])
    assert len(set(first(score, (2, 1, 1), in_order=False).tolist())) == 4
