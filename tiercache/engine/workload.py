"""What a model asks of a machine, as the profiler's cost model wants it; from the very numbers that are allocated.

Knows models and requirements; neither machines nor seconds.
"""

from dataclasses import replace
from math import prod

import torch
import transformers

from profiler.workload import Matmul, Workload
from tiercache.config.options import OffloadConfig, of_planes
from tiercache.engine.compute_dtype import compute_dtype
from tiercache.engine.memory import Arithmetic, MemoryRequirements, memory_requirements
from tiercache.engine.source import Opened
from tiercache.model.card_attention import Capability
from tiercache.store.imagined import imagined_checkpoint, imagined_store
from tiercache.store.manifests import checkpoint_manifest
from tiercache.store.reader import Reader


def workload_of(opened: Opened, asked: MemoryRequirements, options: OffloadConfig) -> Workload:
    """The workload of a model that is open, or as good as open."""
    config = opened.model.config.get_text_config(decoder=True)
    matmuls: dict[tuple[int, ...], Matmul] = {}
    for use in asked.uses:
        units, shape = use.weight.units, use.weight.shape
        before = matmuls.get(units, Matmul(units, 0))
        matmuls[units] = Matmul(units, before.weights + prod(shape), before.width + sum(shape))
    heads = getattr(config, "num_attention_heads", 0)  # a model without attention has none
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return Workload(
        precision=options.precision,
        layers=config.num_hidden_layers,
        matmuls=tuple(matmuls.values()),
        needs=asked.needs,
        payload=asked.payload,
        context=options.context,
        kv_bytes=asked.needs.compute["KV cache"],
        attention_width=config.num_hidden_layers * heads * head_dim,
        reads={
            key: Reader.request_bytes(unit.pieces, options.settings.read_bytes)
            for key, unit in enumerate(opened.manifest.units)
        },
        readers=options.settings.read_threads,
        fused=asked.fused,
        table=opened.table_unit,
    )


def imagined_workload(
    config: transformers.PretrainedConfig,
    options: OffloadConfig,
    *,
    gpu: bool,
    capability: Capability | None = None,
) -> Workload:
    """The workload of a model of which there is only a configuration.

    Args:
        config: transformers' own.
        options: precision, context and logits count.
        gpu: whether a card computes; it need not be here.
        capability: of the card; None where nobody told, and its attention is taken for fused.

    Raises:
        UnsupportedModelError: a model that tiercache does not run.
    """
    configured = getattr(config, "dtype", None)
    dtype = configured if isinstance(configured, torch.dtype) else torch.bfloat16
    computes = compute_dtype(options.compute_dtype, dtype, capability)
    if not of_planes(options.precision):
        checkpoint = imagined_checkpoint(config, dtype)
        model, store = replace(checkpoint, dtype=computes).model(), None
        manifest = checkpoint_manifest(checkpoint, model)
    else:
        store = replace(imagined_store(config, dtype), dtype=computes)
        model = store.model()
        manifest = store.manifest(options.precision, by_rows=True, model=model)
    opened = Opened(model, model, manifest, None, False, store)
    device = torch.device("cuda" if gpu else "cpu")
    by_planes = of_planes(options.precision)
    arithmetic = Arithmetic(device, by_planes, on_cpu=not gpu, fused=options.fuses, capability=capability)
    return workload_of(opened, memory_requirements(opened, options, arithmetic), options)
