"""`offload`: puts a model's weights into tiers, hands the model to the caller, and takes everything back.

Brings the parts together: what was named, its demand, the plan, the tiers, the hooks. Decides nothing itself: what
stays where is the plan's, what moves when is the tiers'.
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
import transformers

from tiercache import compat
from tiercache.config import Budget, KernelChoice, OffloadConfig, Options, Precision, SizeLike, read_options
from tiercache.engine import drafting
from tiercache.engine.budgets import choose
from tiercache.engine.exact import ExactPlan, place
from tiercache.engine.handle import OffloadHandle, Resident
from tiercache.engine.memory import MemoryRequirements
from tiercache.engine.mixed import MixedRun
from tiercache.engine.mixed_plan import MixedPlan
from tiercache.engine.plan import Plan
from tiercache.engine.source import Opened, open_model
from tiercache.errors import EnvironmentUnsupportedError, UsageError
from tiercache.kernels.contract import Kernels
from tiercache.kernels.reference import ReferenceKernels
from tiercache.kernels.select import select, will_compile
from tiercache.model.attach import Attachment
from tiercache.model.binding import Bindings, Use, weight_of
from tiercache.model.embedding import EmbeddingRows, FileRows, TableRows
from tiercache.model.pass_hooks import NextPass, PassHooks, refuse_closed
from tiercache.progress import note
from tiercache.quant.planes import PRECISIONS
from tiercache.stats import Stats, peak_rss_bytes
from tiercache.store.calibration import Calibration
from tiercache.store.encode import load
from tiercache.store.reader import Reader
from tiercache.tiers.breakeven import breakeven_tokens
from tiercache.tiers.link import Link
from tiercache.tiers.slab import Slab
from tiercache.tiers.stack import Observer, TierStack


@contextmanager
def offload(
    model_or_path: transformers.PreTrainedModel | str | Path,
    *,
    hbm: SizeLike | None = "auto",
    dram: SizeLike = "auto",
    precision: Precision | None = None,
    context: int = 4096,
    logits: int = 512,
    store: str | Path | None = None,
    device: str = "auto",
    checks: bool = False,
    kernels: KernelChoice = "auto",
    cpu_tokens: int | None = None,
    show_progress: bool | None = None,
    observe: Observer = lambda tier, event, key: None,
    **options: Unpack[Options],
) -> Iterator[transformers.PreTrainedModel]:
    """Run a model whose weights need not fit: `with offload("path", hbm="22GiB", dram="48GiB") as model:`.

    The model is the transformers model itself; its logits are those it would have had fully resident.

    Args:
        model_or_path: a checkpoint's folder or Hub id, a plane store, or a model in main memory (which gets its
            parameters back at the end, the same objects).
        hbm: budget of the fastest tier: a size ("22GiB"), a share (0.9), or "auto" for nine tenths of what the GPU
            has free. Without a GPU an explicit size makes a region of main memory stand in for it; "auto" then means
            that the CPU computes straight from DRAM.
        dram: budget of main memory, likewise. The budgets cover weights, staging, workspace, KV cache and activations.
        precision: "source" for the original weights, or the precision of the planes: "int8", "int4", "int3". By default
            "source"; with mode="mixed" "int8".
        context: tokens, over the batch, for which KV cache and activations are reserved.
        logits: rows of logits that one pass may return (generation needs one per sequence).
        store: the plane store's folder; made there if missing. By default one in the cache folder.
        device: "auto", "cpu", "cuda" or "cuda:N".
        checks: verify every checksum of the store first.
        kernels: "fast" multiplies by planes as they lie; "decode" makes a weight of each first, which is slow, and
            equal to the bit to the rounded model in transformers; "auto" is fast where it can be, and warns where not.
        cpu_tokens: up to how many tokens a pass lets the CPU multiply, where they lie in DRAM, the planes that do not
            stay in HBM, instead of copying them up; 0 for never. None measures it where the CPU stands in for the HBM
            tier, and means 0 on a GPU, whose sums differ from the CPU's in the last bits.
        show_progress: draw bars on standard error; None means where that is a terminal.
        observe: is told (tier, event, unit) of every decision, for traces.
        options: mode="mixed" and what belongs to it (`config.MixedOptions`), or drafter= and what does to that
            (`config.DraftOptions`).

    Raises:
        UsageError, UnsupportedModelError: something that cannot be meant, or is not supported.
        DoesNotFitError: a budget is too small; raised before anything is loaded.
        StoreError: a damaged or foreign checkpoint or store.
        EnvironmentUnsupportedError: no such device, or not enough disk.
    """
    places: dict[str, Any] = {"hbm": hbm if hbm is None else Budget.parse(hbm), "dram": Budget.parse(dram)}
    sizes: dict[str, Any] = {"context": context, "logits": logits, "cpu_tokens": cpu_tokens}
    precision = precision or ("int8" if options.get("mode") == "mixed" else "source")
    chosen: dict[str, Any] = {"precision": precision, "device": device, "checks": checks, "kernels": kernels}
    chosen["store"] = None if store is None else Path(store).expanduser()
    config = OffloadConfig(**places, **sizes, **chosen, **read_options(options))
    with open_offloaded(model_or_path, config, show_progress=show_progress, observe=observe) as model:
        yield model


@contextmanager
def open_offloaded(
    model_or_path: transformers.PreTrainedModel | str | Path,
    config: OffloadConfig,
    *,
    show_progress: bool | None = None,
    observe: Observer = lambda tier, event, key: None,
    calibration: Calibration | None = None,
) -> Iterator[transformers.PreTrainedModel]:
    """`offload` with its options read already; `calibration` stands in for the store's own."""
    with ExitStack() as stack:
        with torch.inference_mode(False):  # a caller's own would make tensors that the rehearsal cannot follow
            model = _open(stack, model_or_path, config, show_progress, observe, calibration)
        yield model


