"""SpecKV: of a prompt's keys and values those that matter stay, as slow oracles with whole attention find them."""

import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch.nn.functional import max_pool1d, pad

import tiercache
from tiercache.compat import cache_out
from tiercache.errors import DraftError, UnsupportedModelError, UsageError
from tiercache.kv.speckv import AHEAD, WINDOW, Observed, observing, scratch_bytes
from tiercache.kv.tree_pass import TreeRun
from tiercache.stats.run import Stats

PICO = Path(__file__).parents[1] / "examples" / "pico" / "checkpoint"
PROMPT, KEEP, RECENT = 90, 40, 8


def llama(layers: int, attention: str = "sdpa") -> tf.LlamaForCausalLM:
    torch.manual_seed(3)
    config = tf.LlamaConfig(
        vocab_size=131,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # attention that differs
        attn_implementation=attention,
    )
    return tf.LlamaForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 131, (PROMPT + 3,), generator=torch.Generator().manual_seed(1))


def best(weights: torch.Tensor, count: int) -> torch.Tensor:
    """The slots to keep, from attention [heads, queries, slots] of the newest tokens and those ahead."""
    prefix = weights[:, :, : PROMPT - RECENT].unflatten(0, (2, 2)).mean((1, 2))
    near = max_pool1d(pad(prefix, (3, 3)), 7, 1)
    return near.topk(count, -1).indices.sort(-1).values


def oracle(ids: torch.Tensor, layers: int) -> list[torch.Tensor]:
    with torch.no_grad():
        seen = llama(layers, "eager")(ids[None], output_attentions=True).attentions
    return [best(part[0, :, PROMPT - RECENT :], KEEP - RECENT) for part in seen]


def test_what_is_looked_at_most_is_kept(ids: torch.Tensor) -> None:
    model, wanted = llama(3), oracle(ids, 3)
    with observing(model, PROMPT - RECENT) as seen, torch.no_grad():
        run = TreeRun(model)
        run.prefill(ids[: PROMPT - RECENT])
        run.prefill(ids[PROMPT - RECENT :])
    assert model.config._attn_implementation == "sdpa"
    for layer, slots in enumerate(wanted):
        assert torch.equal(seen.take(layer, KEEP - RECENT), slots)


