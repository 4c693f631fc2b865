"""Finds the drafters that were asked for and the memory that they take, before a model's memory is planned.

Knows options, checkpoints and drafters; it does not know tiers, and it makes no drafter.
"""

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer

from tiercache.config.drafting import DraftConfig
from tiercache.config.options import OffloadConfig
from tiercache.draft.base import Drafter, DrafterRequirements
from tiercache.draft.ngram.union import Ngrams
from tiercache.draft.noise import KEPT_POSITIONS
from tiercache.draft.registry import LOOKUPS
from tiercache.engine.compute_dtype import compute_dtype
from tiercache.engine.memory import MemoryRequirements
from tiercache.engine.source import Opened
from tiercache.errors import UnsupportedModelError, UsageError
from tiercache.kv import speckv
from tiercache.kv.cache import support
from tiercache.model.card_attention import Capability
from tiercache.model.trace import trace_on_meta
from tiercache.progress import note
from tiercache.store.checkpoint import Checkpoint, resolve

_PIECE = 256  # tokens of a small model's pass that is traced
_ROWS = 8  # rows of a vocabulary's size that choosing a token takes for a moment
_MASK_BYTES = 5  # of each pair of a node and a token: a truth value, and what attention makes of it


@dataclass(frozen=True)
class DrafterSpec:
    """The drafters that were asked for, before the model is attached.

    Attributes:
        config: the options.
        vocabulary: of the target.
        resident: the target's own planes draft.
        requirements: the memory that all drafters take beside the target's own.
        made: the caller's own drafter.
        ngrams: makes the n-gram drafters. The files of their tables stay closed until the model is attached, for the
            model may be refused before.
        small: a small model's folder; the model is loaded once its bytes are reserved.
        small_dtype: that it computes in.
        eviction_bytes: what choosing the part of the prompt that stays in the KV cache takes.
        reason: why no drafter drafts; empty where one does.
    """

    config: DraftConfig
    vocabulary: int
    resident: bool
    requirements: DrafterRequirements
    made: Drafter | None = None
    ngrams: Callable[[], Drafter] | None = None
    small: Path | None = None
    small_dtype: torch.dtype | None = None
    eviction_bytes: int = 0
    reason: str = ""

    @property
    def compute_bytes(self) -> int:
        """What is reserved where the model computes; the weights of a small model count."""
        config = self.config
        rows = KEPT_POSITIONS + _ROWS * (1 + config.width)
        if config.grower.startswith("rsd"):  # what children were drawn from stays until the tree is verified
            rows += min(config.nodes, 1 + (config.depth - 1) * config.width)
        return self.requirements.device_bytes + 4 * rows * self.vocabulary


def with_planes(config: OffloadConfig, *, kernels: bool, show: bool) -> OffloadConfig:
    """The options with `resident` set where the target's own planes are to draft; says if "auto" has none.

    Args:
        config: the options.
        kernels: there are some, to multiply by planes.
        show: whether notes may be printed.

    Raises:
        UsageError: a drafter for a precision that it cannot draft for.
    """
    if config.draft is None:
        return config
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


