"""Times the plane kernels against the roof of the memory they read from, and torch's own products beside them.

One-token products are bound by memory, so enough copies of each matrix take turns that no call finds its weights in a
cache. GB/s counts codes and scales of the planes read, not activations; the seconds include making the activations
ready. Every case is checked against the reference before it is timed, on sampled outputs.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tiercache import __version__
from tiercache.bench import kernel_cases, kernels_cuda, torch_peers, workset
from tiercache.bench.kernel_cases import SHAPE_NAMES, Case
from tiercache.bench.shapes import GROUP
from tiercache.bench.timing_device import CpuDevice, Effort, TimingDevice, median_s, working_set_bytes
from tiercache.bench.torch_peers import Peer
from tiercache.doctor.checks import processor_name
from tiercache.errors import TiercacheError, UsageError
from tiercache.kernels.contract import MAX_TOKENS
from tiercache.progress import Advance, bar
from tiercache.quant.planes import PRECISIONS, Planes

SCHEMA = "tiercache.kernels/1"
TOLERANCE = 5e-3
"""Largest difference from the reference, relative to the root mean square of a token's results."""

TOKEN_COUNTS = (1, 4, 16, 32, 64)


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        shapes: names from `SHAPE_NAMES`.
        precisions: names of precisions.
        token_counts: tokens of a call.
        seed: of weights and activations.
        effort: how long.
        show_progress: draw a bar; None means where standard error is a terminal.

    Raises:
        UsageError: a name that there is not, or a number of tokens that no call takes.
    """

    shapes: tuple[str, ...] = ("7b",)
    precisions: tuple[str, ...] = tuple(PRECISIONS)
    token_counts: tuple[int, ...] = TOKEN_COUNTS
    seed: int = 0
    effort: Effort = field(default_factory=Effort)
    show_progress: bool | None = None

    def __post_init__(self) -> None:
        for what, chosen, choices in (("shape", self.shapes, SHAPE_NAMES), ("precision", self.precisions, PRECISIONS)):
            for name in chosen or ("",):
                if name not in choices:
                    raise UsageError(f"unknown {what} {name!r}; choose among {', '.join(choices)}")
        if not self.token_counts or not all(1 <= count <= MAX_TOKENS for count in self.token_counts):
            counts = ",".join(map(str, self.token_counts))
            raise UsageError(f"token counts {counts!r} cannot be timed; give some of 1 to {MAX_TOKENS}, such as 1,16")


def parse(shapes: str | None, precisions: str | None, token_counts: str | None) -> dict[str, Any]:
    """Arguments of `Options` from lists with commas; what is None is left out.

    Raises:
        UsageError: a number of tokens that is none.
    """
    given: dict[str, Any] = {}
    for name, text in (("shapes", shapes), ("precisions", precisions)):
        if text is not None:
            given[name] = tuple(part.strip() for part in text.split(","))
    if token_counts is not None:
        try:
            given["token_counts"] = tuple(int(part) for part in token_counts.split(","))
        except ValueError as error:
            raise UsageError(f"{token_counts!r} is no list of numbers of tokens; give one such as 1,16") from error
    return given


def bench(options: Options, devices: Sequence[TimingDevice] | None = None) -> dict[str, Any]:
    """Measure; by default on the processor and, where there is one, the GPU.

    Raises:
        TiercacheError: a kernel's results are wrong.
    """
    places: Sequence[TimingDevice] = (CpuDevice(), *kernels_cuda.devices()) if devices is None else devices
    pool = workset.Pool.make(options.seed)
    chosen = [case for shape in options.shapes for case in kernel_cases.cases(shape)]
    total = len(places) * sum(_bar_bytes(case, options) for case in chosen)
    runs = []
    with bar("timing kernels", total, show=options.show_progress) as advance:
        for device in places:
            try:
                runs.append(_Run(device, options, pool, advance).all())
            finally:
                device.close()
    return {
        "schema": SCHEMA,
        "tiercache": __version__,
        "torch": torch.__version__,
        "hardware": {
            "processor": processor_name(),
            "cores": len(os.sched_getaffinity(0)),
            "threads": torch.get_num_threads(),
        },
        "seed": options.seed,
        "group": GROUP,
        "tolerance": TOLERANCE,
        "stands": [run["device"] for run in runs],
        "results": [row for run in runs for row in run["results"]],
    }


class _Run:
    """The cases of one device."""

    def __init__(self, device: TimingDevice, options: Options, pool: workset.Pool, advance: Advance) -> None:
        self._device, self._options, self._pool, self._advance = device, options, pool, advance
        self._left_out: dict[str, str] = {}
        self._roofs: list[float] = []

    def all(self) -> dict[str, Any]:
        """Rows of every case, and what was found of the device."""
        rows = []
        for shape in self._options.shapes:
            rows += [row for layout in _by_layout(kernel_cases.cases(shape)) for row in self._layout(layout)]
        found = {
            "device": self._device.label,
            "kernels": self._device.kernels.name,
            "roofs_gbps": self._roofs,
            "cache_bytes": self._device.cache_bytes,
            "working_set_bytes": working_set_bytes(self._device, self._options.effort),
            "peers_left_out": self._left_out,
        }
        return {"device": found, "results": rows}

    def _layout(self, layout: Sequence[Case]) -> Iterator[dict[str, Any]]:
        """Rows of cases that share their matrices."""
        inputs = {case: self._activations(case) for case in layout}
        peers = {case: self._peers(case, inputs[case]) for case in layout}
        first = layout[0]
        for precision in self._options.precisions:
            rows: list[dict[str, Any]] = []
            shape = (first.rows, first.columns, first.parts)
            units = workset.make(self._device, self._options.effort, self._pool, shape, precision)
            before = self._roof(units)
            for case in layout:
                rows += [row | _beside(peers[case], row["tokens"]) for row in self._case(case, units, inputs[case])]
                self._advance(case.weights)
            roof = (before + self._roof(units)) / 2  # others use the same memory: what it gives changes within seconds
            del units  # before the next take their memory
            yield from (row | {"roof_gbps": roof, "ratio": row["gbps"] / roof} for row in rows)

    def _roof(self, units: list[tuple[Planes, ...]]) -> float:
        """Of the very memory that the matrices lie in."""
        storage = units[0][0].planes[0].untyped_storage()  # it may lie in pinned main memory though the device is a GPU
        memory = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        self._roofs.append(self._device.roof_gbps(self._options.effort, memory))
        return self._roofs[-1]

    def _activations(self, case: Case) -> Tensor:
        """bf16 [most tokens, inputs]; a call of fewer tokens takes the first."""
        generator = torch.Generator().manual_seed(self._options.seed)
        return torch.randn(max(self._options.token_counts), case.inputs, generator=generator).bfloat16()

    def _case(self, case: Case, units: list[tuple[Planes, ...]], x: Tensor) -> Iterator[dict[str, Any]]:
        device = self._device
        weights = kernel_cases.work(case, units)
        wanted = kernel_cases.expected(case, weights[0], x)
        x = x.to(device.torch_device)
        read = sum(workset.nbytes(weight) for weight in weights[0])
        for tokens in self._options.token_counts:
            out = torch.zeros(tokens, case.outputs, device=device.torch_device)
            call = kernel_cases.bound_call(device.kernels, case, weights, x[:tokens], out)
            call(0)
            error = kernel_cases.error(wanted, out.cpu())
            if not error <= TOLERANCE:  # NaN too
                raise TiercacheError(
                    f"{device.kernels.name} is wrong: {case.kernel} of {case.all_rows} x {case.columns} at "
                    f"{units[0][0].precision} and {tokens} tokens is {error:.2g} off the reference, "
                    f"{TOLERANCE} is allowed; "
                    "please report this with your processor's or GPU's name"
                )
            seconds = median_s(device, call, self._options.effort)
            yield {
                "kernel": case.kernel,
                "device": device.label,
                "shape": case.shape,
                "precision": units[0][0].precision,
                "tokens": tokens,
                "rows": case.all_rows,
                "columns": case.columns,
                "gbps": read / seconds / 1e9,
                "seconds": seconds,
                "gflops": 2 * tokens * case.weights / seconds / 1e9,
                "max_error": error,
            }

    def _peers(self, case: Case, x: Tensor) -> dict[tuple[str, int], tuple[float, float]]:
        """Seconds and GB/s of each peer that works here, by its name and the number of tokens."""
        found: dict[tuple[str, int], tuple[float, float]] = {}
        for peer in self._device.peers:
            if peer.name in self._left_out:
                continue
            try:
                found |= self._peer(peer, case, x.to(self._device.torch_device))
            except (RuntimeError, AttributeError, NotImplementedError) as error:
                self._left_out[peer.name] = str(error).partition("\n")[0]
        return found

    def _peer(self, peer: Peer, case: Case, x: Tensor) -> dict[tuple[str, int], tuple[float, float]]:
        device, effort = self._device, self._options.effort
        pool = self._pool.codes.to(device.torch_device)
        kernel = "product" if case.kernel == "products" else case.kernel  # one of as many rows: torch's best case
        packed = [peer.pack(*shape, pool) for shape in torch_peers.shapes(kernel, case.all_rows, case.columns)]
        read = torch_peers.nbytes(packed)
        ready = torch_peers.copies(packed, -(-working_set_bytes(device, effort) // read), device.memory)
        found = {}
        for tokens in self._options.token_counts:
            call = torch_peers.bound_call(peer, kernel, x[:tokens], ready)
            with torch.inference_mode():
                seconds = median_s(device, call, effort)
            found[peer.name, tokens] = (seconds, read / seconds / 1e9)
        return found


def _by_layout(found: Sequence[Case]) -> list[list[Case]]:
    """Cases that use the same matrices, together."""
    groups: dict[tuple[int, int, int], list[Case]] = {}
    for case in found:
        groups.setdefault((case.rows, case.columns, case.parts), []).append(case)
    return list(groups.values())


def _bar_bytes(case: Case, options: Options) -> int:
    """How far a case moves the bar: its weights as bytes."""
    return case.weights * len(options.precisions)


def _beside(peers: dict[tuple[str, int], tuple[float, float]], tokens: int) -> dict[str, Any]:
    mine = {name: rates for (name, count), rates in peers.items() if count == tokens}
    return {
        "peers": {name: gbps for name, (_, gbps) in mine.items()},
        "peer_seconds": {name: seconds for name, (seconds, _) in mine.items()},
    }
