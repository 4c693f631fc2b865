"""One pass over a tree gives at each node what a causal pass on that node's path gives, before and after commits."""

import random
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from architectures import CONFIGS, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

import tiercache
from tiercache.compat import cache_kwargs
from tiercache.errors import ContextExceededError, DraftError, UnsupportedModelError, UsageError
from tiercache.kv import tree_pass
from tiercache.kv.cache import TreeCache, TreeLayer, support
from tiercache.kv.tree_pass import TreeRun

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = 1e-9
SMALL = {"vocab_size": 131, "hidden_size": 56, "num_hidden_layers": 3, "bos_token_id": 1, "eos_token_id": 2}
SMALL_ATTENTION = {"intermediate_size": 104, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module", autouse=True)
def whole_softmax() -> Iterator[None]:
    """Eager attention takes its softmax in fp32 whatever the model's dtype, which would hide errors below 1e-6."""
    with pytest.MonkeyPatch.context() as patch:
        narrow = functional.softmax
        patch.setattr(functional, "softmax", lambda x, dim=None, dtype=None, **_: narrow(x, dim=dim))
        yield


@cache
def architecture(name: str, attention: str = "sdpa") -> tf.PreTrainedModel:
    model = build(name, torch.float64)
    if attention == "eager":
        weights = model.state_dict()
        model = tf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float64, attn_implementation="eager")
        model.load_state_dict(weights)
    return model.eval()


def other(config: tf.PretrainedConfig) -> tf.PreTrainedModel:
    torch.manual_seed(3)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def some(chance: random.Random, count: int) -> list[int]:
    return [chance.randrange(3, 131) for _ in range(count)]


def bush(chance: random.Random, nodes: int) -> list[int]:
    """Parents of a random tree; new nodes like to hang on to young ones, so that it is deep as well."""
    return [chance.choice((chance.randrange(-1, n), max(n - 3, -1), n - 1)) for n in range(nodes)]


def path_to(parents: Sequence[int], node: int) -> list[int]:
    path = []
    while node != -1:
        path.append(node)
        node = parents[node]
    return path[::-1]


def plain(model: tf.PreTrainedModel, text: Sequence[int]) -> torch.Tensor:
    """Logits of a causal pass without cache, mask or padding: [length, vocabulary]."""
    with torch.no_grad():
        return model(input_ids=torch.tensor([text]), use_cache=False).logits[0]


def by_paths(
    model: tf.PreTrainedModel, text: Sequence[int], tokens: Sequence[int], parents: Sequence[int]
) -> torch.Tensor:
    """The oracle: one causal pass for each leaf."""
    found: dict[int, torch.Tensor] = {}
    for leaf in set(range(len(tokens))) - set(parents):
        path = path_to(parents, leaf)
        logits = plain(model, [*text, *(tokens[node] for node in path)])
        found.update(zip(path, logits[len(text) :], strict=True))
    return torch.stack([found[node] for node in range(len(tokens))])


def in_parts(run: TreeRun, tokens: Sequence[int], parents: Sequence[int], cuts: Sequence[int]) -> torch.Tensor:
    """A tree as a drafter grows it: some nodes a pass."""
    edges = sorted({0, len(tokens), *(cut for cut in cuts if cut < len(tokens))})
    parts = [run.run(tokens[a:b], parents[a:b]) for a, b in pairwise(edges)]
    return torch.cat(parts)


def begun(model: tf.PreTrainedModel, text: Sequence[int], padding: int = 0, **options: Any) -> TreeRun:
    """A run with `text` committed in two pieces, whose logits are checked too."""
    mask = torch.tensor([0] * padding + [1] * len(text)) if padding else None
    run = TreeRun(model, mask, **options)
    ids = torch.tensor([0] * padding + list(text))
    run.prefill(ids[:6])
    torch.testing.assert_close(run.prefill(ids[6:], 4), plain(model, text)[-4:], rtol=0, atol=EXACT)
    assert run.length == padding + len(text)
    return run


def worst(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max())


SHAPES: tuple[tuple[Callable[[random.Random, int], list[int]], int, tuple[int, ...]], ...] = (
    (bush, 60, ()),
    (lambda _, nodes: list(range(-1, nodes - 1)), 9, ()),
    (lambda _, nodes: [-1] * nodes, 7, ()),
    (bush, 24, (1, 4, 5, 13)),
    (bush, 1, ()),
    (lambda _, nodes: list(range(-1, nodes - 1)), 4, (1, 2, 3)),
)


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, attention)
        for name in CONFIGS
        for attention in ("sdpa", "eager")
        if (name, attention) != ("gemma2", "sdpa")
    ],
)
def test_every_node_is_a_causal_pass_on_its_path(name: str, attention: str, padding: int) -> None:
    model = architecture(name, attention)
    assert model.config._attn_implementation == attention
    chance = random.Random(f"{name} {padding}")
    text = some(chance, 19)  # three windows of the models that have one
    run = begun(model, text, padding)
    assert run.supports_tree
    for shape, nodes, cuts in SHAPES:
        tokens, parents = some(chance, nodes), shape(chance, nodes)
        got = in_parts(run, tokens, parents, cuts)
        assert worst(got, by_paths(model, text, tokens, parents)) < EXACT, (shape, nodes)
        path = path_to(parents, chance.randrange(nodes))
        run.commit(path)
        text += [tokens[node] for node in path]
        assert run.length == padding + len(text)


