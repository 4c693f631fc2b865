"""What a round of drafting costs beside the passes of a model: microseconds by part.

    python -m benchmarks.round_cost

The text is this repository's own source, word by word, and what the target says of it is made up: its next word, and
random numbers for the rest. A small random model takes the place of the target's layers, so that its KV cache is a
real one; its passes, and the making of logits, are left out. Prints tables and one line of JSON.
"""

import argparse
import json
import os
import platform
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from policies import budgeter
from policies.acceptance import RANKS, trials
from policies.budgeter import Budgeter
from policies.drafting import DrafterProfile, RoundPlan
from tiercache.decode import verify
from tiercache.decode.loop import DecodeLoop
from tiercache.decode.request import Request
from tiercache.decode.scheduler import DrafterScheduler
from tiercache.decode.verify import TargetWalk
from tiercache.draft.base import Drafter
from tiercache.draft.grow import Ranked, grower
from tiercache.draft.ngram.recycling import TokenRecycling
from tiercache.draft.ngram.suffix import SuffixAutomaton
from tiercache.draft.ngram.trigram import AdaptiveTrigram
from tiercache.draft.ngram.union import Ngrams
from tiercache.draft.noise import GumbelNoise
from tiercache.draft.resident import ResidentDrafter
from tiercache.draft.scorer import RunScorer
from tiercache.draft.union import Union
from tiercache.kv.tree_mask import TreeMasks
from tiercache.kv.tree_pass import TreeRun
from tiercache.stats.drafting import DraftStats

_BANK = 256  # rows of random logits
_SURE = 16.0  # how far the next word's logit lies above the others' spread
_PASSES = "passes"  # of the model: left out
# Whose seconds are a part of their own, those of the parts within left out.
_PARTS: tuple[tuple[Any, str, str], ...] = (
    (TreeRun, "run", "enter nodes"),
    (TreeMasks, "tree", "mask"),
    (TreeRun, "commit", "commit"),
    (DecodeLoop, "_round", "loop"),
    (DecodeLoop, "_fit", "cut to what can be run"),
    (DecodeLoop, "_accept", "accept: walk"),
    (Request, "shaped", "accept: processors"),
    (verify, "_likeliest", "accept: likeliest"),
    (Request, "write", "accept: write"),
    (GumbelNoise, "added", "accept: noise"),
    (DrafterScheduler, "propose", "scheduler"),
    (DrafterScheduler, "observe", "scheduler"),
    (DrafterScheduler, "tell", "likeliest of all rows"),
    (Union, "propose", "merge trees"),
    (Union, "observe", "judge trees"),
    *((kind, "propose", f"{kind.name}: propose") for kind in (SuffixAutomaton, AdaptiveTrigram, TokenRecycling)),
    *((kind, "observe", f"{kind.name}: learn") for kind in (SuffixAutomaton, AdaptiveTrigram, TokenRecycling)),
    (ResidentDrafter, "propose", "resident"),
    (RunScorer, "__call__", "resident: probabilities"),
    (Ranked, "__call__", "resident: grow"),
)


@dataclass(frozen=True)
class Size:
    """What to measure.

    Attributes:
        vocabulary: of the target.
        layers: of the model that stands in for its layers.
        prompt: words.
        rounds: measured.
        nodes, depth: of a tree, at most.
        seed: of what is made up.
    """

    vocabulary: int = 49152
    layers: int = 30
    prompt: int = 1500
    rounds: int = 60
    nodes: int = 64
    depth: int = 16
    seed: int = 0


