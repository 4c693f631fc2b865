"""The server before real models: its answers are the model's own, and lm-evaluation-harness scores through it alike."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers
from lm_eval.models.openai_completions import LocalCompletionsAPI
from serving import NAME, serving
from test_quality_harness import LENGTH, tasks, tied  # noqa: F401 - fixtures

import tiercache
from benchmarks.real.model import RealModel
from tiercache.quality.harness import Harness
from tiercache.text import load_tokenizer

PICO = Path(__file__).parents[1] / "examples" / "pico" / "checkpoint"
PROMPT = "def read_lines(path):\n"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pico() -> Iterator[tuple[Any, Any, Any]]:
    """A client, the resident model, and the tokenizer."""
    tokenizer = load_tokenizer(PICO)
    with (
        tiercache.offload(PICO, context=2 * LENGTH, logits=8, show_progress=False) as model,
        serving(model, tokenizer) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client, transformers.AutoModelForCausalLM.from_pretrained(PICO), tokenizer


def test_the_answer_is_the_models_own(pico: tuple[Any, Any, Any]) -> None:
    client, resident, tokenizer = pico
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    wanted = resident.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :]
    asked = {"model": NAME, "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.choices[0].text == tokenizer.decode(wanted, skip_special_tokens=True)
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (ids.shape[1], len(wanted))
    stream = client.completions.create(**asked, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == whole.choices[0].text
    sampled = [client.completions.create(**(asked | {"temperature": 1, "seed": 7})) for _ in range(2)]
    assert sampled[0].choices == sampled[1].choices != whole.choices


def test_a_text_that_goes_on_prefills_what_is_new(pico: tuple[Any, Any, Any]) -> None:
    client = pico[0]
    first = client.completions.create(model=NAME, prompt=PROMPT, max_tokens=6, temperature=0)
    more = PROMPT + first.choices[0].text + "\n\ndef write("
    second = client.completions.create(model=NAME, prompt=more, max_tokens=6, temperature=0)
    assert first.usage.prompt_tokens < second.usage.prompt_tokens_details.cached_tokens < second.usage.prompt_tokens
    client.completions.create(model=NAME, prompt="import os", max_tokens=1)
    assert client.completions.create(model=NAME, prompt=more, max_tokens=6, temperature=0).choices == second.choices


def test_echo_has_the_models_log_probabilities(tied: Path) -> None:  # noqa: F811
    """In fp32, where several passes of a text's parts have the logits of one."""
    tokenizer, resident = load_tokenizer(tied), transformers.AutoModelForCausalLM.from_pretrained(tied)
    ids = tokenizer(PROMPT)["input_ids"]
    asked: dict[str, Any] = {"prompt": [ids], "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 3}
    assert len(ids) > 2 * 8  # passes of as many rows as are reserved
    with (
        tiercache.offload(tied, context=2 * LENGTH, logits=8, show_progress=False) as model,
        serving(model, tokenizer) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        found = client.completions.create(model=NAME, **asked)
    with torch.no_grad():
        rows = resident(torch.tensor([ids])).logits[0].double().log_softmax(1)
    wanted = [float(rows[place, token]) for place, token in enumerate(ids[1:])] + [float(rows[-1].max())]
    logprobs = found.choices[0].logprobs
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx(wanted, abs=1e-4)
    for place, top in enumerate(logprobs.top_logprobs[1:]):
        values, likeliest = rows[place].topk(3)
        assert {tokenizer.decode([token]) for token in likeliest} <= set(top)
        assert max(top.values()) == pytest.approx(float(values[0]), abs=1e-4)


def through(url: str, folder: Path, length: int) -> Callable[[], Any]:
    """The harness's own client of such servers.

    It keeps a token of the length for the one that is generated, and puts no token before a text unless told to, where
    its client of models in memory does as the tokenizer has it.
    """
    return partial(
        LocalCompletionsAPI,
        base_url=f"{url}/v1/completions",
        model=NAME,
        tokenizer=str(folder),
        tokenizer_backend="huggingface",
        tokenized_requests=True,
        add_bos_token=True,
        max_length=length + 1,
        max_retries=1,
    )


def scores_three_ways(folder: Path, where: Path, limit: int | None, length: int) -> list[dict[str, dict[str, float]]]:
    """Through the server, through the attached model, through the resident one."""
    tokenizer = load_tokenizer(folder)
    resident = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with Harness.open(where, tokenizer, limit=limit, length=length) as harness:
        with tiercache.offload(folder, context=harness.tokens + 1, logits=harness.tokens, show_progress=False) as model:
            with serving(model, tokenizer) as url:
                served = harness.scores(through(url, folder, length), show=False)
            attached = harness.run(model, mixed=False, show=False)
        return [served, attached, harness.run(resident, mixed=False, show=False)]


def agree(ways: list[dict[str, dict[str, float]]]) -> None:
    assert len(ways) == 3
    for way in ways[1:]:
        assert set(way) == set(ways[0])
        for task, metrics in way.items():
            assert ways[0][task] == pytest.approx(metrics, abs=1e-3), task


def test_the_harness_scores_alike_three_ways(tasks: Path) -> None:  # noqa: F811
    ways = scores_three_ways(PICO, tasks, 8, LENGTH)
    agree(ways)
    assert set(ways[0]) == {"choice", "rolling", "writing"}
    assert 0 < ways[0]["choice"]["acc"] < 1


@pytest.mark.real
def test_the_real_model_scores_alike_three_ways(tasks: Path, real_model: RealModel) -> None:  # noqa: F811
    agree(scores_three_ways(real_model.checkpoint, tasks, 3, LENGTH))
