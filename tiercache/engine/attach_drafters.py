"""Makes the drafters of an attached model from their spec, and lets the model's `generate` draft by them.

Knows drafters, their scheduler and the decoding loop; it does not know tiers or plans.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import transformers
from torch import nn

from policies.budgeter import Budgeter
from policies.drafting import DrafterProfile, RoundPlan
from tiercache.config.drafting import DraftConfig
from tiercache.config.options import OffloadConfig
from tiercache.decode.generate import DraftingGenerate, DraftingLimits, RuleMaker
from tiercache.decode.scheduler import DrafterScheduler
from tiercache.decode.verify import Rejection, Rule, ShiftedRejection, TargetWalk, Typical
from tiercache.draft.base import Drafter
from tiercache.draft.cascade import Cascade
from tiercache.draft.grow import grower
from tiercache.draft.lm import LmDrafter
from tiercache.draft.noise import GumbelNoise
from tiercache.draft.resident import ResidentDrafter
from tiercache.engine.drafting import DrafterSpec
from tiercache.stats.drafting import DraftStats
from tiercache.stats.run import Stats
from tiercache.store.checkpoint import Checkpoint

_SURE = 1.0  # tokens: where n-grams expect as many to be accepted, no pass of a model is needed to draft
# Acceptance rates by rank that are assumed before any were measured, taken from the project's own small model: of a
# model that is much like the target, and of n-grams.
_MODEL_RATES, _NGRAM_RATES = [0.85, 0.06, 0.02], [0.35, 0.08, 0.04]


def attach_drafters(
    stack: ExitStack,
    model: transformers.PreTrainedModel,
    spec: DrafterSpec,
    config: OffloadConfig,
    device: torch.device,
    stats: Stats,
    *,
    show: bool,
    room_price: float | None = None,
) -> None:
    """Let the attached model's `generate` draft; what undoes it goes on `stack`."""
    attached: Any = getattr(model, "tiercache")  # noqa: B009 - no attribute that torch knows of
    drafters = _drafters(spec, lambda: attached.passes("resident"), config.context, device, show=show)
    scheduler = _scheduler(spec.config, drafters, config.context, config.logits)
    stack.callback(scheduler.close)
    stats.drafting, attached.scheduler = scheduler.stats, scheduler
    stats.drafting.room_price = room_price
    stats.lossy = stats.lossy or bool(scheduler.stats.lossy)
    if spec.reason:
        scheduler.stats.plain_reasons[spec.reason] = 0
    limits = DraftingLimits(config.context + 1, spec.config.slots, spec.config.speckv)
    required = spec.config.drafter != "auto"
    drafting = DraftingGenerate(
        model, scheduler, _rule_maker(spec.config), limits, required=required, reason=spec.reason, show=show
    )
    stack.callback(drafting.close)


def _drafters(
    spec: DrafterSpec,
    resident: Callable[[], AbstractContextManager[None]],
    context: int,
    device: torch.device,
    *,
    show: bool,
) -> list[Drafter]:
    """The drafters of a spec; passes of the target within `resident` use the resident planes alone."""
    config = spec.config
    drafters = [] if spec.made is None else [spec.made]
    if spec.ngrams is not None:
        drafters.append(spec.ngrams())
    if spec.small is not None:
        small = Checkpoint.open(spec.small).in_place(show_progress=show).folder
        model = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=spec.small_dtype)
        nn.Module.to(model, device)
        drafters.append(
            LmDrafter(model, grower(config.grower), requirements=spec.requirements, capacity=context + config.slots)
        )
    if spec.resident:
        own: Drafter = ResidentDrafter(resident, grower(config.grower))
        drafters = [Cascade([*drafters, own], _SURE)] if drafters else [own]
    return drafters


def _scheduler(config: DraftConfig, drafters: list[Drafter], context: int, logits: int) -> DrafterScheduler:
    """The scheduler of `drafters`; a pass may return `logits` rows, so that a tree has one node less."""
    nodes = min(config.nodes, logits - 1)
    fixed = RoundPlan(len(drafters) - 1, nodes, config.depth, config.width, 0.0, 0.0)
    budgeter = None
    if drafters and not config.fixed:
        profiles = [
            DrafterProfile(
                drafter.name,
                rates=_assumed_rates(drafter, config.depth),
                max_depth=config.depth,
                max_nodes=nodes,
                open_ended=drafter.open_ended,
                passes=drafter.runs_model,
            )
            for drafter in drafters
        ]
        budgeter = Budgeter(profiles, max_nodes=nodes, max_depth=config.depth, width=config.width)
    stats = DraftStats(rule=config.verify, grower=config.grower)
    stats.lossy = config.lossy if drafters else ""
    return DrafterScheduler(drafters, budgeter, fixed, most_nodes=nodes, context=context, stats=stats)


def _assumed_rates(drafter: Drafter, depth: int) -> list[list[float]]:
    """A drafter's acceptance rates by depth and rank before anything was measured."""
    is_model = drafter.requirements.shared_kv or isinstance(drafter, LmDrafter)
    return [_MODEL_RATES if is_model else _NGRAM_RATES] * depth


def _rule_maker(config: DraftConfig) -> RuleMaker:
    """What makes the verification rule of one request from its noise, which is None in greedy decoding."""

    def make(noise: GumbelNoise | None) -> Rule:
        generator = None if noise is None else torch.Generator().manual_seed(noise.seed)
        if config.verify == "rejection":
            return ShiftedRejection(generator, config.shift) if config.shift else Rejection(generator)
        return Typical(generator) if config.verify == "typical" else TargetWalk(noise)

    return make