class Clock:
    """Adds up seconds by part, round by round; seconds of a part within another are the inner one's alone."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, float]] = []
        self._inner = [0.0]

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Within it passes what `name` takes."""
        self._inner.append(0.0)
        began = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - began
            self.rounds[-1][name] += took - self._inner.pop()
            self._inner[-1] += took

    def begin_round(self) -> None:
        """What follows is another round's."""
        self.rounds.append(defaultdict(float))

    def medians(self) -> dict[str, float]:
        """Microseconds of each part, the dearest first."""
        names = {name for each in self.rounds for name in each} - {_PASSES}
        found = {name: 1e6 * statistics.median(each.get(name, 0.0) for each in self.rounds) for name in names}
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@contextmanager
def timed(clock: Clock) -> Iterator[None]:
    """Within it the clock knows what each part takes."""

    def through(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*given: Any, **named: Any) -> Any:
            with clock.part(name):
                return function(*given, **named)

        return measured

    own = [method in vars(owner) for owner, method, _ in _PARTS]
    before = [getattr(owner, method) for owner, method, _ in _PARTS]
    for (owner, method, name), function in zip(_PARTS, before, strict=True):
        setattr(owner, method, through(name, function))
    try:
        yield
    finally:
        for (owner, method, _), function, its_own in zip(_PARTS, before, own, strict=True):
            if its_own:
                setattr(owner, method, function)
            else:  # inherited
                delattr(owner, method)


