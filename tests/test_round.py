"""The quick parts of a round of drafting, each against the slow one that says the same."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as tf
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks import round_cost
from tiercache.decode import verify, warpers
from tiercache.decode.request import Request
from tiercache.draft import noise
from tiercache.draft.noise import GumbelNoise
from tiercache.draft.row_topk import row_topk

pytestmark = pytest.mark.usefixtures("one_thread")


def scores(rows: int, columns: int, seed: int, *, few: bool) -> Tensor:
    """Random ones; `few`: of so few values that most have equals."""
    found = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return (2 * found).round() if few else found


@given(st.integers(1, 9), st.integers(1, 5000), st.integers(1, 9), st.integers(0, 99), st.booleans())
@example(3, 4096, 8, 0, True)
def test_the_highest_of_rows_are_those_of_torch(rows: int, columns: int, count: int, seed: int, few: bool) -> None:
    count = min(count, columns)
    for dtype in (torch.float32, torch.bfloat16):
        table = scores(rows, columns, seed, few=few).to(dtype)
        values, places = row_topk(table, count)
        assert torch.equal(values, table.topk(count).values)
        assert torch.equal(table.gather(1, places), values)
        assert all(len(set(row)) == count for row in places.tolist())
        if not few:
            assert torch.equal(places, table.topk(count).indices) or dtype == torch.bfloat16  # which has equals


def test_of_rows_what_is_no_number_is_highest_and_what_is_banned_lowest() -> None:
    table = torch.full((2, 4100), -math.inf)
    table[0, 4099], table[0, 77] = 1.0, math.nan
    table[1, ::1000] = torch.arange(5.0)
    values, places = row_topk(table, 3)
    assert places[0, :2].tolist() == [77, 4099]
    assert values[0, 2] == -math.inf
    assert places[1].tolist() == [4000, 3000, 2000]


@given(st.integers(1, 60), st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]), st.booleans())
def test_the_likeliest_token_is_torchs(tokens: int, seed: int, banned: float, broken: bool) -> None:
    row = scores(1, tokens, seed, few=True)[0]
    row[torch.rand(tokens, generator=torch.Generator().manual_seed(seed + 1)) < banned] = -math.inf
    if broken:
        row[tokens // 2] = math.nan
    for own in (row, row.double(), row.bfloat16()):
        best, token = verify._highest(own)
        wanted, place = own.max(-1)
        assert token == int(place)
        assert best == float(wanted) or (math.isnan(best) and broken)


def test_the_noise_of_a_token_is_that_of_its_row() -> None:
    for seed in (0, 5, 1 << 70):
        alone, rows = GumbelNoise(seed, 500), GumbelNoise(seed, 500)
        for position in (0, 3, 1 << 40):
            one = alone.of(position)
            found = torch.tensor([one(token) for token in range(500)])
            # logarithms of many numbers at once may differ in their last bit
            torch.testing.assert_close(found, rows(position), rtol=3e-7, atol=1e-7)
            kept = rows.of(position)
            assert [kept(token) for token in range(500)] == rows(position).tolist()


@pytest.mark.parametrize("left", [0, 1, 9, 60, 200, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_noise_that_is_added_to_few_scores_is_that_of_all(left: int, dtype: torch.dtype) -> None:
    noisy, rows = GumbelNoise(4, 500), GumbelNoise(4, 500)
    banned = torch.full((500,), -math.inf, dtype=dtype)
    banned[torch.randperm(500, generator=torch.Generator().manual_seed(left))[:left]] = 1.5
    before = banned.clone()
    for position in (3, 3, 1 << 33):
        found, wanted = noisy.added(banned, position), banned + rows(position)
        assert found.dtype == wanted.dtype
        torch.testing.assert_close(found, wanted, rtol=3e-7, atol=1e-7)
    assert torch.equal(banned, before)
    if left:
        banned[7] = math.nan
        assert noisy.added(banned, 5)[7].isnan()


def test_the_noise_of_a_token_whose_number_rounds_to_one_is_infinite(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise, "math", SimpleNamespace(log=lambda value: 0.0, inf=math.inf))  # as of 1
    assert noise._gumbel(1, 1) == math.inf


class Streamed:
    """What a streamer was given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        assert value.shape == (1,)
        assert value.dtype == torch.long
        self.tokens += value.tolist()


