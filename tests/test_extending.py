"""The examples of docs/extending.md, entered where the page says and held against slow oracles."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import documented
import numpy as np
import pytest
import torch

import tiercache
from policies import eviction
from policies.neurons import NeuronResidency

PAGE = "docs/extending.md"
STORE: dict[str, Any] = {"precision": "int8", "context": 64, "logits": 16, "kernels": "fast"}


def example(start: str) -> Any:
    """The one class of a block of the page."""
    text = documented.python(PAGE, start).partition("\nwith ")[0]
    assert len([line for line in text.splitlines() if line.strip()]) <= 30, "short enough to be read"
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile(text, PAGE, "exec"), names)
    (found,) = [each for each in names.values() if isinstance(each, type) and each.__module__ == "page"]
    return found


def test_the_policy_is_first_in_first_out(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = MappingProxyType({"fifo": example("class Fifo"), **eviction.POLICIES})
    monkeypatch.setattr(eviction, "POLICIES", registry)
    chance = np.random.default_rng(0)
    residency = NeuronResidency(12, 5, eviction.make("fifo"))
    here: OrderedDict[int, None] = OrderedDict()
    for _ in range(200):
        wanted = chance.permutation(12)[: chance.integers(0, 6)]
        step = residency.step(wanted)
        missing = [neuron for neuron in wanted.tolist() if neuron not in here]
        assert step.hits.size == len(wanted) - len(missing)
        for neuron in [each for each in here if each not in wanted][: max(0, len(here) + len(missing) - 5)]:
            del here[neuron]
        here.update(dict.fromkeys(missing))


@pytest.mark.usefixtures("one_thread")
def test_the_drafter_changes_no_token(plane_store: Callable[..., Path]) -> None:
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    options = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    with tiercache.offload(plane_store("llama"), **STORE) as plain:
        expected = plain.generate(ids, **options)
    drafter = example("class Bigram")()
    with tiercache.offload(plane_store("llama"), **STORE, drafter=drafter, draft_fixed=True, draft_nodes=8) as model:
        assert model.generate(ids, **options).tolist() == expected.tolist()
        drafting = model.tiercache.stats().drafting
    assert drafting.drafters == ("bigram",)
    assert drafting.nodes > 0
