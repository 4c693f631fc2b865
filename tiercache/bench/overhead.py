"""Where the time of a pass goes: microseconds a layer by cause, of plain, drafting and verifying passes.

Watches the calls of a pass from outside: kernels, the KV cache, layers, the head. What a cause took is its own time,
without that of the causes it calls. Watching a call costs 0.5 us itself. On a card the times are the host's: how long
it takes to queue the work.
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from policies.tables import Table
from tiercache.bench import shapes
from tiercache.compat import DynamicLayer, cache_kwargs, cache_out
from tiercache.config.options import OffloadConfig, of_planes
from tiercache.config.sizes import Budget
from tiercache.engine.machine import resolve_device
from tiercache.engine.offload import open_offloaded
from tiercache.kernels.contract import Kernels
from tiercache.kernels.select import select
from tiercache.model.growing_cache import GrowingCache, Room
from tiercache.model.meta_model import layer_of
from tiercache.tiers.device import device_of

SCHEMA = "tiercache.overhead/1"
PAST = 64  # tokens in the KV cache before each pass
TREES = (8, 64)
_ROUNDS, _CONTEXT, _NEW = 15, 512, 24
_METHODS: Mapping[str, str] = {
    "quantize_activations": "quantizing",
    "hadamard": "transforms",
    "matmul": "products",
    "matmuls": "products",
    "matmul_transposed": "products",
    "ffn": "products",
    "linear": "products",
}
_HALVES: Mapping[str, str] = {
    "project": "norm, q, k, v, rotary",
    "attend": "attention, o, residual",
    "step": "attention half",
    "forward": "norm, feed-forward, residual",
}
CAUSES = (*dict.fromkeys((*_METHODS.values(), *_HALVES.values())), "KV cache", "layers", "head", "around the layers")
"""What time is told apart by; "layers" is what is left of a layer: modules, hooks, Python."""


class Stopwatch:
    """Seconds by cause, each without those of the causes within it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    @contextmanager
    def cause(self, name: str) -> Iterator[None]:
        """The time within is the cause's."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def watched(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function, whose time is the cause's."""

        def call(*arguments: Any, **named: Any) -> Any:
            self._turn()
            self._open.append(name)
            try:
                return function(*arguments, **named)
            finally:
                self._turn()
                self._open.pop()

        return call

    def _turn(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure.

    Attributes:
        shape: of a model of random weights; see `shapes.SHAPES`.
        model: a checkpoint or a store, instead of a shape.
        precision, hbm, dram: as `offload` takes them.
        folder, seed: as `model.Options`.
        show_progress: draw bars; None means where standard error is a terminal.
    """

    shape: str = "tinyllama-1.1b"
    model: Path | None = None
    precision: Any = "int4"
    hbm: str | None = None
    dram: str = "auto"
    folder: Path
    seed: int = 0
    show_progress: bool | None = None


def bench(options: Options) -> dict[str, Any]:
    """Run passes of each kind.

    Raises:
        UsageError: no such shape.
    """
    device = resolve_device("auto")
    drafts = options.precision in ("int8", "int4")
    config = OffloadConfig(
        hbm=None if options.hbm is None else Budget.parse(options.hbm),
        dram=Budget.parse(options.dram),
        precision=options.precision,
        context=_CONTEXT,
        logits=max(TREES),
        resident=drafts,
    )
    watch = Stopwatch()
    with ExitStack() as stack:
        if of_planes(options.precision):
            stack.enter_context(_watched_kernels(select(device), watch))
        model: Any = stack.enter_context(open_offloaded(_place(options), config, show_progress=options.show_progress))
        stack.enter_context(_watched_modules(model, watch))
        passes = {"plain": (1, "exact"), **{f"verifying {n}": (n, "exact") for n in TREES}}
        if drafts:
            passes["drafting"] = (1, "resident")
        found = {name: _timed(model, watch, *how) for name, how in passes.items()}
        found["generate"] = _generated(model, watch)
        layers, stats = model.config.get_text_config().num_hidden_layers, model.tiercache.stats().to_dict()
    return {
        "schema": SCHEMA,
        "model": str(options.model or options.shape),
        **{name: getattr(options, name) for name in ("precision", "hbm", "dram", "seed")},
        "device": str(device),
        "kernels": stats["kernels"],
        "layers": layers,
        "fused_layers": stats["fused_layers"],
        "unfused_layers": stats["unfused_layers"],
        "threads": torch.get_num_threads(),
        "passes": found,
    }


def report(result: dict[str, Any]) -> str:
    """A table for a person: microseconds a layer."""
    return tables(result)[0].text


def tables(result: dict[str, Any]) -> tuple[Table, ...]:
    """Microseconds a layer by cause; of a pass what is no layer's, divided by the layers too."""
    layers, passes = result["layers"], result["passes"]
    rows = []
    for cause in (*CAUSES, "sampling loop"):
        values = [passes[kind]["us"].get(cause) for kind in passes]
        if any(values):
            rows.append((cause, *("" if not value else f"{value / layers:.1f}" for value in values)))
    rows.append(("all", *(f"{sum(passes[kind]['us'].values()) / layers:.1f}" for kind in passes)))
    title = f"{result['model']} {result['precision']}, us a layer ({layers}), {result['kernels']}"
    return (Table(title, ("cause", *passes), tuple(rows)),)


def _place(options: Options) -> Path:
    if options.model is not None:
        return options.model
    planes = of_planes(options.precision)
    folder = options.folder.expanduser() / f"{options.shape}-{'planes' if planes else 'bf16'}-{options.seed}"
    make = shapes.make_store if planes else shapes.make_checkpoint
    return make(shapes.find(options.shape), folder, options.seed, show_progress=options.show_progress)


@contextmanager
def _watched_kernels(kernels: Kernels, watch: Stopwatch) -> Iterator[None]:
    """Within, calls of the kernels are watched, and those of the halves that they make."""

    def halves(make: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def made(weights: Any) -> Any:
            half = make(weights)
            for name, cause in _HALVES.items():
                if hasattr(half, name):
                    setattr(half, name, watch.watched(getattr(half, name), cause))
            return half

        return made

    names = (*_METHODS, "attention", "feed_forward")
    for name in names:
        method = getattr(kernels, name)
        setattr(kernels, name, watch.watched(method, _METHODS[name]) if name in _METHODS else halves(method))
    try:
        yield
    finally:
        for name in names:
            delattr(kernels, name)


@contextmanager
def _watched_modules(model: Any, watch: Stopwatch) -> Iterator[None]:
    """Within, layers, the head and the KV cache are watched."""
    kinds: Any = ((DynamicLayer, "update"), (GrowingCache, "room"), (Room, "views"), (Room, "keep"))
    methods = [getattr(kind, name) for kind, name in kinds]
    for kind, name in kinds:
        setattr(kind, name, watch.watched(getattr(kind, name), "KV cache"))
    before = []
    for name, module in model.named_modules():
        head = module is model.get_output_embeddings()
        if head or (layer_of(name) is not None and layer_of(name.rpartition(".")[0]) is None):
            before.append((module, module.__dict__.get("forward")))
            module.forward = watch.watched(module.forward, "head" if head else "layers")
    try:
        yield
    finally:
        for (kind, name), method in zip(kinds, methods, strict=True):
            setattr(kind, name, method)
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _timed(model: Any, watch: Stopwatch, tokens: int, kind: str) -> dict[str, Any]:
    """Microseconds of a pass by cause, of the median pass."""
    device = device_of(model.device)
    ids = torch.arange(PAST + tokens, device=model.device)[None] % 100
    samples = []
    with torch.inference_mode():
        for _ in range(_ROUNDS):
            cache = cache_out(model(input_ids=ids[:, :PAST], use_cache=True, logits_to_keep=1))
            device.synchronize()
            watch.seconds.clear()
            with model.tiercache.passes(kind), watch.cause("around the layers"):
                model(input_ids=ids[:, PAST:], **cache_kwargs(model, cache), use_cache=True)
                device.synchronize()
            samples.append(dict(watch.seconds))
    return _median(samples, tokens)


def _generated(model: Any, watch: Stopwatch) -> dict[str, Any]:
    """Microseconds of a token that `generate` decodes, the loop around the passes apart."""
    ids = torch.arange(PAST, device=model.device)[None] % 100
    forward, samples = model.forward, []
    model.forward = watch.watched(forward, "around the layers")
    try:
        for _ in range(3):
            model.generate(ids, max_new_tokens=1, do_sample=False)
            watch.seconds.clear()
            with watch.cause("sampling loop"):
                model.generate(ids, max_new_tokens=_NEW, min_new_tokens=_NEW, do_sample=False)
            samples.append({cause: seconds / _NEW for cause, seconds in watch.seconds.items()})
    finally:
        model.forward = forward
    return _median(samples, 1)


def _median(samples: list[dict[str, float]], tokens: int) -> dict[str, Any]:
    samples.sort(key=lambda sample: sum(sample.values()))
    us = {cause: 1e6 * seconds for cause, seconds in samples[len(samples) // 2].items()}
    spread = statistics.quantiles([sum(sample.values()) for sample in samples], n=4)
    return {"tokens": tokens, "us": us, "pass_ms": sum(us.values()) / 1e3, "quartiles_ms": [1e3 * q for q in spread]}