def _open(
    stack: ExitStack,
    model_or_path: transformers.PreTrainedModel | str | Path,
    config: OffloadConfig,
    show_progress: bool | None,
    observe: Observer,
    calibration: Calibration | None,
) -> transformers.PreTrainedModel:
    """Everything that `offload` does before it hands the model out; what undoes it goes on `stack`."""
    compat.check_version()
    target = resolve_device(config.device)
    if target.type == "cuda":
        stack.callback(torch.cuda.empty_cache)  # the last to run: the card is as free as it was before
    kernels = _kernels(config, target, show_progress)
    config = drafting.with_planes(config, kernels=bool(kernels), show=show_progress is not False)
    if config.resident and config.cpu_tokens and target.type != "cpu":
        raise UsageError(
            f"cpu_tokens={config.cpu_tokens} would multiply some planes of a matrix on {target} and others on the CPU, "
            "which resident passes rule out; leave cpu_tokens= out, or choose drafter='ngram'"
        )
    opened = open_model(model_or_path, config, show_progress=show_progress)
    way: MixedPlan | None = None
    placed: ExactPlan | None = None
    if config.mode == "mixed":
        way, opened, asked, made = choose(opened, config, target, calibration)
    else:
        placed = place(opened, config, target, kernels=bool(kernels), show=show_progress is not False)
        config, opened, asked, made = placed.config, placed.opened, placed.asked, placed.plan
    reader = stack.enter_context(Reader())
    if config.link_gbps is not None and made.hbm is None:
        raise UsageError("link_gbps= throttles copies to an HBM tier, and there is none; give hbm= a size")
    link = Link(config.link_gbps)
    tiers = TierStack(made, opened.manifest, reader, target, opened.memory, observe, link)
    stack.callback(tiers.close)
    cpu_tokens = _cpu_tokens(config, made, kernels, target)  # measured while the tiers are still empty
    below = way is not None and _below(config, made, kernels, target)
    tiers.load(show_progress=show_progress)
    name = "torch" if config.precision == "source" else kernels[target.type].name if kernels else "decode"
    stats = Stats(config.precision, str(target), _reads_directly(opened, reader), tiers.stats, kernels=name)
    stats.cpu_tokens = cpu_tokens
    if link.gbps is not None:
        stats.link = f"emulated, {link.gbps:g} GB/s"
    places = (opened, made, tiers, link, config, kernels, target)
    run = None if way is None else MixedRun.start(stack, way, *places, below=below)
    if run is not None:
        stats.neurons, stats.lossy = run.choosing.stats, True
        if calibration is None:  # one that was made up for the occasion knows of no loss
            note(run.loss_line, show=show_progress is not False)
    _attach(stack, opened, asked, made, tiers, reader, target, stats, config, kernels, run)
    if placed is not None and placed.drafter_spec is not None:
        told: dict[str, Any] = {"show": show_progress is not False, "room_price": placed.room_price}
        drafting.attach(stack, opened.model, placed.drafter_spec, config, target, stats, **told)
    return opened.model


