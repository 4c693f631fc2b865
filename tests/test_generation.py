"""Answers: the tokens of `generate`, in pieces of text, with exact log-probabilities, from a kept KV cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers as tf
from conftest import PICO
from hypothesis import given
from hypothesis import strategies as st
from test_drafted_generate import tokenizer  # noqa: F401 - a fixture

import tiercache
from tiercache.errors import ContextExceededError, UsageError
from tiercache.generation.answer import Answer, PassProgress, Piece
from tiercache.generation.detokenizer import Detokenizer
from tiercache.generation.generator import TextGenerator
from tiercache.generation.request import GenerationRequest
from tiercache.text import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPT, NEXT = (5, 17, 99, 23, 64, 8, 42, 42, 7), (11, 12, 13)
NEW = 12
PICO_TOKENIZER = load_tokenizer(PICO)


@contextmanager
def opened(source: Any, tokenizer: Any, **options: Any) -> Iterator[TextGenerator]:  # noqa: F811
    with tiercache.offload(source, **{"context": 96, "show_progress": False} | options) as model:
        yield TextGenerator(model, tokenizer)


@pytest.fixture(params=["llama", "mistral", "gemma3", "gpt2"])
def name(request: pytest.FixtureRequest) -> str:
    """Of an architecture; two of them have sliding windows, shorter than the prompt."""
    found: str = request.param
    return found


@pytest.fixture(params=[None, "lookup"])
def drafting(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of `offload`: plain decoding, and drafted."""
    return {} if request.param is None else {"drafter": request.param, "draft_nodes": 3}


def _wanted(name: str, ids: tuple[int, ...], seed: int = 0, **options: Any) -> tuple[int, ...]:
    """What transformers' own loop writes behind `ids`."""
    model, given_ids = architectures.build(name), torch.tensor([ids])
    options = {"do_sample": False} | options
    mask = torch.ones_like(given_ids)
    torch.manual_seed(seed)
    out = model.generate(given_ids, attention_mask=mask, max_new_tokens=NEW, pad_token_id=0, **options)
    return tuple(out[0, len(ids) :].tolist())


# --- text ---


@given(st.text(max_size=60), st.lists(st.text("abn\n é漢🙂", min_size=1, max_size=3), max_size=3), st.integers(0, 8))
def test_pieces_make_up_the_text_up_to_the_first_stop_string(text: str, stop: list[str], prompt: int) -> None:
    ids = PICO_TOKENIZER(text)["input_ids"]
    prompt = min(prompt, len(ids))
    before, new = ids[:prompt], ids[prompt:]
    detokenizer = Detokenizer(PICO_TOKENIZER, before, stop)
    pieces = []
    for token in new:
        pieces.append(detokenizer.add(token))
        if detokenizer.stopped:
            break
    pieces.append(detokenizer.end())
    start = len(PICO_TOKENIZER.decode(before, skip_special_tokens=True).rstrip("\ufffd"))
    whole = PICO_TOKENIZER.decode(ids, skip_special_tokens=True)[start:]
    found = "".join(pieces)
    ends = [place for one in stop if (place := whole.find(one)) >= 0]
    if prompt and "\ufffd" in PICO_TOKENIZER.decode(before):
        return  # half a character before the answer: where its text begins is nobody's to say
    assert found == (whole[: min(ends)] if ends else whole)
    assert detokenizer.stopped == bool(ends)


def test_a_character_of_several_tokens_comes_whole() -> None:
    ids = PICO_TOKENIZER("漢🙂")["input_ids"]
    detokenizer = Detokenizer(PICO_TOKENIZER, ())
    assert len(ids) > 2
    assert [piece for token in ids if (piece := detokenizer.add(token))] == ["漢", "🙂"]


def test_tokens_without_text_are_not_decoded_for_ever() -> None:
    decoded = 0

    class Counting:
        def decode(self, tokens: list[int], **options: Any) -> str:
            nonlocal decoded
            decoded += len(tokens)
            return str(PICO_TOKENIZER.decode(tokens, **options))

    detokenizer = Detokenizer(Counting(), ())
    for _ in range(400):
        assert detokenizer.add(PICO_TOKENIZER.eos_token_id) == ""
    assert decoded < 400 * 64


# --- tokens ---


def test_answers_are_transformers_own(name: str, checkpoint: Callable[..., Path], tokenizer: Any) -> None:  # noqa: F811
    pieces: list[Piece] = []
    with opened(checkpoint(name), tokenizer) as generator:
        greedy = generator.generate(GenerationRequest(PROMPT, NEW), emit=pieces.append)
        sampled = generator.generate(GenerationRequest(PROMPT, NEW, temperature=0.8, top_p=0.9, top_k=40, seed=3))
    assert greedy.tokens == _wanted(name, PROMPT)
    assert "".join(piece.text for piece in pieces) == greedy.text
    assert sum((piece.tokens for piece in pieces), ()) == greedy.tokens
    assert greedy.finish_reason == ("stop" if greedy.tokens[-1] == 2 else "length")
    assert sampled.tokens == _wanted(name, PROMPT, 3, do_sample=True, temperature=0.8, top_p=0.9, top_k=40)