def test_trees_below_a_thinned_cache_see_what_was_kept(ids: torch.Tensor) -> None:
    """Against the whole sequence in one pass, with a mask for each head; of one layer, for the next has other slots."""
    model, slots = llama(1), oracle(ids, 1)[0]
    run = TreeRun(model)
    run.prefill(ids[:PROMPT])
    run.evict(ids[PROMPT - RECENT : PROMPT], ids[PROMPT:].tolist(), KEEP)
    assert run.length == KEEP == run.cache.get_seq_length()
    tree = run.run([5, 6, 7], [-1, 0, 0])
    run.commit([0, 2])
    after = run.run([9], [-1])
    length = PROMPT + 3
    shown = torch.ones(4, length, length, dtype=torch.bool).tril()
    shown[:, PROMPT:, : PROMPT - RECENT] = False
    for head in range(4):
        shown[head, PROMPT:, slots[head // 2]] = True
    for path, place, found in (([5, 6, 9], 1, tree[1]), ([5, 7, 9], 1, tree[2]), ([5, 7, 9], 2, after[0])):
        whole = torch.cat((ids[:PROMPT], torch.tensor(path)))[None]
        with torch.no_grad():
            logits = model(whole, attention_mask=shown[None]).logits[0]
        torch.testing.assert_close(found, logits[PROMPT + place], rtol=1e-9, atol=1e-9)


def test_a_short_sequence_stays_whole(ids: torch.Tensor) -> None:
    model = llama(2)
    runs = [TreeRun(model), TreeRun(model)]
    for run in runs:
        run.prefill(ids[:PROMPT])
    runs[0].evict(ids[PROMPT - RECENT : PROMPT], [1], PROMPT)
    assert torch.equal(runs[0].run([5, 6], [-1, -1]), runs[1].run([5, 6], [-1, -1]))


def test_what_cannot_be_thinned_out_is_refused(ids: torch.Tensor) -> None:
    run = TreeRun(llama(1))
    run.prefill(ids)
    with pytest.raises(DraftError, match="8 newest tokens, 8 to keep"):
        run.evict(ids[-8:], [], 8)
    run.run([3], [-1])
    with pytest.raises(DraftError, match="1 open nodes"):
        run.evict(ids[-8:], [], 40)
    padded = TreeRun(llama(1), torch.tensor([0, 0, *[1] * (PROMPT + 1)]))
    padded.prefill(ids)
    with pytest.raises(UsageError, match="padded"):
        padded.evict(ids[-8:], [], 40)
    tiny = {"vocab_size": 131, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    for other in (
        llama(1, "eager"),
        tf.MistralForCausalLM(tf.MistralConfig(**tiny, num_key_value_heads=2, sliding_window=16)),
        tf.FalconForCausalLM(tf.FalconConfig(**tiny, alibi=False)),
    ):
        run = TreeRun(other)
        run.prefill(ids)
        with pytest.raises(UnsupportedModelError, match="speckv= keeps a part"):
            run.evict(ids[-8:], [], 40)


@pytest.fixture(autouse=True)
def _store(pico_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models come from the store that all tests share: making one takes a minute."""
    monkeypatch.setattr(sys.modules[__name__], "PICO", pico_store)


def write(prompt: torch.Tensor, **options: object) -> tuple[list[int], Stats]:
    with tiercache.offload(PICO, dram="1GiB", precision="int8", context=300, show_progress=False, **options) as model:
        mask = (prompt != 0).long()
        text = model.generate(
            prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        return text[0].tolist(), model.tiercache.stats()


@pytest.fixture(scope="module")
def prompt() -> torch.Tensor:
    return torch.randint(300, 2000, (1, 150), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def evicted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Of each sequence that was evicted: tokens before, drafted ones behind the root, and tokens kept."""
    seen: list[tuple[int, int, int]] = []
    evict = TreeRun.evict

    def spy(run: TreeRun, recent: torch.Tensor, ahead: list[int], keep: int) -> None:
        before = run.length
        evict(run, recent, ahead, keep)
        seen.append((before, len(ahead) - 1, run.length))

    monkeypatch.setattr(TreeRun, "evict", spy)
    return seen


@pytest.mark.parametrize("drafter", ["resident", "auto"])
def test_an_offloaded_model_keeps_a_part_of_the_prompt_and_says_so(
    drafter: str, prompt: torch.Tensor, evicted: list[tuple[int, int, int]]
) -> None:
    _, stats = write(prompt, drafter=drafter, speckv=64, lossless=False)
    [(before, ahead, after)] = evicted
    assert (before, after) == (150, 64)
    assert 1 <= ahead <= 11, "a chain, within the room"
    assert (stats.lossy, stats.drafting.lossy, stats.drafting.plain_calls) == (True, "speckv=64", 0)


def test_a_prompt_that_is_short_enough_stays_whole(prompt: torch.Tensor, evicted: list[tuple[int, int, int]]) -> None:
    plain, _ = write(prompt)
    whole, stats = write(prompt, drafter="resident", speckv=150, lossless=False)
    assert stats.drafting.rounds > 0
    assert (whole, evicted) == (plain, [])


def test_every_call_evicts_its_own_prompt(prompt: torch.Tensor, evicted: list[tuple[int, int, int]]) -> None:
    options = {"dram": "1GiB", "precision": "int8", "context": 300, "show_progress": False, "draft_depth": 3}
    with tiercache.offload(PICO, **options, drafter="resident", speckv=64, lossless=False) as model:
        given = {"attention_mask": torch.ones_like(prompt), "eos_token_id": None, "pad_token_id": 0}
        for tokens, sampled, piece in ((1, False, None), (2, False, None), (9, True, 40), (9, False, None)):
            out = model.generate(
                prompt,
                **given,
                max_new_tokens=tokens,
                do_sample=sampled,
                prefill_chunk_size=piece,
                return_dict_in_generate=True,
            )
            assert out.sequences.shape == (1, 150 + tokens)
            assert (cache_out(out) is None) == (tokens > 1), "what nobody could continue stays here"
    assert [ahead for _, ahead, _ in evicted] == [0, 3, 3], "not after a single token; within room and depth"


def test_a_padded_prompt_is_decoded_plainly(prompt: torch.Tensor) -> None:
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), prompt), dim=1)
    text, stats = write(padded, drafter="auto", speckv=64, lossless=False)
    assert stats.drafting.plain_reasons == {"a padded prompt with speckv=": 1}
    with pytest.raises(UsageError, match="a padded prompt with speckv="):
        write(padded, drafter="ngram", speckv=64, lossless=False)
    assert text == write(padded)[0]
    assert write(padded, drafter="ngram", speckv=153, lossless=False)[1].drafting.plain_calls == 0, "it stays whole"


def test_a_model_whose_cache_cannot_be_thinned_out_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = tf.MistralConfig(
        vocab_size=131, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=16,
    )  # fmt: skip
    tf.MistralForCausalLM(config).save_pretrained(tmp_path)
    with (
        pytest.raises(UsageError, match="not all layers attend to everything; leave it out"),
        tiercache.offload(tmp_path, dram="64MiB", drafter="ngram", speckv=64, lossless=False),
    ):
        pass


def test_looking_is_reserved_for() -> None:
    """Measured: the most that tensors take beside keys and queries."""
    config = llama(2).config
    options = {"dram": "1GiB", "precision": "int8", "context": 300, "drafter": "ngram", "show_progress": False}
    reserved = []
    for lossy in ({}, {"speckv": 64, "lossless": False}):
        with tiercache.offload(PICO, **options, **lossy) as offloaded:
            reserved.append(offloaded.tiercache.plan.dram.reserved_bytes.get("looking at the prompt", 0))
            assert reserved[-1] == (scratch_bytes(offloaded.config, 300) if lossy else 0)
    looked = Observed(4000 - WINDOW)
    query, key = torch.randn(1, 4, WINDOW + 1 + AHEAD, 16), torch.randn(1, 2, 4000 + 1 + AHEAD, 16)
    with torch.profiler.profile(profile_memory=True) as profile:
        for layer in range(2):
            looked.add(layer, query, key, 0.25)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    assert 3 * 4 * 2 * query.shape[2] * 4000 / 2 < peak <= scratch_bytes(config, 4000 + 1 + AHEAD)
