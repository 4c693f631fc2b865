"""What a decision of the neuron cache costs: the time of one step at a model's size, for every policy.

    python -m benchmarks.policy_cost

Prints a table and one line of JSON. The wishes are made up: each neuron has a bias of its own and a part that changes
from token to token, so that adjacent tokens share 60 % of their sets where half of the neurons are wanted.
"""

import argparse
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from policies.eviction import POLICIES, make
from policies.hot import hottest
from policies.neurons import NeuronResidency
from profiler.trace import Trace

_STREAMS = 8  # made-up layers; the others wish for the same, from slots of their own
_BIAS = 0.2  # of a score's variance that never changes


@dataclass(frozen=True)
class Size:
    """What to measure; the defaults are LLaMA-2-70B's.

    Attributes:
        layers: of the model.
        neurons: of one layer.
        shares: of the neurons that each plane wants for one token.
        room: slots of a plane, as a share of the neurons.
        tokens: measured, after as many that are not.
        seed: of the made-up wishes.
    """

    layers: int = 80
    neurons: int = 28672
    shares: tuple[float, ...] = (0.5, 0.25)
    room: float = 0.4
    tokens: int = 6
    seed: int = 0


@dataclass(frozen=True)
class Cost:
    """One policy at one plane.

    Attributes:
        policy: its name.
        plane: which of the shares.
        median_us: of one step, in microseconds.
        p95_us: 95 of 100 steps take less.
        token_ms: all layers of this plane for one token, in milliseconds: the mean.
        hit_rate: in the measured tokens, after a start that saw these very wishes: it shows that the steps do real
            work, and does not compare policies; `profiler.replay` does.
    """

    policy: str
    plane: int
    median_us: float
    p95_us: float
    token_ms: float
    hit_rate: float


def synthetic(size: Size, overlap: float = 0.6) -> Trace:
    """Made-up wishes, 2 * tokens of them: for normal scores of correlation r, the upper halves share 1/2 + asin(r)/pi.

    Args:
        size: as measured.
        overlap: of two adjacent tokens' upper halves, in [0.5 + asin(0.2)/pi = 0.564, 1).
    """
    draw = np.random.default_rng(size.seed)
    inertia = (math.sin(math.pi * (overlap - 0.5)) - _BIAS) / (1 - _BIAS)
    counts = [int(share * size.neurons) for share in size.shares]
    layers = min(_STREAMS, size.layers)
    trace = Trace(size.neurons, [counts] * layers)
    bias = math.sqrt(_BIAS) * draw.standard_normal((layers, size.neurons))
    moving = draw.standard_normal(bias.shape)
    for _ in range(2 * size.tokens):
        scores = bias + math.sqrt(1 - _BIAS) * moving
        trace.append(list(np.argsort(-scores, axis=1)))
        moving = inertia * moving + math.sqrt(1 - inertia**2) * draw.standard_normal(bias.shape)
    return trace


def measure(name: str, trace: Trace, size: Size) -> list[Cost]:
    """One policy, plane by plane: the steps of all layers, token by token, as the engine takes them."""
    slots = int(size.room * size.neurons)
    streams = [layer % trace.layers for layer in range(size.layers)]
    heat = trace.frequencies()
    costs = []
    for plane in range(trace.planes):
        residencies = []
        for stream in streams:
            future = list(trace.rows(stream, plane)) if name == "belady" else None
            residency = NeuronResidency(size.neurons, slots, make(name, future=future, hot=heat[stream]))
            residency.warm(hottest(heat[stream], slots))
            residencies.append(residency)
        times, hits = [], 0
        for token in range(trace.tokens):
            wanted = [trace.wanted(stream, plane, token) for stream in range(trace.layers)]
            for stream, residency in zip(streams, residencies, strict=True):
                began = time.perf_counter()
                step = residency.step(wanted[stream])
                took = time.perf_counter() - began
                if token >= trace.tokens - size.tokens:
                    times.append(1e6 * took)
                    hits += step.hits.size
        requests = len(times) * int(trace.counts[0, plane])
        high = statistics.quantiles(times, n=20)[-1]
        token_ms = 1e-3 * sum(times) / size.tokens
        costs.append(Cost(name, plane, statistics.median(times), high, token_ms, hits / max(1, requests)))
    return costs


def report(size: Size, costs: Sequence[Cost], trace: Trace) -> str:
    """A table, and the same as one line of JSON."""
    overlap = [float(trace.adjacent_overlap(plane)[0].mean()) for plane in range(trace.planes)]
    lines = [
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, numpy {np.__version__}, "
        f"seed {size.seed}",
        f"{size.layers} layers of {size.neurons} neurons, {size.room:.0%} of them in slots; adjacent tokens share "
        + ", ".join(f"{share:.0%} of {part:.0%}" for share, part in zip(overlap, size.shares, strict=True)),
        f"{'policy':8}{'wanted':>8}{'step':>10}{'p95':>10}{'a token':>12}{'hits':>8}",
    ]
    for cost in costs:
        wanted, hits = f"{size.shares[cost.plane]:.0%}", f"{cost.hit_rate:.1%}"
        lines.append(
            f"{cost.policy:8}{wanted:>8}{cost.median_us:7.0f} us{cost.p95_us:7.0f} us{cost.token_ms:9.1f} ms{hits:>8}"
        )
    record = {"size": asdict(size), "adjacent_overlap": overlap, "costs": [asdict(cost) for cost in costs]}
    return "\n".join([*lines, json.dumps(record)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every policy and print it."""
    plain = Size()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policy_cost", description="the time of one cache step")
    parser.add_argument("--layers", type=int, default=plain.layers)
    parser.add_argument("--neurons", type=int, default=plain.neurons)
    parser.add_argument("--tokens", type=int, default=plain.tokens, help="measured, after as many that are not")
    given = parser.parse_args(arguments)
    size = Size(layers=given.layers, neurons=given.neurons, tokens=given.tokens)
    trace = synthetic(size)
    costs = [cost for name in POLICIES for cost in measure(name, trace, size)]
    print(report(size, costs, trace))


if __name__ == "__main__":
    main()