def _kernels(config: OffloadConfig, device: torch.device, show_progress: bool | None) -> dict[str, Kernels]:
    """Who multiplies by planes, by device; nobody decodes them, which is said aloud where it was not asked for."""
    if config.precision == "source" or config.kernels == "decode":
        return {}
    if will_compile():
        note("compiling the kernels for this processor, once; it takes about half a minute", show=show_progress)
    found: dict[str, Kernels] = {}
    try:
        found[device.type] = select(device)
        if device.type != "cpu":
            found["cpu"] = select(torch.device("cpu"))
    except EnvironmentUnsupportedError as error:
        if config.kernels == "fast" and not found:
            raise
        lost = "nothing is multiplied in DRAM" if found else "every matrix is decoded before it is multiplied"
        warnings.warn(f"{lost}, which is slow: {error}", stacklevel=6)
        if config.mode == "mixed":
            found = {"cpu": ReferenceKernels(), device.type: ReferenceKernels(device)} | found
    return found


def _cpu_tokens(config: OffloadConfig, made: Plan, kernels: dict[str, Kernels], device: torch.device) -> int:
    """Up to how many tokens a pass lets the CPU multiply what does not stay in HBM."""
    passing = made.hbm is not None and len(made.hbm.placement.pinned) < len(made.hbm.order)
    if not passing or "cpu" not in kernels or config.mode == "mixed":  # neurons are chosen where the model computes
        return 0
    if config.resident and device.type != "cpu":  # the planes of one matrix would lie on two devices
        return 0
    if config.cpu_tokens is not None:
        return config.cpu_tokens
    if device.type != "cpu":  # the CPU's sums are fixed point, the GPU's fp32: placement would change the logits
        return 0
    return breakeven_tokens(kernels["cpu"], PRECISIONS[config.precision], device)


def _below(config: OffloadConfig, made: Plan, kernels: dict[str, Kernels], device: torch.device) -> bool:
    """Whether the CPU multiplies, in DRAM, neurons that have no slot in HBM: as asked for, or on a GPU by cost."""
    if made.hbm is None or "cpu" not in kernels:
        return False
    if config.cpu_tokens is not None:
        return config.cpu_tokens > 0
    return device.type != "cpu" and breakeven_tokens(kernels["cpu"], PRECISIONS["int8"], device) > 0


