"""transformers' moving parts: under every name of the KV cache, under newer and older releases, what is missing."""

import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
import transformers as tf

import tiercache
from tiercache import compat
from tiercache.errors import EnvironmentUnsupportedError, UnsupportedModelError, UsageError

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.tensor([[5, 9, 11, 5, 9, 11, 5, 9]])
GREEDY: dict[str, Any] = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "eos_token_id": None}


@pytest.fixture
def one_name_alone(monkeypatch: pytest.MonkeyPatch) -> str:
    """Llama as it will be once the old name is gone, or as it was before there was a new one."""
    from transformers.models.llama import modeling_llama as llama

    for kind in (llama.LlamaForCausalLM, llama.LlamaModel, llama.LlamaDecoderLayer, llama.LlamaAttention):
        forward: Any = kind.forward
        while "deprecate" in getattr(forward, "__code__", forward).co_qualname:  # takes the old name too, and warns
            forward = forward.__wrapped__
        monkeypatch.setattr(kind, "forward", forward)
    accepts = inspect.signature(llama.LlamaForCausalLM.forward).parameters
    (name,) = [name for name in compat.CACHE_NAMES if name in accepts]
    return name


def _write(model: Any) -> list[int]:
    return model.generate(IDS, **GREEDY, max_new_tokens=24)[0].tolist()


def test_drafting_and_statistics_know_the_cache_under_its_only_name(
    one_name_alone: str, plane_store: Callable[..., Path]
) -> None:
    store = plane_store("llama")
    with tiercache.offload(store, precision="int8", dram="64MiB", context=64) as model:
        assert compat.cache_argument(model) == one_name_alone
        plain = _write(model)
        assert model.tiercache.stats().decode_tokens == 22, "one step is still open"
    with tiercache.offload(
        store, precision="int8", dram="64MiB", context=64, drafter="ngram", draft_fixed=True
    ) as model:
        assert _write(model) == plain
        drafting = model.tiercache.stats().drafting
        assert (drafting.tokens, drafting.plain_reasons) == (23, {})
        assert drafting.rounds < 23, "some of the guesses were right"


def test_the_cache_that_comes_back_goes_in_again() -> None:
    model = architectures.build("llama")
    output = model(input_ids=IDS, use_cache=True)
    cache = compat.cache_out(output)
    assert cache is not None
    assert compat.cache_in((), compat.cache_kwargs(model, cache)) is cache
    assert compat.cache_in((IDS, None, None, cache), {}) is cache
    again = model(input_ids=IDS[:, :1], **compat.cache_kwargs(model, cache))
    assert compat.cache_out(again) is cache
    assert cache.get_seq_length() == IDS.shape[1] + 1
    assert compat.cache_out(model(input_ids=IDS, use_cache=False)) is None


def test_a_model_without_a_kv_cache_is_named() -> None:
    class Bare(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    assert compat.cache_argument(Bare()) is None
    with pytest.raises(EnvironmentUnsupportedError, match=r"no argument for a KV cache in Bare\.forward"):
        compat.cache_kwargs(Bare(), None)


def test_a_newer_transformers_gets_one_warning_that_names_it() -> None:
    version = f"{compat.NEWEST[0]}.{compat.NEWEST[1] + 3}.1"
    compat._warn_of_newer.cache_clear()
    with pytest.warns(UserWarning, match=f"transformers {version} is newer than"):
        compat.check_version(version)
    with warnings.catch_warnings(action="error"):
        compat.check_version(version)  # once was enough
    with warnings.catch_warnings(action="error"):
        compat.check_version(f"{compat.NEWEST[0]}.{compat.NEWEST[1]}.9")
        compat.check_version(f"{compat.OLDEST[0]}.{compat.OLDEST[1]}.0.dev0")


def test_a_model_of_states_alone_is_refused_by_name() -> None:
    config = tf.MambaConfig(vocab_size=131, hidden_size=64, num_hidden_layers=2, state_size=8)
    model = tf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(UnsupportedModelError, match=r"MambaForCausalLM cannot run without data .*README's list"):
        tiercache.offload(model, context=32, show_progress=False).__enter__()


def test_an_older_transformers_is_refused() -> None:
    with pytest.raises(EnvironmentUnsupportedError, match=r"transformers 5\.4\.2 is older than 5\.5.*pip install"):
        compat.check_version("5.4.2")


def test_a_missing_decoding_loop_is_an_error_at_open(
    monkeypatch: pytest.MonkeyPatch, plane_store: Callable[..., Path]
) -> None:
    monkeypatch.delattr(tf.GenerationMixin, "_sample")
    with (
        pytest.raises(EnvironmentUnsupportedError, match=r"no decoding loop LlamaForCausalLM\._sample"),
        tiercache.offload(plane_store("llama"), precision="int8", dram="64MiB", context=64, drafter="auto"),
    ):
        pass


@pytest.mark.parametrize("drafter", ["ngram", "resident"])
def test_a_named_drafter_that_cannot_draft_is_an_error_and_auto_says_why(
    drafter: str, monkeypatch: pytest.MonkeyPatch, plane_store: Callable[..., Path], capsys: Any
) -> None:
    given: dict[str, Any] = {"precision": "int8", "dram": "64MiB", "context": 64}
    store = plane_store("llama")
    with tiercache.offload(store, **given, drafter=drafter) as model:
        both = IDS.repeat(2, 1)
        own_loop = {"custom_generate": lambda *arguments, **named: pytest.fail("refused before")}
        refused = (({"num_beams": 2}, "beam search"), ({"use_cache": False}, "use_cache=False"))
        for options, reason in (*refused, (own_loop, "custom_generate=")):
            with pytest.raises(UsageError, match=f"cannot be drafted for, because of {reason}; leave that out"):
                model.generate(IDS, **{**GREEDY, **options}, max_new_tokens=3)
        with pytest.raises(UsageError, match="because of a batch of 2 sequences; leave that out, or open"):
            model.generate(both, attention_mask=torch.ones_like(both), max_new_tokens=3)
    with tiercache.offload(store, **given, drafter="auto") as model:
        model.generate(IDS, **GREEDY, num_beams=2, max_new_tokens=3)
        model.generate(both, attention_mask=torch.ones_like(both), do_sample=False, max_new_tokens=3)
        reasons = {"beam search": 1, "a batch of 2 sequences": 1}
        assert model.tiercache.stats().drafting.plain_reasons == reasons
    monkeypatch.setattr(tf.LlamaForCausalLM, "_is_stateful", True)
    with pytest.raises(UnsupportedModelError, match=f"drafter='{drafter}' cannot draft for this model, for the state"):
        tiercache.offload(store, **given, drafter=drafter).__enter__()
    capsys.readouterr()
    with tiercache.offload(store, **given, drafter="auto", show_progress=True) as model:
        assert "decoding without drafting, for the state of LlamaForCausalLM" in capsys.readouterr().err
        assert len(_write(model)) == IDS.shape[1] + 24
        (reason,) = model.tiercache.stats().drafting.plain_reasons.items()
        assert reason == ("the state of LlamaForCausalLM is not known to take several tokens in a pass", 1)