@st.composite
def trees(draw: st.DrawFn) -> tuple[list[int], list[int], list[int]]:
    nodes = draw(st.integers(1, 20))
    parents = [draw(st.integers(-1, node - 1)) for node in range(nodes)]
    return (
        draw(st.lists(st.integers(3, 130), min_size=nodes, max_size=nodes)),
        parents,
        draw(st.lists(st.integers(1, 19))),
    )


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@given(tree=trees(), data=st.data())
@settings(max_examples=12)
def test_any_tree_in_any_parts(name: str, tree: tuple[list[int], list[int], list[int]], data: st.DataObject) -> None:
    tokens, parents, cuts = tree
    model, text = architecture(name), [5, 9, 11, 3, 9, 7, 8, 10, 4, 22, 60]
    run = begun(model, text)
    want = by_paths(model, text, tokens, parents)
    assert worst(in_parts(run, tokens, parents, cuts), want) < EXACT
    run.drop()
    assert worst(run.run(tokens, parents), want) < EXACT, "again, after all was dropped"
    path = path_to(parents, data.draw(st.integers(-1, len(tokens) - 1)))
    run.commit(path)
    text = [*text, *(tokens[node] for node in path)]
    assert worst(run.run(tokens, parents), by_paths(model, text, tokens, parents)) < EXACT


def _all_ancestors(run: TreeRun, patch: pytest.MonkeyPatch) -> None:
    real = run._masks.tree
    patch.setattr(run._masks, "tree", lambda lines, *rest: real([(1 << n + 1) - 1 for n in range(len(lines))], *rest))


def _window_by_slot(run: TreeRun, patch: pytest.MonkeyPatch) -> None:
    real = run._masks._near
    patch.setattr(run._masks, "_near", lambda seen, depths, *rest: real(seen, range(len(depths)), *rest))


def _no_window(run: TreeRun, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run._masks, "_near", lambda seen, *_: seen)


def _positions_by_slot(run: TreeRun, patch: pytest.MonkeyPatch) -> None:
    real = run._forward
    patch.setattr(run, "_forward", lambda ids, places, *rest: real(ids, places[:, :1] + torch.arange(9), *rest))


def _one_too_far(run: TreeRun, patch: pytest.MonkeyPatch) -> None:
    real = run._forward
    patch.setattr(run, "_forward", lambda ids, places, *rest: real(ids, places + 1, *rest))


def _padding_seen(run: TreeRun, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run._masks, "_hidden", None)