class Third(tf.StoppingCriteria):
    """Ends a text with the third call, so it must be asked each time."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        return torch.tensor([self.calls == 3])


def criteria(*, end: list[int], most: int, positions: int | None, third: bool) -> tf.StoppingCriteriaList:
    own = [tf.MaxLengthCriteria(most, positions), tf.EosTokenCriteria(torch.tensor(end)), *([Third()] * third)]
    return tf.StoppingCriteriaList(own)


@pytest.mark.parametrize("positions", [None, 5, 100])
@pytest.mark.parametrize("third", [False, True])
@pytest.mark.parametrize("end", [[7], [3, 9]])
def test_a_text_ends_where_the_criteria_say(positions: int | None, third: bool, end: list[int]) -> None:
    given_criteria = {"end": end, "most": 9, "positions": positions, "third": third}
    text, whole = [4, 5, 6, 8, 7, 1, 3, 2, 9], criteria(**given_criteria)
    wanted = [bool(whole(torch.tensor([[1, 2, *text[: count + 1]]]), None).all()) for count in range(len(text))]
    streamer = Streamed()
    request = Request(torch.tensor([[1, 2]]), 2, 0, [], criteria(**given_criteria), streamer, 99)
    assert [request.write(token) for token in text] == wanted
    assert True in wanted
    assert streamer.tokens == text
    assert request.text.tolist() == [[1, 2, *text]]


def test_criteria_of_ones_own_are_asked_as_they_are() -> None:
    asked: list[list[int]] = []

    def ends(ids: Tensor, scores: Any) -> Tensor:
        asked.append(ids[0].tolist())
        return torch.tensor([ids.shape[1] == 4])

    request = Request(torch.tensor([[1, 2]]), 2, 0, [], ends, None, 99)
    assert [request.write(token) for token in (5, 6)] == [False, True]
    assert asked == [[1, 2, 5], [1, 2, 5, 6]]


@pytest.mark.parametrize("keep", [{}, {"keep_scores": True}, {"keep_logits": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_without_processors_are_the_logits(keep: dict[str, bool], dtype: torch.dtype) -> None:
    request = Request(torch.tensor([[1, 2]]), 2, 0, tf.LogitsProcessorList(), lambda *_: torch.tensor([False]), None, 9)
    request.keep_scores, request.keep_logits = keep.get("keep_scores", False), keep.get("keep_logits", False)
    row = torch.randn(50).to(dtype)
    shaped = request.shaped(row)
    assert shaped.dtype == torch.float32
    assert torch.equal(shaped, row.float())
    assert [len(request.scores), len(request.logits)] == [int("keep_scores" in keep), int("keep_logits" in keep)]


@given(
    st.integers(1, 3000),
    st.integers(0, 99),
    st.sampled_from([0.0, 0.05, 0.5, 0.9, 0.999]),
    st.integers(1, 3),
    st.data(),
)
@example(3000, 1, 0.9, 1, None)
def test_top_p_is_transformers_own(
    tokens: int, seed: int, share: float, least: int, data: st.DataObject | None
) -> None:
    kind = "few" if data is None else data.draw(st.sampled_from(["few", "banned", "broken", "all different"]))
    row = scores(1, tokens, seed, few=kind == "few")
    if kind == "banned":
        row[0, :: 1 + seed % 3] = -math.inf
    if kind == "broken":
        row[0, tokens // 2] = math.nan
    warper = tf.TopPLogitsWarper(share, min_tokens_to_keep=least)
    before = row.clone()
    found, wanted = warpers.processed(warper, torch.tensor([[1]]), row), warper(torch.tensor([[1]]), row.clone())
    assert torch.equal(found.nan_to_num(9.5), wanted.nan_to_num(9.5))
    assert torch.equal(row.nan_to_num(9.5), before.nan_to_num(9.5))


def test_top_p_asks_transformers_only_where_equals_are_parted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    whole = tf.TopPLogitsWarper.__call__
    monkeypatch.setattr(
        tf.TopPLogitsWarper, "__call__", lambda self, ids, row: asked.append(row) or whole(self, ids, row)
    )
    warper = tf.TopPLogitsWarper(0.6)
    for row, parted in (([0.4, 0.3, 0.2, 0.1], False), ([0.3, 0.3, 0.2, 0.2], False), ([0.25] * 4, True)):
        asked.clear()
        left = warpers.processed(warper, torch.tensor([[1]]), torch.tensor([row]).log())
        assert bool(asked) == parted
        assert int((left > -math.inf).sum()) == (3 if parted else 2)


def test_other_processors_are_asked_as_they_are() -> None:
    class Own(tf.TopPLogitsWarper):
        def __call__(self, ids: Tensor, row: Tensor) -> Tensor:
            return row + ids[0, -1]

    assert warpers.processed(Own(0.5), torch.tensor([[3]]), torch.zeros(1, 2)).tolist() == [[3.0, 3.0]]
    half = torch.zeros(1, 4, dtype=torch.float64)
    assert warpers.processed(tf.TopPLogitsWarper(0.5), torch.tensor([[3]]), half).dtype == torch.float64


def test_a_processor_may_change_its_scores_in_place() -> None:
    def banning(ids: Tensor, given_scores: Tensor) -> Tensor:
        given_scores[:, 3] = -math.inf
        return given_scores

    request = Request(torch.tensor([[1, 2]]), 2, 0, [banning], lambda *_: torch.tensor([False]), None, 9)
    row = torch.zeros(5)
    assert request.shaped(row)[3] == -math.inf
    assert row[3] == 0


def test_the_benchmark_of_a_round_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    before = [getattr(owner, method) for owner, method, _ in round_cost._PARTS]
    round_cost.main(["--vocabulary", "3000", "--rounds", "8", "--nodes", "6"])
    assert before == [getattr(owner, method) for owner, method, _ in round_cost._PARTS]
    *_, line = capsys.readouterr().out.splitlines()
    found = json.loads(line)["us"]
    ngrams, model = found["n-grams, greedy"], found["the model's own planes, greedy"]
    parts = {name for _, _, name in round_cost._PARTS}
    assert parts == ngrams.keys() | model.keys() | found["n-grams, temperature and top p"].keys()
    assert all(took >= 0 for table in found.values() for took in table.values())
    assert ngrams["likeliest of all rows"] > 0 < model["resident: grow"]
    assert found["the budgeter"]["a plan"] > found["the budgeter"]["decide, median"]


def test_a_made_up_target_says_what_its_text_says() -> None:
    size = round_cost.Size(vocabulary=2000, layers=1, prompt=40, nodes=4)
    text = round_cost.words(100)
    run = round_cost.MadeUpRun(round_cost._model(size), text, size, clock := round_cost.Clock())
    clock.begin_round()
    assert run.prefill(torch.tensor(text[:39]), 2).argmax(-1).tolist() == text[38:40]
    rows = run.run([text[39], text[40], 7, text[41]], [-1, 0, 0, 1])
    assert rows.argmax(-1).tolist() == [text[40], text[41], text[41], text[42]]
    run.commit([0, 1])
    assert run.run([text[41]], [-1]).argmax(-1).tolist() == [text[42]]
