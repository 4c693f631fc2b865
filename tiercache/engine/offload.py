"""`offload`: puts a model's weights into tiers, hands the model to the caller, and takes everything back.

Reads the options; everything else is `engine.session`'s.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import torch
import transformers

from policies.run_plan import RunPlan
from tiercache.config.options import (
    ComputeDtype,
    KernelChoice,
    OffloadConfig,
    OffloadOptions,
    Precision,
    default_precision,
    read_options,
)
from tiercache.config.sizes import Budget, SizeLike
from tiercache.engine.planning import PlanLike, read_plan, with_plan
from tiercache.engine.session import open_session
from tiercache.store.calibration import Calibration
from tiercache.tiers.stack import Observer


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
    compute_dtype: ComputeDtype = "auto",
    cpu_tokens: int | None = None,
    show_progress: bool | None = None,
    observe: Observer = lambda tier, event, key: None,
    plan: PlanLike = "auto",
    force_plan: bool = False,
    **options: Unpack[OffloadOptions],
) -> Iterator[transformers.PreTrainedModel]:
    """Run a model whose weights need not fit: `with offload("path", hbm="22GiB", dram="48GiB") as model:`.

    The model is the transformers model itself; its logits [batch, tokens, vocabulary] are those it would have had fully
    resident. `model.tiercache` (`engine.handle.OffloadHandle`) tells of the run: `run_plan`, `stats()`, ...
    After the `with` block a model that was opened here has no weights any more.

    Sizes are counts of bytes or texts: "GiB" is 2**30 bytes, "GB" 10**9, a float a share of what there is.

    Args:
        model_or_path: a checkpoint's folder or Hub id, a plane store, or a model in main memory (which gets its
            parameters back at the end, the same objects).
        hbm: budget of the fastest tier: a size ("22GiB"), a share of all of the GPU's memory (0.9), or "auto" for nine
            tenths of what it has free; more than it has free is refused. Without a GPU an explicit size makes a region
            of main memory stand in for it; "auto" then means that the CPU computes straight from DRAM.
        dram: budget of main memory, likewise. The budgets cover weights, staging, workspace, KV cache and activations.
        precision: "source" for the original weights, or the precision of the planes: "int8", "int4", "int3". By default
            "source"; with mode="mixed" "int8".
        context: tokens, over the batch, for which KV cache and activations are reserved.
        logits: rows [vocabulary] of logits that one pass may return (generation needs one per sequence).
        store: the plane store's folder; made there if missing. By default one in the cache folder.
        device: "auto", "cpu", "cuda" or "cuda:N".
        checks: verify every checksum of the store first.
        kernels: "fast" multiplies by planes as they lie, whole layers at a time where it can; "unfused" does so module
            by module; "decode" makes a weight of each first, which is slow, and equal to the bit to the rounded model
            in transformers; "auto" is fast where it can be, and warns where not.
        compute_dtype: "fp32", "fp16" or "bf16", into which weights are converted as they are bound; "auto" is the
            checkpoint's own wherever the device has it at full speed, which the CPU does. GPUs below 7.0 compute 16
            bits in fp32, 7.0 and 7.5 compute bf16 in fp16.
        cpu_tokens: up to how many tokens a pass lets the CPU multiply, where they lie in DRAM, the planes that do not
            stay in HBM, instead of copying them up; 0 for never. None measures it where the CPU stands in for the HBM
            tier, and means 0 on a GPU, whose sums differ from the CPU's in the last bits.
        show_progress: draw bars on standard error; None means where that is a terminal.
        observe: is told (tier, event, unit) of every decision, for traces.
        plan: "auto" takes the way that is predicted to be fastest on this machine, as far as it was measured
            ('tiercache-profile probe'); "default" the rules of thumb; a plan's file (or `model.tiercache.run_plan` of
            an earlier run) places everything as it did then, and stands for the options that it was made with.
        force_plan: take a plan that was made on another machine.
        options: mode="mixed" and what belongs to it (`config.MixedOptions`), or drafter= and what does to that
            (`config.DraftOptions`).

    Raises:
        UsageError, UnsupportedModelError: something that cannot be meant, or is not supported.
        DoesNotFitError: a budget is too small, by `missing_bytes`; raised before anything is loaded. A pass that would
            outgrow `context` or `logits` raises `ContextExceededError`, which is one.
        StoreError: a damaged or foreign checkpoint or store.
        EnvironmentUnsupportedError: no such device, or not enough disk.
    """
    places: dict[str, Any] = {"hbm": hbm if hbm is None else Budget.parse(hbm), "dram": Budget.parse(dram)}
    sizes: dict[str, Any] = {"context": context, "logits": logits, "cpu_tokens": cpu_tokens}
    precision = precision or default_precision(options)
    chosen: dict[str, Any] = {"precision": precision, "device": device, "checks": checks, "kernels": kernels}
    chosen["compute_dtype"] = compute_dtype
    chosen["store"] = None if store is None else Path(store).expanduser()
    config = OffloadConfig(**places, **sizes, **chosen, **read_options(options), force_plan=force_plan)
    read = read_plan(plan)
    config = with_plan(config, read) if isinstance(read, RunPlan) else replace(config, plan=read)
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
        given: dict[str, Any] = {"show_progress": show_progress, "observe": observe, "calibration": calibration}
        with torch.inference_mode(False):  # a caller's own would make tensors that a pass on the meta device cannot use
            model = open_session(model_or_path, config, stack, **given)
        yield model
