"""What is emitted with a drafter is, token for token, what plain decoding emits: every drafter, grower and budget."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import architectures
import pytest
import torch
import transformers as tf

from policies.drafting import RoundPlan
from tiercache.decode.generate import DraftingGenerate, DraftingLimits
from tiercache.decode.scheduler import DrafterScheduler
from tiercache.decode.verify import TargetWalk
from tiercache.draft.base import Drafter, TreeBudget
from tiercache.draft.grow import grower
from tiercache.draft.lm import LmDrafter, frequent
from tiercache.draft.noise import GumbelNoise
from tiercache.draft.tree import DraftTree, chain
from tiercache.stats.drafting import DraftStats

pytestmark = pytest.mark.usefixtures("one_thread")
NODES = (0, 1, 2, 7, 64, 512)
PROMPT = [5, 17, 99, 5, 17, 3, 120, 5]
NEW = 24


class Wrong(Drafter):
    """Always the padding."""

    def propose(self, budget: TreeBudget) -> DraftTree:
        return chain([0] * min(budget.nodes, budget.depth))


class Oracle(Drafter):
    """Knows what comes."""

    def __init__(self, text: Sequence[int]) -> None:
        self._text = list(text)

    def propose(self, budget: TreeBudget) -> DraftTree:
        at = len(self.context.tokens)
        return chain(self._text[at : at + min(budget.nodes, budget.depth)])


class Twins(Oracle):
    """Knows what comes, and says everything twice."""

    def propose(self, budget: TreeBudget) -> DraftTree:
        path = super().propose(budget).tokens
        tokens: list[int] = []
        parents: list[int] = []
        for depth, token in enumerate(path):
            tokens += [token, token]
            parents += [2 * depth - 2 if depth else -1] * 2
        return DraftTree(tuple(tokens[: budget.nodes]), tuple(parents[: budget.nodes]))


class Ends(Drafter):
    """Always the end of the text, and something after it."""

    def propose(self, budget: TreeBudget) -> DraftTree:
        return chain([2, 2, 7, 2][: min(budget.nodes, budget.depth)])


class Foreign(Drafter):
    """Tokens outside of the vocabulary, and more nodes than were asked for."""

    def propose(self, budget: TreeBudget) -> DraftTree:
        return DraftTree((-1, 131, 10**9, 5, 5, 7) * 100, (-1,) * 600)


@contextmanager
def drafting(
    model: Any, drafters: Sequence[Drafter], nodes: int, depth: int = 16, width: int = 4, *, show: bool = False
) -> Iterator[DraftStats]:
    """The model's `generate` drafts with the first drafter, at this budget."""
    stats = DraftStats()
    fixed = RoundPlan(0 if nodes else None, nodes, depth, width, 0.0, 0.0)
    scheduler = DrafterScheduler(drafters, None, fixed, most_nodes=512, context=4096, stats=stats)
    hook = DraftingGenerate(model, scheduler, TargetWalk, DraftingLimits(4097, 513), show=show)
    try:
        yield stats
    finally:
        hook.close()
        scheduler.close()


def plain(model: Any, seed: int | None, new: int = NEW, temperature: float = 0.8) -> list[int]:
    """The slow oracle: one whole pass without a cache for every token."""
    noise = None
    if seed is not None:
        torch.manual_seed(seed)
        noise = GumbelNoise(int(torch.randint(1 << 62, ())), model.config.vocab_size)
    tokens = list(PROMPT)
    with torch.no_grad():
        for _ in range(new):
            scores = model(torch.tensor([tokens])).logits[0, -1].float()
            if noise is not None:
                scores = scores / temperature + noise(len(tokens))
            tokens.append(int(scores.argmax()))
            if tokens[-1] == model.config.eos_token_id:
                break
    return tokens


def generate(model: Any, seed: int | None, new: int = NEW, **options: Any) -> list[int]:
    ids = torch.tensor([PROMPT])
    if seed is not None:
        torch.manual_seed(seed)
        options |= {"do_sample": True, "temperature": 0.8, "top_k": 0, "top_p": 1.0}
    found = model.generate(ids, max_new_tokens=new, attention_mask=torch.ones_like(ids), **options)
    return found[0].tolist()


@pytest.fixture(scope="module")
def model() -> tf.PreTrainedModel:
    return architectures.build("llama")


@pytest.fixture(scope="module")
def texts(model: tf.PreTrainedModel) -> Callable[[int | None], list[int]]:
    """What plain decoding writes, by seed; greedy for None."""
    made: dict[int | None, list[int]] = {}

    def get(seed: int | None) -> list[int]:
        if seed not in made:
            made[seed] = plain(model, seed)
        return made[seed]

    return get


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("kind", [Wrong, Oracle, Twins, Ends, Foreign])
def test_adversaries_change_nothing(kind: Any, nodes: int, seed: int | None, model: Any, texts: Any) -> None:
    text = texts(seed)
    drafter = kind(text) if issubclass(kind, Oracle) else kind()
    with drafting(model, [drafter], nodes) as stats:
        assert generate(model, seed) == text
    assert stats.tokens == len(text) - len(PROMPT) - 1  # the first is the prompt's pass'
    if kind is Oracle and nodes > 1:
        assert stats.rounds < stats.tokens


def test_plain_decoding_is_transformers_own(model: Any, texts: Any) -> None:
    assert generate(model, None) == texts(None)
    assert type(model).__name__ == "LlamaForCausalLM"


GROWERS = ("best-first", "fixed-width", "rsd-c", "rsd-s", "sequoia")


@pytest.fixture(scope="module")
def near(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    """A drafter that is often right: the target with noise on its weights."""
    other = architectures.build("llama")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02 * parameter.std())
    return other


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("nodes", NODES)
@pytest.mark.parametrize("name", GROWERS)
def test_growers_change_nothing(name: str, nodes: int, seed: int | None, model: Any, near: Any, texts: Any) -> None:
    drafter = LmDrafter(near, grower(name))
    with drafting(model, [drafter], nodes) as stats:
        assert generate(model, seed) == texts(seed)
    assert stats.nodes <= nodes * stats.rounds
    if nodes >= 64:
        assert stats.tokens_per_pass > (1.5 if not name.startswith("rsd") else 1.0)


def test_a_trimmed_vocabulary_changes_nothing(model: Any, near: Any, texts: Any) -> None:
    head = near.get_output_embeddings()
    drafter = LmDrafter(near, grower("best-first"), vocabulary=frequent(texts(3) + texts(None), 40))
    with drafting(model, [drafter], 16) as stats:
        for seed in (None, 3):
            assert generate(model, seed) == texts(seed)
        assert near.get_output_embeddings().out_features == 40 - max(0, 40 - len(set(texts(3) + texts(None))))
    assert near.get_output_embeddings() is head
    assert stats.tokens_per_pass > 1.3
