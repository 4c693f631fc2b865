"""`generate` with a drafter ends, streams and reports as transformers' own does: limits, stop strings, processors."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers as tf
from test_drafted_decoding import NEW, PROMPT, Ends, Foreign, Oracle, drafting
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from tiercache.compat import cache_kwargs, cache_out
from tiercache.draft.grow import grower
from tiercache.draft.lm import LmDrafter

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> tf.PreTrainedModel:
    return architectures.build("llama")


@pytest.fixture(scope="module")
def tokenizer() -> tf.PreTrainedTokenizerFast:
    """Every token is a word of its own."""
    made = Tokenizer(models.WordLevel({f"w{token}": token for token in range(131)}, unk_token="w3"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.WhitespaceSplit(), decoders.Fuse()
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w3", eos_token="w2", pad_token="w0")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.tensor([PROMPT])


@pytest.fixture(scope="module")
def text(model: Any) -> list[int]:
    """What greedy decoding writes, prompt included."""
    ids = torch.tensor([PROMPT])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2 * NEW, eos_token_id=None)[
        0
    ].tolist()


@pytest.fixture
def drafted(model: Any, text: list[int]) -> Iterator[Any]:
    """The model drafts by an oracle: whatever ends a text ends within an accepted path."""
    with drafting(model, [Oracle(text)], 16):
        yield model


def _same(model: Any, text: list[int], ids: torch.Tensor, **options: Any) -> tuple[Any, Any]:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW} | options
    plain = model.generate(ids, **options)
    with drafting(model, [Oracle(text)], 16) as stats:
        found = model.generate(ids, **options)
    assert not stats.plain_calls
    assert stats.rounds < stats.tokens or stats.tokens < 4
    return plain, found


@pytest.mark.parametrize("new", [1, 2, 3, 7, NEW])
def test_the_length_is_kept(new: int, model: Any, text: list[int], ids: torch.Tensor) -> None:
    plain, found = _same(model, text, ids, max_new_tokens=new, eos_token_id=None)
    assert found.tolist() == plain.tolist() == [text[: len(PROMPT) + new]]


@pytest.mark.parametrize("place", [1, 2, 5, 11])
def test_an_end_within_an_accepted_path(place: int, model: Any, text: list[int], ids: torch.Tensor) -> None:
    end = text[len(PROMPT) + place]
    plain, found = _same(model, text, ids, eos_token_id=[end, 130])
    assert found.tolist() == plain.tolist()
    assert found[0, -1] == end


def test_stop_strings(model: Any, text: list[int], ids: torch.Tensor) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "examples/pico/checkpoint")
    word = tokenizer.decode(text[len(PROMPT) + 5 : len(PROMPT) + 7])
    plain, found = _same(model, text, ids, stop_strings=[word], tokenizer=tokenizer, eos_token_id=None)
    assert found.tolist() == plain.tolist()
    assert len(PROMPT) < len(found[0]) < len(PROMPT) + NEW


def test_criteria_of_the_callers_own(model: Any, text: list[int], ids: torch.Tensor) -> None:
    class Thirteen(StoppingCriteria):
        def __init__(self) -> None:
            self.lengths: list[int] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            self.lengths.append(input_ids.shape[1])
            return torch.tensor([input_ids.shape[1] >= 13])

    criterion = Thirteen()
    with drafting(model, [Oracle(text)], 16):
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            stopping_criteria=StoppingCriteriaList([criterion]),
        )
    assert found.tolist() == [text[:13]]
    assert criterion.lengths == list(range(len(PROMPT) + 1, 14))  # every token once, in order


class Banning(LogitsProcessor):
    """Forbids what was said three tokens ago, and remembers how often it was asked."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.asked.append(input_ids.shape[1])
        scores[:, input_ids[0, -3]] = -torch.inf
        return scores


def test_processors_see_each_nodes_own_path(model: Any, text: list[int], ids: torch.Tensor) -> None:
    options = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "eos_token_id": None}
    options |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW}
    first, second = Banning(), Banning()
    plain = model.generate(ids, logits_processor=LogitsProcessorList([first]), **options)[0].tolist()
    assert plain != text[: len(plain)]
    near = LmDrafter(architectures.build("llama"), grower("best-first"))
    for drafter in (Oracle(plain), Oracle(text), near):
        second.asked.clear()
        with drafting(model, [drafter], 16):
            found = model.generate(ids, logits_processor=LogitsProcessorList([second]), **options)[0].tolist()
        assert found == plain
        assert second.asked == first.asked