def words(count: int) -> list[int]:
    """The repository's source, word by word, each a number."""
    known: dict[str, int] = {}
    files = sorted((Path(__file__).parents[1] / "policies").glob("*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    found = [known.setdefault(word, len(known)) for word in re.findall(r"\w+|\s+|[^\w\s]", text)]
    return (found * (1 + count // len(found)))[:count]


class MadeUpRun(TreeRun):
    """A run whose KV cache is a small model's, and whose logits say what comes next in a text.

    Args:
        model: the small one.
        text: that is written.
        size: as measured.
        clock: knows of the passes.
    """

    def __init__(self, model: transformers.PreTrainedModel, text: Sequence[int], size: Size, clock: Clock) -> None:
        super().__init__(model, None, len(text) + 4 * size.nodes)
        self._text, self._clock = text, clock
        draw = torch.Generator().manual_seed(size.seed)
        self._bank = torch.randn(_BANK, size.vocabulary, generator=draw).to(torch.bfloat16)

    def _forward(self, ids: torch.Tensor, positions: torch.Tensor, mask: object, keep: int) -> torch.Tensor:
        with self._clock.part(_PASSES):
            super()._forward(ids, positions, mask, keep)
            logits = self._bank[torch.arange(keep) * 7 % _BANK].clone()
            for row, place in enumerate(self._places(ids.shape[1], keep)):
                logits[row, self._text[place % len(self._text)]] += _SURE
            return logits

    def _places(self, tokens: int, keep: int) -> list[int]:
        """Where in the text that stands which follows each of the last `keep` tokens of a pass."""
        if not self._tokens:  # more of the text
            return list(range(self.length + tokens - keep + 1, self.length + tokens + 1))
        return [self.length + depth + 1 for depth in self._depths[-keep:]]


def measure(size: Size, make: Callable[[], Drafter], processors: Sequence[Any], *, sampled: bool) -> Clock:
    """One drafter's rounds over the text, by part."""
    clock = Clock()
    clock.begin_round()
    length = size.prompt + size.rounds * (size.depth + 1) + 1
    text = words(length + size.depth + 2)
    run = MadeUpRun(_model(size), text, size, clock)
    ids = torch.tensor([text[: size.prompt] + [0] * (length - size.prompt)])
    request = Request(ids, size.prompt, 0, processors, lambda ids, scores: torch.tensor([False]), None, length)
    drafter = make()
    plan = RoundPlan(0, size.nodes, size.depth, 8, 0.0, 0.0)
    chosen = DrafterScheduler([drafter], None, plan, most_nodes=size.nodes, context=length, stats=DraftStats())
    noise = GumbelNoise(size.seed, size.vocabulary) if sampled else None
    loop = DecodeLoop(run, request, chosen, TargetWalk(noise), noise, size.vocabulary)
    with timed(clock):
        loop._prefill(None)
        for _ in range(size.rounds):
            clock.begin_round()
            loop._round()
    clock.rounds = clock.rounds[1 + size.rounds // 4 :]
    drafter.close()
    return clock


def _model(size: Size) -> transformers.PreTrainedModel:
    torch.manual_seed(size.seed)
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": size.layers, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=size.vocabulary, num_key_value_heads=2, **shape)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def budgeter_costs(size: Size) -> dict[str, float]:
    """Microseconds of the budgeter's parts a round, in a made-up world; a plan is made in some rounds alone."""
    rates = [[0.7, 0.1, 0.05]] * size.depth
    profiles = [
        DrafterProfile(name, rates=rates, max_depth=size.depth, max_nodes=size.nodes, open_ended=True, passes=passes)
        for name, passes in (("model", True), ("n-grams", False))
    ]
    chosen = Budgeter(profiles, max_nodes=size.nodes, max_depth=size.depth)
    draw = np.random.default_rng(size.seed)
    deciding, observing = [], []
    for _ in range(8 * size.rounds):
        began = time.perf_counter()
        plan = chosen.decide(1000)
        deciding.append(time.perf_counter() - began)
        nodes, depth = min(plan.nodes, 24), min(plan.depth, 6)
        parents = [-1 if node < 2 else node - 2 for node in range(nodes)]
        path = list(range(0, int(draw.integers(0, 2 * depth + 1)), 2))[: max(0, (nodes + 1) // 2)]
        counts = trials(parents, path, size.depth, RANKS)
        draft_s = 0.0 if plan.drafter is None else 0.002 * (1 + depth) * float(draw.uniform(0.9, 1.2))
        verify_s = (0.1 + 0.001 * nodes) * float(draw.uniform(0.95, 1.1))
        began = time.perf_counter()
        chosen.observe(plan, draft_s, verify_s, nodes, len(path) + 1, *counts, depth)
        observing.append(time.perf_counter() - began)
    mean = (sum(deciding) + sum(observing)) / len(deciding)
    return {
        "decide, median": 1e6 * statistics.median(deciding),
        "observe, median": 1e6 * statistics.median(observing),
        "a plan": 1e6 * _plan_s(chosen),
        "a round, mean": 1e6 * mean,
    }


def _plan_s(chosen: Budgeter) -> float:
    given = chosen._histories, chosen._verify, chosen._candidates.best.drafter, chosen._limits
    times = []
    for _ in range(20):
        began = time.perf_counter()
        budgeter.plan_choice(*given)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def cases(size: Size) -> dict[str, Callable[[], Clock]]:
    """What is measured, by name."""
    warpers = [transformers.TemperatureLogitsWarper(0.8), transformers.TopPLogitsWarper(0.95)]

    def ngrams() -> Drafter:
        return Ngrams(size.vocabulary, "benchmark")

    def resident() -> Drafter:
        return ResidentDrafter(nullcontext, grower("best-first"))

    return {
        "n-grams, greedy": lambda: measure(size, ngrams, [], sampled=False),
        "n-grams, temperature and top p": lambda: measure(size, ngrams, warpers, sampled=True),
        "the model's own planes, greedy": lambda: measure(size, resident, [], sampled=False),
    }


def report(size: Size, found: dict[str, dict[str, float]]) -> str:
    """Tables, and the same as one line of JSON."""
    lines = [
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, seed "
        f"{size.seed}; {size.vocabulary} tokens, trees of {size.nodes} nodes at most; microseconds, medians of rounds"
    ]
    for name, parts in found.items():
        lines += ["", f"{name}: {sum(parts.values()):.0f}" if "a plan" not in parts else name]
        lines += [f"{took:10.0f}  {part}" for part, took in parts.items()]
    return "\n".join([*lines, json.dumps({"size": asdict(size), "us": found})])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case and print it."""
    plain = Size()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.round_cost", description="a round beside its passes")
    parser.add_argument("--vocabulary", type=int, default=plain.vocabulary)
    parser.add_argument("--rounds", type=int, default=plain.rounds)
    parser.add_argument("--nodes", type=int, default=plain.nodes)
    given = parser.parse_args(arguments)
    size = Size(vocabulary=given.vocabulary, rounds=given.rounds, nodes=given.nodes)
    found = {name: run().medians() for name, run in cases(size).items()}
    print(report(size, {**found, "the budgeter": budgeter_costs(size)}))


if __name__ == "__main__":
    main()