def resolve_device(name: str) -> torch.device:
    """The device that was asked for; "auto" is the first GPU if torch can use one.

    Raises:
        EnvironmentUnsupportedError: it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise EnvironmentUnsupportedError(
                f"device={name!r}, but torch {torch.__version__} sees {count} GPUs; run 'tiercache doctor', or ask for "
                "device='cpu'"
            )
        torch.cuda.init()  # memory statistics are refused before it
        return torch.device("cuda", device.index or 0)
    return device


def _reads_directly(opened: Opened, reader: Reader) -> bool:
    paths = {piece.path for unit in opened.manifest.units for piece in unit.pieces}
    return bool(paths) and all(reader.direct(path) for path in paths)


def _attach(
    stack: ExitStack,
    opened: Opened,
    asked: MemoryRequirements,
    made: Plan,
    tiers: TierStack,
    reader: Reader,
    device: torch.device,
    stats: Stats,
    config: OffloadConfig,
    kernels: dict[str, Kernels],
    mixed: MixedRun | None,
) -> None:
    """Put hooks and parameters in; what undoes them goes on `stack`."""
    model = opened.model
    table = _table(stack, opened, tiers, device)
    views = dict(zip(asked.needs.together, made.resident(asked.needs.together), strict=True))
    resident_bytes = sum(asked.payload[key] for view in views.values() for key in view)
    uses, choosing = [_placed(use, tiers, views) for use in asked.uses], None if mixed is None else mixed.choosing
    bindings = Bindings(uses, tiers.top, Slab(asked.workspace_bytes, device).bytes, kernels, choosing)
    attachment = Attachment(
        model,
        bindings,
        _dense(opened, reader, device),
        opened.manifest.embedding[0],
        table,
        device,
        () if mixed is None else mixed.blocks,
    )
    stack.callback(attachment.close)

    def start(tokens: int, resident: bool) -> None:
        attachment.begin_pass(resident=resident)
        if resident:  # what is on its way for the next exact pass goes on
            stats.resident_bytes += resident_bytes
            return
        below = 0 < tokens <= stats.cpu_tokens
        stats.cpu_passes += below
        tiers.begin(on_cpu=below)

    limits, passes = {"context": drafting.widened(config).context, "logits": config.logits}, NextPass()
    guard = PassHooks(model, stats, **limits, passes=passes, start=start, finish=attachment.end_pass)
    stack.callback(guard.close)

    def refresh(account: Stats) -> None:
        account.ssd_bytes = reader.read_bytes
        if isinstance(table, FileRows):
            account.ssd_bytes += table.ssd_bytes
            account.embedding_bytes = table.read_bytes
        account.peak_rss_bytes = peak_rss_bytes()
        if device.type == "cuda":
            account.peak_device_bytes = torch.cuda.max_memory_reserved(device)

    resident = Resident(passes, resident_bytes) if config.resident else None
    setattr(model, "tiercache", OffloadHandle(made, asked, stats, refresh, mixed, resident))  # noqa: B010 - no parameter
    stack.callback(_detach, model, opened.given)


def _placed(use: Use, tiers: TierStack, views: Mapping[tuple[int, ...], tuple[int, ...]]) -> Use:
    """`use` with its weight as it lies in the uppermost tier, and the slots of its planes that stay."""
    staying = tuple(tiers.resident(key) for key in views.get(use.weight.units, ()))
    return replace(use, weight=tiers.weights[use.module], resident=staying)


def _detach(model: transformers.PreTrainedModel, given: bool) -> None:
    delattr(model, "tiercache")
    if not given:  # its weights are gone for good
        model.register_forward_pre_hook(refuse_closed)


def _table(stack: ExitStack, opened: Opened, tiers: TierStack, device: torch.device) -> torch.Tensor | EmbeddingRows:
    """Where token embeddings are looked up: a tier, the caller's own table, or the file."""
    _, weight = opened.manifest.embedding
    if opened.given:
        table = weight_of(opened.model.get_submodule(opened.manifest.embedding[0])).data
        return table if device.type == "cpu" else TableRows(table)
    found = tiers.table(weight)
    if found is None:
        (piece,) = opened.manifest.units[weight.unit].pieces
        rows = FileRows(piece, weight.shape, weight.dtype)
        stack.callback(rows.close)
        return rows
    return found if found.device == device and found.dtype == opened.model.dtype else TableRows(found)


def _dense(opened: Opened, reader: Reader, device: torch.device) -> dict[str, torch.Tensor]:
    """Parameters that stay beside the model for good."""
    if opened.given:  # the caller's own, but frozen: no gradient can be right when weights pass through
        multiplied = {f"{module}.weight" for module in (*opened.manifest.weights, opened.manifest.embedding[0])}
        named = opened.model.named_parameters(remove_duplicate=False)
        return {name: parameter.data.to(device) for name, parameter in named if name not in multiplied}
    own = dict(opened.meta_model.named_parameters())
    return {name: load(reader, ref).to(device, own[name].dtype) for name, ref in opened.manifest.dense.items()}
