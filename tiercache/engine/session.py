"""One offloaded model from its options to the hooks on its modules, in the order in which things are opened.

Brings the parts together and decides nothing itself: what stays where is the plan's, what moves when is the tiers'.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers

from policies.run_plan import RunPlan
from tiercache import compat
from tiercache.config.options import OffloadConfig
from tiercache.engine import drafting, exact, mixed_fit, planning
from tiercache.engine.actuals import Actuals
from tiercache.engine.attach_drafters import attach_drafters
from tiercache.engine.compute_dtype import name_of
from tiercache.engine.handle import OffloadHandle, Run, TextLimits
from tiercache.engine.machine import Machine
from tiercache.engine.mixed_fit import MixedPlacement
from tiercache.engine.placement import ExactPlacement, Placement
from tiercache.engine.source import Opened, open_model
from tiercache.errors import UsageError
from tiercache.kv.cache import support
from tiercache.model.attach import Attachment
from tiercache.model.binding import Bindings, Use
from tiercache.model.card_attention import CardAttention, SlicedForward, wanted
from tiercache.model.embedding import EmbeddingRows, FileRows
from tiercache.model.fused_layer import Fusing
from tiercache.model.pass_hooks import PassHooks
from tiercache.progress import note
from tiercache.stats.run import Stats, peak_rss_bytes
from tiercache.store.calibration import Calibration
from tiercache.store.folders import in_use
from tiercache.store.reader import Reader
from tiercache.tiers.device import device_of
from tiercache.tiers.link import Link
from tiercache.tiers.slab import Slab
from tiercache.tiers.stack import Observer, TierStack


def open_session(
    model_or_path: transformers.PreTrainedModel | str | Path,
    config: OffloadConfig,
    stack: ExitStack,
    *,
    show_progress: bool | None,
    observe: Observer,
    calibration: Calibration | None,
) -> transformers.PreTrainedModel:
    """The model, ready to run; see `engine.offload` for the arguments. `stack` closes what is opened here."""
    notes = show_progress is not False
    placed = _placement(model_or_path, config, stack, show_progress=show_progress, calibration=calibration)
    settings = placed.config.settings
    reader = stack.enter_context(Reader(settings.read_threads, settings.read_bytes))
    tiers = _tiers(placed, reader, observe)
    stack.callback(tiers.close)
    run = placed.start(tiers, stack, show_progress=show_progress)
    stats = _stats(placed, tiers, reader, run)
    if run.notice and calibration is None:  # a calibration made up for the occasion knows of no loss
        note(run.notice, show=notes)
    actuals = Actuals(placed, stats, show=notes)
    _attach(stack, placed, tiers, reader, stats, run, actuals)
    stack.callback(actuals.close)
    model = placed.opened.model
    if isinstance(placed, ExactPlacement) and placed.drafter_spec is not None:
        told: dict[str, Any] = {"show": notes, "room_price": placed.room_price}
        attach_drafters(stack, model, placed.drafter_spec, placed.config, placed.machine.device, stats, **told)
    return model


def plan_model(
    model_or_path: transformers.PreTrainedModel | str | Path, config: OffloadConfig, *, show_progress: bool | None
) -> RunPlan:
    """The plan of a run that is not begun: no weight is read. Arguments as of `engine.offload`.

    Raises:
        TiercacheError: whatever opening the model would raise.
    """
    with ExitStack() as stack:
        placed = _placement(model_or_path, config, stack, show_progress=show_progress, calibration=None)
        return planning.plan_of(placed)


def _placement(
    model_or_path: transformers.PreTrainedModel | str | Path,
    config: OffloadConfig,
    stack: ExitStack,
    *,
    show_progress: bool | None,
    calibration: Calibration | None,
) -> ExactPlacement | MixedPlacement:
    """Find the model and say what lies where; nothing is allocated."""
    compat.check_version()
    notes, mixed = show_progress is not False, config.mode == "mixed"
    machine = Machine.of(config, must_multiply=mixed, show=show_progress)
    stack.callback(device_of(machine.device).release_cache)  # runs last: a card is as free as it was before
    planning.refuse_another_machine(config, machine.device)
    config = drafting.with_planes(config, kernels=bool(machine.kernels), show=notes)
    opened = open_model(model_or_path, config, show_progress=show_progress, capability=machine.capability)
    place = opened.folder if opened.store is None else opened.store.folder
    if place is not None:
        stack.enter_context(in_use(place))
    placed: ExactPlacement | MixedPlacement
    if mixed:
        placed = mixed_fit.place(opened, config, machine, calibration)
    else:
        placed = exact.place(opened, config, machine, show=notes)
    planning.refuse_another_placement(config, placed)
    return placed


def _tiers(placed: Placement, reader: Reader, observe: Observer) -> TierStack:
    """Allocate the tiers; they are empty still."""
    gbps, opened = placed.config.link_gbps, placed.opened
    if gbps is not None and not placed.plan.has_hbm:
        raise UsageError("link_gbps= throttles copies to an HBM tier, and there is none; give hbm= a size")
    device = placed.machine.device
    return TierStack(placed.plan, opened.manifest, reader, device, opened.memory, observe, Link(gbps))


def _attach(
    stack: ExitStack, placed: Placement, tiers: TierStack, reader: Reader, stats: Stats, run: Run, actuals: Actuals
) -> None:
    """Put parameters and hooks in."""
    opened, machine, device = placed.opened, placed.machine, placed.machine.device
    model = opened.model
    table = opened.table(stack, tiers, device)
    uses = [_placed(use, tiers, run) for use in placed.asked.uses]
    workspace = Slab(placed.asked.workspace_bytes, device).bytes
    slots = drafting.widened(placed.config).context
    fusing = Fusing(stats.count_layer, slots) if placed.config.fuses else None
    bindings = Bindings(uses, tiers.top, workspace, machine.kernels, run.choosing, fusing)
    embedding, dense = opened.manifest.embedding[0], opened.dense(reader, device)
    attachment = Attachment(model, bindings, dense, embedding, table, device, run.blocks)
    stack.callback(attachment.close)
    capability = machine.capability
    if capability is not None and wanted(capability, model.dtype):
        stack.callback(SlicedForward(model.base_model, CardAttention(capability)).close)

    def start(tokens: int, resident: bool) -> None:
        tiers.follow_stream()
        attachment.begin_pass(resident=resident)
        if resident:  # what is on its way for the next exact pass goes on
            stats.resident_bytes += run.resident_bytes
            return
        on_cpu = 0 < tokens <= stats.cpu_tokens
        stats.cpu_passes += on_cpu
        tiers.begin(on_cpu=on_cpu)

    hooks = PassHooks(
        model,
        stats,
        context=slots,
        logits=placed.config.logits,
        passes=run.next_pass,
        start=start,
        finish=attachment.end_pass,
    )
    stack.callback(hooks.close)
    run_plan = planning.plan_of(placed)
    stats.plan = run_plan.hash
    refresh = _refresher(reader, table, machine, actuals)
    handle = OffloadHandle(run_plan, placed.plan, placed.asked, stats, refresh, run, _limits(placed))
    setattr(model, "tiercache", handle)  # noqa: B010 - no parameter
    stack.callback(_detach, opened)


def _limits(placed: Placement) -> TextLimits:
    """Of a text."""
    config, takes = placed.config, support(placed.opened.model)
    spec = placed.drafter_spec if isinstance(placed, ExactPlacement) else None
    keeps = takes.takes != "nothing" and not takes.recurrent
    if spec is None or spec.reason:
        return TextLimits(config.context, config.logits, keeps)
    keeps = keeps and spec.config.speckv is None
    slots = drafting.widened(config).context if keeps else None
    return TextLimits(config.context, config.logits, keeps, slots)


def _stats(placed: Placement, tiers: TierStack, reader: Reader, run: Run) -> Stats:
    """Statistics that have counted nothing yet."""
    machine, precision, direct = placed.machine, placed.config.precision, _reads_directly(placed.opened, reader)
    name = machine.kernels_name if placed.opened.store else "torch"
    stats = Stats(precision, str(machine.device), direct, tiers.stats, kernels=name)
    stats.compute_dtype, stats.cpu_tokens = name_of(placed.opened.model.dtype), run.cpu_tokens
    if tiers.link.gbps is not None:
        stats.link = f"emulated, {tiers.link.gbps:g} GB/s"
    if run.choosing is not None:
        stats.neurons, stats.lossy = run.choosing.stats, True
    return stats


def _reads_directly(opened: Opened, reader: Reader) -> bool:
    paths = {piece.path for unit in opened.manifest.units for piece in unit.pieces}
    return bool(paths) and all(reader.direct(path) for path in paths)


def _placed(use: Use, tiers: TierStack, run: Run) -> Use:
    """`use` with its weight as it lies in the uppermost tier, and the slots of its planes that stay."""
    staying = tuple(tiers.resident(key) for key in run.views.get(use.weight.units, ()))
    return replace(use, weight=tiers.plain.get(use.module, use.weight), resident=staying)


def _refresher(
    reader: Reader, table: torch.Tensor | EmbeddingRows, machine: Machine, actuals: Actuals
) -> Callable[[Stats], None]:
    """Brings those statistics up to date that others count."""

    def refresh(stats: Stats) -> None:
        stats.ssd_bytes = reader.read_bytes
        if isinstance(table, FileRows):
            stats.ssd_bytes += table.ssd_bytes
            stats.embedding_bytes = table.read_bytes
        stats.peak_rss_bytes = peak_rss_bytes()
        actuals.tell()
        stats.peak_device_bytes = device_of(machine.device).peak_bytes() or 0

    return refresh


def _detach(opened: Opened) -> None:
    delattr(opened.model, "tiercache")
    opened.closed()
