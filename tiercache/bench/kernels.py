"""Times the plane kernels against the roof of the memory they read from.

One-token products are bound by memory, so enough copies of each matrix take turns that no call finds its weights in a
cache. GB/s counts codes and scales of the planes read, not activations; the seconds include quantizing the activations.
Every case is checked against the reference before it is timed.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from profiler.processor import processor_name
from tiercache import __version__
from tiercache.bench import kernel_cases, timing_device, workset
from tiercache.bench.kernel_cases import Case
from tiercache.bench.shapes import GROUP
from tiercache.bench.timing_device import Effort, TimingDevice, median_s, working_set_bytes
from tiercache.errors import TiercacheError, UsageError
from tiercache.kernels.contract import MAX_TOKENS
from tiercache.progress import Advance, bar
from tiercache.quant.planes import PRECISIONS, Planes

SCHEMA = "tiercache.kernels/1"
TOLERANCE = 5e-3
"""Largest difference from the reference, relative to the root mean square of a token's results."""

# Times peers at a case: what to add to the row of each number of tokens.
Peers = Callable[[TimingDevice, Case, Tensor], dict[int, dict[str, Any]]]


@dataclass(frozen=True)
class Options:
    """What to measure.

    Attributes:
        shapes: names of models' shapes; see `kernel_cases.dimensions`.
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
    token_counts: tuple[int, ...] = (1, 4, 16, 32, 64)
    seed: int = 0
    effort: Effort = field(default_factory=Effort)
    show_progress: bool | None = None

    def __post_init__(self) -> None:
        for name in self.shapes:
            kernel_cases.dimensions(name)
        for name in self.precisions:
            if name not in PRECISIONS:
                raise UsageError(f"unknown precision {name!r}; choose among {', '.join(PRECISIONS)}")
        if not all(1 <= count <= MAX_TOKENS for count in self.token_counts):
            counts = ",".join(map(str, self.token_counts))
            raise UsageError(f"token counts {counts!r} cannot be timed; give some of 1 to {MAX_TOKENS}, such as 1,16")


def bench(
    options: Options, devices: Sequence[TimingDevice] | None = None, peers: Peers = lambda *_: {}
) -> dict[str, Any]:
    """Measure.

    Args:
        options: what to measure.
        devices: where; by default on the processor and, where there is one, the GPU.
        peers: what else to time at each case; nothing by default.

    Raises:
        TiercacheError: a kernel's results are wrong.
    """
    places = timing_device.devices() if devices is None else devices
    cases = [case for shape in options.shapes for layout in kernel_cases.cases(shape) for case in layout]
    total = len(places) * len(options.precisions) * sum(case.weights for case in cases)
    with bar("timing kernels", total, show=options.show_progress) as advance:
        runs = [_Run(device, options, peers, advance) for device in places]
        results = [row for run in runs for row in run.rows()]
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
        "stands": [run.describe() for run in runs],
        "results": results,
    }


class _Run:
    """The cases of one device."""

    def __init__(self, device: TimingDevice, options: Options, peers: Peers, advance: Advance) -> None:
        self._device, self._options, self._peers, self._advance = device, options, peers, advance
        self._codes = workset.random_codes(options.seed)
        self._roofs: list[float] = []

    def rows(self) -> Iterator[dict[str, Any]]:
        """Rows of every case."""
        for shape in self._options.shapes:
            for layout in kernel_cases.cases(shape):
                yield from self._layout(layout)

    def describe(self) -> dict[str, Any]:
        """What was found of the device."""
        return {
            "device": self._device.label,
            "kernels": self._device.kernels.name,
            "roofs_gbps": self._roofs,
            "cache_bytes": self._device.cache_bytes,
            "working_set_bytes": working_set_bytes(self._device, self._options.effort),
            "peers_left_out": {},  # filled by benchmarks.kernels
        }

    def _layout(self, layout: Sequence[Case]) -> Iterator[dict[str, Any]]:
        """Rows of cases that share their matrices."""
        inputs = {case: self._activations(case) for case in layout}
        peers = {case: self._peers(self._device, case, x) for case, x in inputs.items()}
        first = layout[0]
        for precision in self._options.precisions:
            rows: list[dict[str, Any]] = []
            shape = (first.rows, first.columns, first.parts)
            units = workset.make(self._device, self._options.effort, self._codes, shape, precision)
            before = self._roof(units)
            for case, x in inputs.items():
                rows += [row | peers[case].get(row["tokens"], {}) for row in self._case(case, units, x)]
                self._advance(case.weights)
            roof = (before + self._roof(units)) / 2  # others use the same memory: what it gives changes within seconds
            del units  # before the next take their memory
            yield from (row | {"roof_gbps": roof, "ratio": row["gbps"] / roof} for row in rows)

    def _roof(self, units: list[tuple[Planes, ...]]) -> float:
        """Of the very memory that the matrices lie in."""
        storage = units[0][0].planes[0].untyped_storage()
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
            seconds = median_s(device, call, self._options.effort, len(weights))
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
                "peers": {},
                "peer_seconds": {},
            }