def test_streamers_get_every_token_in_order(drafted: Any, text: list[int], ids: torch.Tensor, tokenizer: Any) -> None:
    class Heard(tf.TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            heard.append(text)
            ends.append(stream_end)

    heard: list[str] = []
    ends: list[bool] = []
    drafted.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, streamer=Heard(tokenizer), eos_token_id=None
    )
    assert "".join(heard).replace(" ", "") == "".join(f"w{token}" for token in text[: len(PROMPT) + NEW])
    assert ends.count(True) == 1


def test_scores_logits_and_cache_are_returned(model: Any, text: list[int], ids: torch.Tensor) -> None:
    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "eos_token_id": None}
    plain, found = _same(model, text, ids, temperature=None, **options)
    assert found.sequences.tolist() == plain.sequences.tolist()
    for name in ("scores", "logits"):
        ours, theirs = torch.cat(getattr(found, name)), torch.cat(getattr(plain, name))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert cache_out(found).get_seq_length() == cache_out(plain).get_seq_length()


def test_left_padding(model: Any, text: list[int], ids: torch.Tensor) -> None:
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids], dim=1)
    mask = (torch.arange(padded.shape[1]) >= 5).long()[None]
    plain, found = _same(model, text, padded, attention_mask=mask, eos_token_id=None)
    assert found.tolist() == plain.tolist()
    assert found[0, 5:].tolist() == text[: len(PROMPT) + NEW]


def test_chunked_prefill(drafted: Any, text: list[int], ids: torch.Tensor) -> None:
    found = drafted.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, prefill_chunk_size=3, eos_token_id=None
    )
    assert found.tolist() == [text[: len(PROMPT) + NEW]]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_return_sequences": 2, "do_sample": True}, "a batch of 2 sequences"),
        ({"use_cache": False}, "use_cache=False"),
        (
            {"output_hidden_states": True, "return_dict_in_generate": True},
            "output_attentions and output_hidden_states",
        ),
        ({"cache": "own"}, "a KV cache of the caller's own"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
    ],
)
def test_what_cannot_be_drafted_for_runs_plainly_and_says_so(
    options: dict[str, Any], reason: str, model: Any, text: list[int], ids: torch.Tensor, capsys: Any
) -> None:
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4, "eos_token_id": None} | options
    own = options.pop("cache", None) is not None
    if own:
        options |= cache_kwargs(model, tf.DynamicCache(config=model.config))
    with drafting(model, [Oracle(text)], 16, show=True) as stats:
        torch.manual_seed(0)
        for _ in range(2):
            found = model.generate(ids, **options)
            if own:
                break
    assert stats.rounds == 0
    assert list(stats.plain_reasons) == [reason]
    assert stats.plain_calls >= 1
    assert capsys.readouterr().err.count("without drafting") == 1
    if "do_sample" not in options:
        assert (found if isinstance(found, torch.Tensor) else found.sequences).tolist() == [text[: len(PROMPT) + 4]]


def test_beams_are_transformers_own(drafted: Any, ids: torch.Tensor) -> None:
    assert drafted.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, num_beams=2).shape[0] == 1


def test_a_batch_is_decoded_plainly(drafted: Any, text: list[int], ids: torch.Tensor) -> None:
    both = ids.repeat(2, 1)
    found = drafted.generate(both, attention_mask=torch.ones_like(both), max_new_tokens=5, eos_token_id=None)
    assert found.tolist() == [text[: len(PROMPT) + 5]] * 2


def test_a_drafter_that_fails_leaves_the_model_usable(model: Any, text: list[int], ids: torch.Tensor) -> None:
    class Fails(Oracle):
        def propose(self, budget: Any) -> Any:
            if len(self.context.tokens) > len(PROMPT) + 3:
                raise RuntimeError("no idea")
            return Oracle.propose(self, budget)

    drafter = Fails(text[: len(PROMPT) + 3])
    with drafting(model, [drafter], 2), pytest.raises(RuntimeError, match="no idea"):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, eos_token_id=None)
    with drafting(model, [Ends(), Foreign()], 4):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, eos_token_id=None)
    assert found.tolist() == [text[: len(PROMPT) + 4]]