def test_the_next_turn_prefills_what_is_new(
    name: str,
    drafting: dict[str, Any],
    checkpoint: Callable[..., Path],
    tokenizer: Any,  # noqa: F811
) -> None:
    prefilled: list[PassProgress] = []
    with opened(checkpoint(name), tokenizer, **drafting) as generator:
        first = generator.generate(GenerationRequest(PROMPT, NEW))
        turn = (*PROMPT, *first.tokens, *NEXT)
        second = generator.generate(GenerationRequest(turn, NEW), progress=prefilled.append)
        assert second.reused_tokens == len(PROMPT) + len(first.tokens) - 1
        assert second.tokens == _wanted(name, turn)
        assert prefilled[0] == PassProgress("prefill", 0, 3, len(turn) - second.reused_tokens)
        again = generator.generate(GenerationRequest(turn, NEW))
        assert again.reused_tokens == 0, "what is asked twice is answered alike"
        other = (*turn[: len(PROMPT) + 3], 77, 78)  # the answer before was edited
        edited = generator.generate(GenerationRequest((*turn, *again.tokens), 1))
        edited = generator.generate(GenerationRequest(other, NEW))
        assert edited.tokens == _wanted(name, other)


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_cancelled_answer_leaves_a_generator_that_answers(
    after: int,
    drafting: dict[str, Any],
    checkpoint: Callable[..., Path],
    tokenizer: Any,  # noqa: F811
) -> None:
    wanted = _wanted("llama", PROMPT)
    with opened(checkpoint("llama"), tokenizer, **drafting) as generator:
        for how in ("cancelled", "interrupted"):
            layers = iter(range(after + 1))

            def cancelled(layers: Iterator[int] = layers, how: str = how) -> bool:
                ended = next(layers, None) is None
                if ended and how == "interrupted":
                    raise KeyboardInterrupt
                return ended

            if how == "interrupted":
                with pytest.raises(KeyboardInterrupt):
                    generator.generate(GenerationRequest(PROMPT, NEW), cancelled=cancelled)
                partial: Answer | None = None
            else:
                partial = generator.generate(GenerationRequest(PROMPT, NEW), cancelled=cancelled)
                assert partial.finish_reason == "cancelled"
                assert partial.tokens == wanted[: len(partial.tokens)]
                assert len(partial.tokens) < NEW
            written = () if partial is None else partial.tokens
            turn = (*PROMPT, *written, *NEXT)
            assert generator.generate(GenerationRequest(turn, NEW)).tokens == _wanted("llama", turn)


def test_waiting_for_the_next_question_is_no_decoding(checkpoint: Callable[..., Path], tokenizer: Any) -> None:  # noqa: F811
    with opened(checkpoint("llama"), tokenizer) as generator:
        first = generator.generate(GenerationRequest(PROMPT, NEW))
        before = replace(generator._model.tiercache.stats())
        goes_on = generator.generate(GenerationRequest((*PROMPT, *first.tokens), 1))
        after = generator._model.tiercache.stats()
    assert goes_on.reused_tokens == len(PROMPT) + NEW - 1
    assert (after.decode_s, after.decode_tokens) == (before.decode_s, before.decode_tokens)
    assert before.decode_tokens > 1


def test_a_cancelled_turn_leaves_the_turns_before(
    drafting: dict[str, Any],
    checkpoint: Callable[..., Path],
    tokenizer: Any,  # noqa: F811
) -> None:
    with opened(checkpoint("llama"), tokenizer, **drafting) as generator:
        first = generator.generate(GenerationRequest(PROMPT, NEW))
        turn = (*PROMPT, *first.tokens, *NEXT)
        in_prefill = generator.generate(GenerationRequest(turn, NEW), cancelled=lambda: True)
        assert (in_prefill.finish_reason, in_prefill.tokens) == ("cancelled", ())
        layers = iter(range(4))
        cut = generator.generate(GenerationRequest(turn, NEW), cancelled=lambda: next(layers, None) is None)
        assert cut.reused_tokens == len(PROMPT) + len(first.tokens) - 1
        third = generator.generate(GenerationRequest((*turn, *cut.tokens, *NEXT), NEW))
        assert third.reused_tokens >= len(turn)
        assert third.tokens == _wanted("llama", (*turn, *cut.tokens, *NEXT))