def find_drafters(config: OffloadConfig, opened: Opened, capability: Capability | None = None) -> DrafterSpec | None:
    """Find the drafters that were asked for and what they take; None where no drafter was asked for.

    `capability` is the GPU's: a small model computes in what the card has at full speed, as a target does.

    Raises:
        UsageError: no drafter has this name, a model has another vocabulary, passes have no room for a node, or the KV
            cache cannot be evicted.
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
    found, kept = _spec(config, config.draft, opened, capability), config.draft.speckv
    if kept is None:
        return found
    if reason := speckv.refusal(opened.model):
        raise UsageError(f"speckv={kept} keeps a part of the KV cache, but of this model {reason}; leave it out")
    return replace(found, eviction_bytes=speckv.scratch_bytes(opened.model.config, config.context))


def no_drafters(opened: Opened, draft: DraftConfig, reason: str) -> DrafterSpec:
    """The spec without a drafter, for `reason`: of "auto", where drafting has no room or would not pay for it."""
    vocabulary = opened.model.config.get_text_config(decoder=True).vocab_size
    return DrafterSpec(draft, vocabulary, False, DrafterRequirements(), reason=reason)


def _spec(config: OffloadConfig, draft: DraftConfig, opened: Opened, capability: Capability | None) -> DrafterSpec:
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
        with closing(ngrams()) as made:
            requirements = made.requirements
        return DrafterSpec(draft, vocabulary, wanted == "auto" and config.resident, requirements, ngrams=ngrams)
    if wanted == "resident":
        return DrafterSpec(draft, vocabulary, True, DrafterRequirements(shared_kv=True))
    if isinstance(wanted, str) and wanted in LOOKUPS:
        wanted = LOOKUPS[wanted](vocabulary)
    if isinstance(wanted, str | Path):
        try:
            small = resolve(wanted)
        except UsageError as error:
            hint = "; to draft nothing, give drafter=None" if str(wanted) == "none" else ""
            raise UsageError(
                f"drafter= is none of auto, resident, ngram, {', '.join(LOOKUPS)}, and no model: {error}{hint}"
            ) from error
        checkpoint = Checkpoint.open(small)
        checkpoint = replace(checkpoint, dtype=compute_dtype("auto", checkpoint.dtype, capability))
        requirements = _small_requirements(checkpoint, config, vocabulary, folder, capability)
        return DrafterSpec(draft, vocabulary, False, requirements, small=small, small_dtype=checkpoint.dtype)
    return _made(wanted, draft, vocabulary)


def _made(drafter: object, draft: DraftConfig, vocabulary: int) -> DrafterSpec:
    """The spec of a drafter that exists already."""
    if isinstance(drafter, type):
        raise UsageError(f"drafter={drafter.__name__} is a class; make one of it: drafter={drafter.__name__}(...)")
    if not isinstance(drafter, Drafter):
        raise UsageError(
            f"drafter={drafter!r} is no drafter; give 'auto', 'resident', 'ngram', a folder or Hub id, or an object of "
            "a class that inherits from tiercache.draft.base.Drafter"
        )
    size = drafter.requirements.vocabulary
    if size is not None and size != vocabulary:
        raise UsageError(f"{drafter.name} drafts {size} tokens, the target has {vocabulary}; give one of its family")
    if draft.verify == "rejection" and isinstance(draft.drafter, str):
        raise UsageError(
            f"verify='rejection' needs trees that are drawn, and {drafter.name!r} looks tokens up; choose 'resident' "
            "or a small model, or verify='walk'"
        )
    return DrafterSpec(draft, vocabulary, False, drafter.requirements, drafter)


def reserve(asked: MemoryRequirements, drafter_spec: DrafterSpec | None, config: OffloadConfig) -> MemoryRequirements:
    """What a model asks of memory, with what drafting takes beside it."""
    if drafter_spec is None:
        return asked
    mask = (drafter_spec.config.nodes + 1) * widened(config).context * _MASK_BYTES
    compute = {**asked.needs.compute, "drafter and trees": drafter_spec.compute_bytes + mask}
    if drafter_spec.eviction_bytes:
        compute["looking at the prompt"] = drafter_spec.eviction_bytes
    dram = {**asked.needs.dram, "tables of the drafter": drafter_spec.requirements.host_bytes}
    return replace(asked, needs=replace(asked.needs, compute=compute, dram=dram))


def _small_requirements(
    small: Checkpoint, config: OffloadConfig, vocabulary: int, folder: Path | None, capability: Capability | None
) -> DrafterRequirements:
    """What a small model takes, from its checkpoint's header and a trace; refuses one of another vocabulary."""
    meta_model = small.model()
    own = meta_model.config.get_text_config(decoder=True).vocab_size
    same = _same_tokens(small.folder, folder)
    if same is False or (same is None and own != vocabulary):
        raise UsageError(
            f"{small.folder} has {own} tokens and the target {vocabulary}, or they mean others; give a drafter with "
            "the target's tokenizer"
        )
    assert config.draft is not None
    seen = trace_on_meta(meta_model, (), _PIECE, 1, capability=capability)
    slots = config.context + config.draft.slots
    kept = seen.kv_bytes * -(-slots // _PIECE) + seen.workspace_bytes
    return DrafterRequirements(device_bytes=sum(parameter.nbytes for parameter in meta_model.parameters()) + kept)


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
