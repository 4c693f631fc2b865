"""Who drafts for an offloaded model: drafters made from what was asked for, sized before anything is planned.

Knows options, checkpoints and drafters; nothing of tiers.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import nn

from policies.budgeter import Budgeter
from policies.drafting import DrafterProfile, RoundPlan
from tiercache.config import DraftConfig, OffloadConfig
from tiercache.decode.generate import DraftingGenerate, RuleMaker
from tiercache.decode.scheduler import DrafterScheduler
from tiercache.decode.verify import Rejection, Rule, Shifted, TargetWalk, Typical
from tiercache.draft.base import Drafter, Needs
from tiercache.draft.combine import Cascade, Ngrams
from tiercache.draft.grow import grower
from tiercache.draft.lm import LmDrafter
from tiercache.draft.noise import KEPT, GumbelNoise
from tiercache.draft.resident import ResidentDrafter
from tiercache.engine.memory import MemoryRequirements
from tiercache.engine.source import Opened
from tiercache.errors import UnsupportedModelError, UsageError
from tiercache.kv import speckv
from tiercache.kv.cache import support
from tiercache.model.trace import trace_on_meta
from tiercache.progress import note
from tiercache.stats import DraftStats, Stats
from tiercache.store.source import Source, resolve

Passes = Callable[[], AbstractContextManager[None]]

_PIECE = 256  # tokens of a small model's pass that are rehearsed
_ROWS = 8  # rows of a vocabulary's size that choosing a token takes in passing
_MASK_BYTES = 5  # of each pair of a node and a token: a truth value, and what attention makes of it
# Acceptance by rank, as it was on the project's own toy: of a model that is much like the target, and of n-grams.
_SURE = 1.0  # tokens: where n-grams expect as many to be accepted, no pass of a model is needed to draft
_MODELS, _TABLES = [0.85, 0.06, 0.02], [0.35, 0.08, 0.04]


@dataclass(frozen=True)
class DrafterSpec:
    """The drafters that were asked for, before the model is attached.

    Attributes:
        config: the options.
        vocabulary: of the target.
        resident: the target's own planes draft.
        needs: what all of them take, but for what is the target's own.
        made: the caller's own.
        ngrams: makes the tables; their files stay closed until the model is attached, for it may be refused before.
        small: a small model's folder, to be loaded once its bytes are reserved.
        eviction_bytes: what choosing a part of the prompt takes.
        reason: why nobody drafts; empty where somebody does.
    """

    config: DraftConfig
    vocabulary: int
    resident: bool
    needs: Needs
    made: tuple[Drafter, ...] = ()
    ngrams: Callable[[], Drafter] | None = None
    small: Path | None = None
    eviction_bytes: int = 0
    reason: str = ""

    @property
    def compute_bytes(self) -> int:
        """What is reserved where the model computes, weights of a small model included."""
        config = self.config
        rows = KEPT + _ROWS * (1 + config.width)
        if config.grower.startswith("rsd"):  # whoever was drawn from stays until the tree is verified
            rows += min(config.nodes, 1 + (config.depth - 1) * config.width)
        return self.needs.device_bytes + 4 * rows * self.vocabulary + self.config.nodes * self.needs.node_bytes


def with_planes(config: OffloadConfig, *, kernels: bool, show: bool) -> OffloadConfig:
    """The options with `resident` set where the target's own planes are to draft; says if "auto" has none.

    Args:
        config: the options.
        kernels: there are some, to multiply by planes.
        show: whether notes may be printed.

    Raises:
        UsageError: a drafter for a mode or precision that it cannot draft for.
    """
    if config.draft is None:
        return config
    if config.mode == "mixed":
        raise UsageError(
            "drafter= is for exact runs: mode='mixed' chooses neurons token by token, and a tree of tokens would "
            "choose all of them; leave one of the two out"
        )
    named = config.draft.drafter
    able = config.precision in ("int8", "int4") and kernels
    if named == "resident" and config.precision in ("int8", "int4") and not kernels:
        raise UsageError("drafter='resident' multiplies by planes, and there are no kernels here; see tiercache doctor")
    if named == "auto" and not able:
        what = "without kernels" if config.precision in ("int8", "int4") else f"at precision={config.precision!r}"
        note(f"drafter='auto' is n-grams alone {what}; at int8 or int4 the model's own planes draft too", show=show)
    return replace(config, resident=config.resident or named == "resident" or (named == "auto" and able))


def widened(config: OffloadConfig) -> OffloadConfig:
    """The options with a context that has room for a tree and its root as well."""
    return config if config.draft is None else replace(config, context=config.context + config.draft.slots)


def find_drafters(config: OffloadConfig, opened: Opened) -> DrafterSpec | None:
    """Find out who is to draft, and what that takes; None if nobody is.

    Raises:
        UsageError: nobody of that name, a model with another vocabulary, passes that have no room for a node, or a
            KV cache that cannot be evicted.
        StoreError: tables are another model's, or the small model's checkpoint is damaged.
        UnsupportedModelError: a drafter that was asked for by name cannot be verified, or is no model.
    """
    if config.draft is None:
        return None
    takes = support(opened.meta_model)
    if takes.takes == "nothing" and config.draft.drafter != "auto":
        raise UnsupportedModelError(
            f"drafter={config.draft.drafter!r} cannot draft for this model, for {takes.reason}; open it without "
            "drafter=, or with drafter='auto', which then decodes plainly"
        )
    found, kept = _found(config, config.draft, opened), config.draft.speckv
    if kept is None:
        return found
    if reason := speckv.refusal(opened.model):
        raise UsageError(f"speckv={kept} keeps a part of the KV cache, but of this model {reason}; leave it out")
    return replace(found, eviction_bytes=speckv.scratch_bytes(opened.model.config, config.context))


def nobody(opened: Opened, draft: DraftConfig, reason: str) -> DrafterSpec:
    """Nobody, for what `reason` says: of "auto", where drafting has no room or would not pay for it."""
    vocabulary = opened.model.config.get_text_config(decoder=True).vocab_size
    return DrafterSpec(draft, vocabulary, False, Needs(), reason=reason)


def _found(config: OffloadConfig, draft: DraftConfig, opened: Opened) -> DrafterSpec:
    if config.logits < 2:
        raise UsageError("a drafted node takes a row of logits beside the root's, and logits=1; give logits=65")
    if draft.fixed and draft.nodes >= config.logits:
        raise UsageError(
            f"trees of draft_nodes={draft.nodes} take as many rows of logits and one for the root, and "
            f"logits={config.logits}; give logits={draft.nodes + 1}, or smaller trees"
        )
    target, folder = opened.model, opened.folder
    vocabulary = target.config.get_text_config(decoder=True).vocab_size
    wanted = draft.drafter
    if isinstance(wanted, str) and wanted in ("auto", "ngram"):
        learned = None if draft.learned is None else Path(draft.learned).expanduser()
        ngrams = partial(Ngrams, vocabulary, _identity(folder, target), folder=learned)
        with closing(ngrams()) as sample:
            needs = sample.needs
        return DrafterSpec(draft, vocabulary, wanted == "auto" and config.resident, needs, ngrams=ngrams)
    if wanted == "resident":
        return DrafterSpec(draft, vocabulary, True, Needs(shared_kv=True))
    if isinstance(wanted, str | Path):
        try:
            small = resolve(wanted)
        except UsageError as error:
            hint = "; to draft nothing, give drafter=None" if str(wanted) == "none" else ""
            raise UsageError(
                f"drafter= is none of 'auto', 'resident' and 'ngram', and no model: {error}{hint}"
            ) from error
        return DrafterSpec(draft, vocabulary, False, _small_needs(small, config, vocabulary, folder), small=small)
    if isinstance(wanted, type) or not callable(getattr(wanted, "propose", None)):
        raise UsageError(
            f"drafter={wanted!r} is no drafter; give 'auto', 'resident', 'ngram', a folder or Hub id, or a Drafter"
        )
    size = wanted.needs.vocabulary
    if size is not None and size != vocabulary:
        raise UsageError(f"{wanted.name} drafts {size} tokens, the target has {vocabulary}; give one of its family")
    return DrafterSpec(draft, vocabulary, False, wanted.needs, (wanted,))


def reserve(asked: MemoryRequirements, drafter_spec: DrafterSpec | None, config: OffloadConfig) -> MemoryRequirements:
    """What a model asks of memory, with what drafting takes beside it."""
    if drafter_spec is None:
        return asked
    mask = (drafter_spec.config.nodes + 1) * widened(config).context * _MASK_BYTES
    compute = {**asked.needs.compute, "drafter and trees": drafter_spec.compute_bytes + mask}
    if drafter_spec.eviction_bytes:
        compute["looking at the prompt"] = drafter_spec.eviction_bytes
    dram = {**asked.needs.dram, "tables of the drafter": drafter_spec.needs.host_bytes}
    return replace(asked, needs=replace(asked.needs, compute=compute, dram=dram))


def attach(
    stack: ExitStack,
    model: transformers.PreTrainedModel,
    drafter_spec: DrafterSpec,
    config: OffloadConfig,
    device: torch.device,
    stats: Stats,
    *,
    show: bool,
    room_price: float | None = None,
) -> None:
    """Let the attached model's `generate` draft; what undoes it goes on `stack`."""
    attached: Any = getattr(model, "tiercache")  # noqa: B009 - no attribute that torch knows of
    drafters = team(drafter_spec, lambda: attached.passes("resident"), config.context, config.logits, device)
    stack.callback(drafters.close)
    stats.drafting = drafters.stats
    stats.drafting.room_price = room_price
    stats.lossy = stats.lossy or bool(drafters.stats.lossy)
    slots = drafter_spec.config.slots
    keep = drafter_spec.config.speckv
    rule = rule_of(drafter_spec.config)
    required, reason = drafter_spec.config.drafter != "auto", drafter_spec.reason
    if reason:
        drafters.stats.plain_reasons[reason] = 0
    drafting = DraftingGenerate(
        model, drafters, rule, config.context + 1, slots, keep=keep, required=required, reason=reason, show=show
    )
    stack.callback(drafting.close)