def _nothing_gathered(run: TreeRun, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(run._cache, "keep", lambda start, slots: run._cache.truncate(start + len(slots)))


@pytest.mark.parametrize(
    "wrong",
    [_all_ancestors, _window_by_slot, _no_window, _positions_by_slot, _one_too_far, _padding_seen, _nothing_gathered],
)
def test_errors_of_mask_position_and_gathering_are_seen(
    wrong: Callable[[TreeRun, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = architecture("gemma3")
    text, tokens, parents = some(random.Random(5), 12), some(random.Random(6), 9), [-1, -1, 0, 1, 2, 3, 4, 5, 6]
    run = begun(model, text, padding=3)
    wrong(run, monkeypatch)
    errors = [worst(run.run(tokens, parents), by_paths(model, text, tokens, parents))]
    run.commit([1, 3])
    text += [tokens[1], tokens[3]]
    errors.append(worst(run.run(tokens, parents), by_paths(model, text, tokens, parents)))
    assert max(errors) > 1e-4


def test_what_the_model_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given_masks = architecture("mistral"), []
    run = TreeRun(model)
    real = run._forward
    monkeypatch.setattr(
        run, "_forward", lambda ids, places, mask, *rest: (given_masks.append(mask), real(ids, places, mask, *rest))[1]
    )
    run.prefill(torch.tensor([3, 4]))
    run.run([5], [-1])
    run.run([6], [0])
    assert given_masks == [None, None, None], "a plain step goes by the model's own fast path"
    run.run([7, 8], [1, 0])
    assert given_masks[-1].shape == (1, 1, 2, 6)
    assert given_masks[-1].dtype == torch.bool
    run.commit([0, 1, 2])
    run.run([9], [-1])
    assert given_masks[-1] is None
    run.run([9], [0])
    assert given_masks[-1].sum() == 6, "seven tokens, of which the window holds six"


def test_an_offloaded_model(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("gemma2")
    resident = tf.AutoModelForCausalLM.from_pretrained(folder).eval()
    chance = random.Random(2)
    text, tokens, parents = torch.tensor(some(chance, 11)), some(chance, 14), bush(chance, 14)
    with tiercache.offload(folder, dram="64MiB", context=64) as model:
        outcomes = []
        for each in (resident, model):
            run = TreeRun(each, capacity=64)
            outcome = [run.prefill(text), in_parts(run, tokens, parents, (3, 8))]
            run.commit(path_to(parents, 13))
            outcomes.append(torch.cat([*outcome, run.run(tokens, parents)]))
        assert torch.equal(*outcomes)
        with pytest.raises(ContextExceededError):
            run.run(tokens * 4, range(-1, 55))
        run.drop()
        assert torch.equal(run.run(tokens, parents), outcomes[1][-14:])


def test_the_cache_writes_in_place_and_only_the_tail() -> None:
    layers, heads, width = 2, 3, 4
    kept = TreeCache(capacity=32)
    numbers = torch.randn(layers, 2, 1, heads, 20, width)
    for layer in range(layers):
        for a, b in ((0, 7), (7, 8), (8, 20)):
            keys, values = kept.update(*numbers[layer, ..., a:b, :], layer)
            assert torch.equal(keys, numbers[layer, 0, ..., :b, :])
            assert torch.equal(values, numbers[layer, 1, ..., :b, :])
            assert keys.data_ptr() == kept.layers[layer].keys.data_ptr()
    assert kept.get_mask_sizes(5, 1) == (25, 0)
    assert kept.get_seq_length() == 20
    versions = [layer.keys._version for layer in kept.layers]
    kept.keep(8, [0, 1, 2])
    assert [layer.keys._version for layer in kept.layers] == versions, "what lies right is not written"
    kept.truncate(10)
    for layer in range(layers):
        kept.update(*numbers[layer, ..., 10:, :], layer)
        kept.layers[layer].keys[:, :, :9] = 7.0  # as if these had been written elsewhere
    kept.keep(8, [0, 4, 5, 11])
    for layer in range(layers):
        want = numbers[layer, 0, ..., [9, 12, 13, 19][1:], :]
        assert torch.equal(kept.layers[layer].keys[:, :, 9:12], want)
        assert torch.equal(kept.layers[layer].values[:, :, 9:12], numbers[layer, 1, ..., [12, 13, 19], :])
        assert bool((kept.layers[layer].keys[:, :, :9] == 7.0).all())
    assert kept.get_seq_length(1) == 12


def test_the_cache_grows_or_refuses() -> None:
    layer, numbers = TreeLayer(), torch.randn(1, 2, 400, 4)
    sizes = set()
    for place in range(400):
        keys, _ = layer.update(numbers[:, :, place : place + 1], numbers[:, :, place : place + 1])
        sizes.add(layer.keys.shape[2])
    assert torch.equal(keys, numbers)
    assert len(sizes) < 7
    bounded = TreeCache(capacity=8)
    bounded.update(numbers[:, :, :8], numbers[:, :, :8], 0)
    with pytest.raises(ContextExceededError, match=r"needs 9 slots .* made for 8.* capacity=9"):
        bounded.update(numbers[:, :, :1], numbers[:, :, :1], 0)
    assert bounded.get_seq_length() == 8
    with pytest.raises(UsageError, match="not of 2"):
        TreeCache().update(numbers.view(2, 1, 400, 4), numbers.view(2, 1, 400, 4), 0)


def test_the_cache_without_data() -> None:
    """As the trace of a model's memory needs it."""
    model = architecture("gemma3")
    there = tf.AutoModelForCausalLM.from_config(model.config, dtype=torch.float64).to("meta")
    kept = TreeCache(capacity=40)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool, device="meta")
    masks = {"full_attention": mask, "sliding_attention": mask}
    there(
        input_ids=torch.zeros(1, 5, dtype=torch.long, device="meta"), attention_mask=masks, **cache_kwargs(there, kept)
    )
    kept.keep(2, [0, 2])
    assert [tuple(layer.keys.shape) for layer in kept.layers] == [(1, 2, 40, 16)] * 3
    assert kept.get_seq_length() == 4


def test_refusals_and_failed_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = architecture("llama"), some(random.Random(1), 10)
    run = begun(model, text)
    with pytest.raises(DraftError, match="2 tokens came with 1 parents"):
        run.run([3, 4], [-1])
    with pytest.raises(DraftError, match="node 1 has parent 1"):
        run.run([3, 4], [-1, 1])
    run.run([3, 4, 5], [-1, 0, -1])
    for path in ([0, 2], [1], [0, 0], [3], [-1]):
        with pytest.raises(DraftError, match="is no path of the 3 open nodes"):
            run.commit(path)
    with pytest.raises(DraftError, match="3 nodes are open"):
        run.prefill(torch.tensor([3]))

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run.run([6, 7], [1, 2])
    hook.remove()
    want = by_paths(model, text, [3, 4, 5, 6, 7], [-1, 0, -1, 1, 2])
    assert worst(run.run([6, 7], [1, 2]), want[3:]) < EXACT
    with pytest.raises(UsageError, match="not that of one sequence"):
        TreeRun(model, torch.ones(2, 4))


RECURRENT: dict[str, tuple[tf.PretrainedConfig, float]] = {
    "lfm2": (tf.Lfm2Config(**SMALL, **SMALL_ATTENTION, layer_types=["conv", "full_attention", "conv"]), EXACT),
    "mamba2": (  # some of its own sums are in fp32
        tf.Mamba2Config(**SMALL, pad_token_id=0, state_size=8, num_heads=14, head_dim=8, n_groups=2, chunk_size=16),
        1e-5,
    ),
}


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize("name", RECURRENT)
def test_chains_of_a_recurrent_model(name: str, padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config, close = RECURRENT[name]
    model = other(config)
    if not support(model).recurrent:
        pytest.skip("this version of transformers cannot go on from a state by several tokens")
    monkeypatch.setattr(tree_pass, "_REPLAYED", 9)
    chance, passes = random.Random(4), []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    text = some(chance, 12)
    run = TreeRun(model, torch.tensor([[0] * padding + [1] * 12]))
    ids = torch.tensor([0] * padding + text)
    run.prefill(ids[:8])
    run.prefill(ids[8:])
    assert not run.supports_tree
    with pytest.raises(DraftError, match="takes chains alone"):
        run.run([3, 4], [-1, -1])
    replays = 0
    for accepted, nodes in ((0, 3), (2, 3), (4, 4), (1, 5), (3, 4), (-1, 2), (2, 6), (1, 3), (3, 5), (1, 1), (1, 2)):
        tokens, parents = some(chance, nodes), list(range(-1, nodes - 1))
        before = len(passes)
        cuts = chance.sample(range(1, 6), 2)
        want = by_paths(model, text, tokens, parents)
        assert worst(run.run(tokens, parents), want) < close
        run.drop()
        assert worst(in_parts(run, tokens, parents, cuts), want) < close
        parts = 2 + sum(cut < nodes for cut in cuts)
        if accepted < 0:
            run.drop()
        else:
            run.commit(range(accepted))
            text += tokens[:accepted]
        replays += len(passes) - before - parts - 1  # the oracle's one
        assert run.length == padding + len(text)
    assert replays == 1, "ten tokens were pending once, and got a pass of their own"
    named = cache_kwargs(model, run.cache)  # with the token that is pending
    if name == "lfm2":
        shown = torch.tensor([[0] * padding + [1] * len(text) + [1]])
        named |= {"attention_mask": shown, "position_ids": torch.tensor([[len(text)]])}
    with torch.no_grad():
        more = model(input_ids=torch.tensor([[7]]), **named).logits[0]
    assert worst(more, plain(model, [*text, 7])[-1:]) < close


def test_what_models_take() -> None:
    assert [support(architecture(name)).takes for name in CONFIGS] == ["trees"] * len(CONFIGS)
    small = {"vocab_size": 131, "hidden_size": 56}
    bias = other(tf.BloomConfig(**small, n_layer=2, n_head=4))
    falcon = other(tf.FalconConfig(**small, num_hidden_layers=2, num_attention_heads=4, alibi=True))
    for model in (bias, falcon):
        assert support(model).takes == "chains"
        assert "slots" in support(model).reason
        text = some(random.Random(1), 10)
        run = begun(model, text)
        with pytest.raises(DraftError, match="positions are the slots"):
            run.run([3, 4, 5], [-1, 0, 0])
        for accepted in (2, 0, 5):
            tokens = some(random.Random(accepted), 5)
            want = by_paths(model, text, tokens, range(-1, 4))
            assert worst(in_parts(run, tokens, range(-1, 4), (2,)), want) < 1e-8
            run.commit(range(accepted))
            text += tokens[:accepted]
    unproven = other(tf.MambaConfig(**SMALL, pad_token_id=0, state_size=4))
    with pytest.raises(UnsupportedModelError, match=r"not known to take several tokens.*without a drafter"):
        TreeRun(unproven)
    flash = architecture("qwen2").config
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "_attn_implementation_internal", "flash_attention_2")
        assert "load it with sdpa" in support(architecture("qwen2")).reason