def test_a_state_of_all_tokens_is_not_gone_on_from(drafting: dict[str, Any], tokenizer: Any) -> None:  # noqa: F811
    config = tf.Lfm2Config(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=104,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.tensor([(*PROMPT, *NEXT)])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    rows = model(ids).logits[0].detach().log_softmax(-1)
    with opened(model, tokenizer, logits=11, **drafting) as generator:
        layers = iter(range(3))
        generator.generate(GenerationRequest(PROMPT, NEW), cancelled=lambda: next(layers, None) is None)
        answer = generator.generate(GenerationRequest((*PROMPT, *NEXT), NEW))
        assert (answer.reused_tokens, answer.tokens) == (0, tuple(wanted[0, ids.shape[1] :].tolist()))
        scored = generator.score((*PROMPT, *NEXT), 1)
        assert scored[-1].logprob == pytest.approx(float(rows[-2, NEXT[-1]]), abs=1e-5)
        with pytest.raises(ContextExceededError, match=r"for 14 tokens returns 13 rows of logits, 11 were reserved"):
            generator.score((*PROMPT, *NEXT, 3, 4), 1)


# --- log-probabilities ---


def test_log_probabilities_are_those_of_one_forward(
    name: str,
    drafting: dict[str, Any],
    checkpoint: Callable[..., Path],
    tokenizer: Any,  # noqa: F811
) -> None:
    with opened(checkpoint(name), tokenizer, logits=4, **drafting) as generator:
        answer = generator.generate(GenerationRequest(PROMPT, NEW, logprobs=3))
        text = PROMPT + answer.tokens
        scored = generator.score(text, 3)  # in passes of four tokens
        behind = generator.generate(GenerationRequest(text, 1, logprobs=1))
        assert behind.reused_tokens == len(text) - 1
    with torch.no_grad():
        rows = architectures.build(name)(torch.tensor([text])).logits[0].log_softmax(-1)
    assert behind.logprobs[0].logprob == pytest.approx(float(rows[-1].max()), abs=1e-5)
    assert scored[0].logprob is None
    assert [each.token for each in scored] == list(text)
    for place, each in enumerate(scored[1:]):
        assert each.logprob == pytest.approx(float(rows[place, text[place + 1]]), abs=1e-5)
        assert [token for token, _ in each.top] == rows[place].topk(3).indices.tolist()
    for each, other in zip(answer.logprobs, scored[len(PROMPT) :], strict=True):
        assert (each.token, [token for token, _ in each.top]) == (other.token, [token for token, _ in other.top])
        assert each.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_log_probabilities_are_the_models_whatever_penalty_chooses(tokenizer: Any) -> None:  # noqa: F811
    model = architectures.build("llama")
    model.generation_config.repetition_penalty = 1.5
    ids = torch.tensor([PROMPT])
    wanted = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    with opened(model, tokenizer) as generator:
        answer = generator.generate(GenerationRequest(PROMPT, NEW, logprobs=1))
        scored = generator.score((*PROMPT, *answer.tokens), 1)
    assert answer.tokens == tuple(wanted[0, len(PROMPT) :].tolist()) != _wanted("llama", PROMPT)
    for each, other in zip(answer.logprobs, scored[len(PROMPT) :], strict=True):
        assert each.logprob == pytest.approx(other.logprob, abs=1e-5)


def test_a_stop_string_ends_the_answer(
    drafting: dict[str, Any],
    checkpoint: Callable[..., Path],
    tokenizer: Any,  # noqa: F811
) -> None:
    with opened(checkpoint("llama"), tokenizer, **drafting) as generator:
        whole = generator.generate(GenerationRequest(PROMPT, NEW))
        stop = whole.text[4:7]  # begins within a token
        cut = generator.generate(GenerationRequest(PROMPT, NEW, stop=("nowhere", stop)))
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    texts = (tokenizer.decode(whole.tokens[:n], skip_special_tokens=True) for n in range(NEW + 1))
    assert len(cut.tokens) == next(n for n, text in enumerate(texts) if stop in text)


def test_what_cannot_be_answered_is_refused(checkpoint: Callable[..., Path], tokenizer: Any) -> None:  # noqa: F811
    with opened(checkpoint("llama"), tokenizer, context=16) as generator:
        with pytest.raises(ContextExceededError, match=r"9 tokens and 8 new ones need a context of 17, 16 were"):
            generator.generate(GenerationRequest(PROMPT, 8))
        with pytest.raises(ContextExceededError, match=r"a text of 18 tokens needs a context of as many, 16 were"):
            generator.score(PROMPT * 2, 1)
        assert len(generator.generate(GenerationRequest(PROMPT, 7)).tokens) == 7
    with pytest.raises(UsageError, match=r"not offloaded; open it with tiercache\.offload"):
        TextGenerator(architectures.build("llama"), tokenizer)
    for wrong in ({"ids": ()}, {"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"stop": ("",)}):
        with pytest.raises(UsageError):
            GenerationRequest(**{"ids": PROMPT, "max_new_tokens": 4} | wrong)