def team(
    drafter_spec: DrafterSpec, resident: Passes, context: int, logits: int, device: torch.device
) -> DrafterScheduler:
    """The team of an attached model.

    Args:
        recruits: who drafts.
        resident: passes of the target within are resident ones.
        context: tokens that a sequence may have.
        logits: rows that a pass may return; a tree has one less.
        device: where the model computes.
    """
    config = drafter_spec.config
    arms: list[Drafter] = list(drafter_spec.made)
    if drafter_spec.ngrams is not None:
        arms.append(drafter_spec.ngrams())
    if drafter_spec.small is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(drafter_spec.small, dtype="auto")
        nn.Module.to(model, device)
        arms.append(LmDrafter(model, grower(config.grower), needs=drafter_spec.needs, capacity=context + config.slots))
    if drafter_spec.resident:
        own: Drafter = ResidentDrafter(resident, grower(config.grower))
        arms = [Cascade([*arms, own], _SURE)] if arms else [own]
    nodes = min(config.nodes, logits - 1)
    fixed = RoundPlan(len(arms) - 1, nodes, config.depth, config.width, 0.0, 0.0)
    limits = {"max_nodes": nodes, "max_depth": config.depth, "width": config.width}
    budgeter = None
    if arms and not config.fixed:
        known = [
            DrafterProfile(
                arm.name,
                rates=_rates(arm, config.depth),
                max_depth=config.depth,
                max_nodes=nodes,
                open_ended=arm.open_ended,
                passes=not arm.tables,
            )
            for arm in arms
        ]
        budgeter = Budgeter(known, **limits)
    stats = DraftStats(rule=config.verify, grower=config.grower)
    stats.lossy = config.lossy if arms else ""
    return DrafterScheduler(arms, budgeter, fixed, most_nodes=nodes, context=context, stats=stats)


