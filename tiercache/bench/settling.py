"""Runs the ways between which the cost model cannot tell, a few tokens each in turn, and takes the faster.

Knows the public way to open a model; predicts nothing.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from policies.run_plan import Decision, RunPlan
from policies.settings import Settings
from tiercache.bench.drafting_prompts import Prompts
from tiercache.bench.undisturbed import Watch
from tiercache.config.options import OffloadConfig
from tiercache.engine.drafting_choice import NGRAMS, NOBODY, OWN_PLANES
from tiercache.engine.offload import open_offloaded
from tiercache.engine.session import plan_model
from tiercache.errors import DoesNotFitError, UsageError
from tiercache.progress import bar

TOKENS, ROUNDS = 32, 3  # of a text; texts of each way, in turn
_WARM_TOKENS, _PROMPT_TOKENS = 4, 32


@dataclass(frozen=True)
class Measured:
    """A way and what it took.

    Attributes:
        name: for people.
        config: the options that open it.
        token_s: seconds of a token, one number for each time that it was opened.
    """

    name: str
    config: OffloadConfig
    token_s: tuple[float, ...]

    @property
    def middle_s(self) -> float:
        """Seconds of a token, the median."""
        return statistics.median(self.token_s)

    @property
    def spread(self) -> float:
        """Half the range of its runs, as a share of their median."""
        return (max(self.token_s) - min(self.token_s)) / 2 / self.middle_s


def settle(place: Path, config: OffloadConfig, plan: RunPlan, *, show_progress: bool | None) -> RunPlan:
    """The plan, or the one of its runner-up where that was faster by more than runs of one way differ.

    Args:
        place: the model's folder, with a tokenizer.
        config: the options that the plan was made with.
        plan: as it was predicted.
        show_progress: draw a bar; None means where standard error is a terminal.

    Raises:
        UsageError: there is no tokenizer to read a prompt with.
    """
    ways = [way for way in rivals(config, plan) if _fits(place, way[1])]
    if len(ways) < 2:
        reason = "there is no second way within the model's error"
        return replace(plan, decisions=(*plan.decisions, Decision("settled", "not run", None, None, reason)))
    found = in_turn(place, ways, tokens=TOKENS, show_progress=show_progress)
    first, best = found[0], min(found, key=lambda each: each.middle_s)
    noise = max(first.spread, best.spread)
    gain = first.middle_s / best.middle_s - 1
    taken = best if gain > noise else first
    other = min((each for each in found if each is not taken), key=lambda each: each.middle_s)
    chosen = plan if taken is first else plan_model(place, taken.config, show_progress=show_progress)
    reason = (
        f"measured, {len(first.token_s)} texts of {TOKENS} tokens each in turn: "
        + ", ".join(f"{each.name} {each.middle_s * 1e3:.1f} ms a token" for each in found)
        + f"; runs of one way differ by {noise:.0%}"
    )
    decision = Decision("settled", taken.name, other.name, other.middle_s / taken.middle_s - 1, reason)
    return replace(chosen, decisions=(*plan.decisions, decision))


def _fits(place: Path, config: OffloadConfig) -> bool:
    try:
        plan_model(place, config, show_progress=False)
    except DoesNotFitError:
        return False
    return True


def rivals(config: OffloadConfig, plan: RunPlan) -> list[tuple[str, OffloadConfig]]:
    """The plan's own way first, and those that the model cannot tell from it; by name, with the options of each."""
    own = replace(config, plan="default", settings=plan.settings, drafts=str(plan.options["drafts"]))
    found = [("as predicted", own)]
    second, first = plan.runner_up, plan.predicted
    if second is not None and first is not None and second["high"] >= first["low"]:
        name = ", ".join(f"{what} {choice}" for what, choice in second["choices"].items())
        found.append((name, replace(own, settings=Settings(**second["settings"]))))
    others = {OWN_PLANES: NGRAMS, NGRAMS: NOBODY, NOBODY: NGRAMS}
    if own.drafts:
        other = others[own.drafts]
        found.append((f"drafting by {other}", replace(own, drafts=other)))
    return found


def in_turn(
    place: Path,
    ways: Sequence[tuple[str, OffloadConfig]],
    *,
    rounds: int = ROUNDS,
    tokens: int = TOKENS,
    show_progress: bool | None = None,
) -> list[Measured]:
    """Seconds of a token of each way, opened anew for each of `rounds` texts of `tokens`, one way after the other.

    A text that others disturbed is written again, while patience lasts (see `undisturbed`).

    Raises:
        UsageError: the folder has no tokenizer.
    """
    prompts = Prompts.read(place, None, rounds, _PROMPT_TOKENS).ids
    seconds: dict[str, list[float]] = {name: [] for name, _ in ways}
    watch = Watch()
    with bar("running the likeliest", rounds * len(ways), show=show_progress) as advance:
        for prompt in prompts:
            for name, config in ways:
                seconds[name] += watch.sample(partial(_token_s, place, config, prompt, tokens), 1)
                advance(1)
    return [Measured(name, config, tuple(seconds[name])) for name, config in ways]


def _token_s(place: Path, config: OffloadConfig, prompt: tuple[int, ...], tokens: int) -> float:
    """Seconds of a token of a greedy text behind a prompt, which is counted in: it is the same for all ways."""
    with open_offloaded(place, config, show_progress=False) as opened:  # anew: a drafter learns what it has seen
        model: Any = opened
        ids = torch.tensor([prompt], device=model.tiercache.stats().device)
        options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        options |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        model.generate(ids, max_new_tokens=_WARM_TOKENS, **options)
        begin = time.perf_counter()
        text: torch.Tensor = model.generate(ids, max_new_tokens=tokens, **options)
        took_s, new = time.perf_counter() - begin, text.shape[1] - len(prompt)
        if new < 1:
            raise UsageError("the model ends its text at once, so nothing can be timed; leave --settle out")
        return took_s / new