def _rates(drafter: Drafter, depth: int) -> list[list[float]]:
    """What to think of a drafter's acceptance by depth and rank before anything was seen."""
    return [_MODELS if drafter.needs.shared_kv or isinstance(drafter, LmDrafter) else _TABLES] * depth


def rule_of(config: DraftConfig) -> RuleMaker:
    """Makes the rule of one request from its noise, which is None in greedy decoding."""

    def make(noise: GumbelNoise | None) -> Rule:
        generator = None if noise is None else torch.Generator().manual_seed(noise.seed)
        if config.verify == "rejection":
            return Shifted(Rejection(generator), config.shift) if config.shift else Rejection(generator)
        return Typical(generator) if config.verify == "typical" else TargetWalk(noise)

    return make


def _small_needs(small: Path, config: OffloadConfig, vocabulary: int, folder: Path | None) -> Needs:
    """What a small model takes, from its checkpoint's header and a rehearsal; refuses one of another vocabulary."""
    meta_model = Source.open(small).model()
    own = meta_model.config.get_text_config(decoder=True).vocab_size
    same = _same_tokens(small, folder)
    if same is False or (same is None and own != vocabulary):
        raise UsageError(
            f"{small} has {own} tokens and the target {vocabulary}, or they mean others; give a drafter with the "
            "target's tokenizer"
        )
    assert config.draft is not None
    seen = trace_on_meta(meta_model, (), _PIECE, 1)
    slots = config.context + config.draft.slots
    kept = seen.kv_bytes * -(-slots // _PIECE) + seen.workspace_bytes
    return Needs(device_bytes=sum(parameter.nbytes for parameter in meta_model.parameters()) + kept)


def _identity(folder: Path | None, target: transformers.PreTrainedModel) -> str:
    """Of what token ids mean: the tokenizer's digest, or the kind and size of a model that has none beside it."""
    file = None if folder is None else folder / "tokenizer.json"
    if file is not None and file.is_file():
        return hashlib.sha256(file.read_bytes()).hexdigest()
    config = target.config.get_text_config(decoder=True)
    return f"{config.model_type} of {config.vocab_size} tokens"


def _same_tokens(small: Path, folder: Path | None) -> bool | None:
    """Whether two folders' tokenizers mean the same by each id; None where one has none."""
    files = [None if place is None else place / "tokenizer.json" for place in (small, folder)]
    if any(file is None or not file.is_file() for file in files):
        return None
    ours, theirs = (Tokenizer.from_file(str(file)).get_vocab() for file in files)
    return ours == theirs
