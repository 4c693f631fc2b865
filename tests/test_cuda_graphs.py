"""CUDA graphs of halves of layers, upon a driver of the same signatures: what is replayed is what is launched."""

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_on_cpu.emulate import Emulation, stub_driver
from test_layer_cuda import CPU, attention_weights, cached, feed_forward_weights, moved, random, turns
from torch import Tensor

from tiercache.kernels.blocks import FeedForward
from tiercache.kernels.cuda import driver
from tiercache.kernels.cuda.backend import CudaKernels
from tiercache.kernels.cuda.driver import Driver
from tiercache.kernels.cuda.runs import GRAPHS_OF_A_HALF

pytestmark = pytest.mark.usefixtures("one_thread")
LAUNCHES, GRAPHS, GRAPH_LAUNCHES, TOLD = range(4)


@pytest.mark.parametrize("runs", [3, 2])
def test_a_graph_is_its_launches_bit_for_bit(
    emulated_cuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: int
) -> None:
    """Of the halves in three calls, or in two."""
    stub = stub_driver(emulated_cuda, monkeypatch)
    monkeypatch.setattr(driver, "image", lambda *_: b"\177ELF")
    graphs = CudaKernels(CPU, Driver(torch.device("cuda"), tmp_path))
    plain = CudaKernels(CPU, Emulation(emulated_cuda, multiprocessors=2, capability=(8, 6)))
    halves = [
        (each.attention(attention_weights()), each.feed_forward(feed_forward_weights())) for each in (graphs, plain)
    ]

    def counted(tokens: int, step: int) -> list[int]:
        """What one pass asks of the driver: passes differ in their inputs, in where those lie, and in their slots."""
        before = [stub.stub_count(which) for which in range(4)]
        found, wanted = (layer(*each, tokens, step, runs) for each in halves)
        assert torch.equal(found, wanted)
        return [stub.stub_count(which) - count for which, count in enumerate(before)]

    for tokens in (1, 5):
        first, second, *later = [counted(tokens, step) for step in range(6)]
        assert first == [13, 0, 0, 0]
        assert second == [13, 2 * runs, 0, 0], "an executable graph of a graph, for each run"
        for each in later:
            assert each[:TOLD] == [0, 0, runs]
            assert each[TOLD] <= 6, "where x and queries come from and go to; keys and values"
    stub.stub_capture(1)
    assert counted(5, 6) == [13, 0, 0, 0], "no graph can be launched into a capture"
    stub.stub_capture(0)
    assert counted(5, 7)[:TOLD] == [0, 0, runs]
    halves.clear()
    gc.collect()
    assert stub.stub_count(GRAPHS) == 0, "a closed model leaves none"


def test_a_half_has_few_graphs(emulated_cuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the plan counts for it is not exceeded."""
    stub = stub_driver(emulated_cuda, monkeypatch)
    monkeypatch.setattr(driver, "image", lambda *_: b"\177ELF")
    kernels = CudaKernels(CPU, Driver(torch.device("cuda"), tmp_path))
    half = kernels.feed_forward(feed_forward_weights())
    for tokens in range(1, GRAPHS_OF_A_HALF + 3):
        for step in range(3):
            half.forward(random(tokens, 192, seed=step))
    assert len(half._graphs) == GRAPHS_OF_A_HALF  # type: ignore[attr-defined]
    before = stub.stub_count(GRAPHS)
    passing = kernels.feed_forward(replace(feed_forward_weights(), stays=False))
    for step in range(3):
        passing.forward(random(1, 192, seed=step))
    assert stub.stub_count(GRAPHS) == before, "of weights that come and go there would be one for each place"


def layer(attention: Any, block: FeedForward, tokens: int, step: int, runs: int, device: torch.device = CPU) -> Tensor:
    x, slots = random(tokens, 192, seed=step).to(device), 70 + step
    turn, known = turns(tokens, 32, torch.float32, slots - tokens), cached(2, slots, 32, torch.float32, seed=3)
    turn, known = moved(turn, device), moved(known, device)
    if runs == 2:
        return block.forward(attention.step(x, *turn, *known, None))
    queries, keys, values = attention.project(x, *turn)
    known[0][:, :, slots - tokens :], known[1][:, :, slots - tokens :] = keys, values
    return block.forward(attention.attend(x, queries, *known, None))


def test_without_memory_for_a_graph_calls_are_launched(
    emulated_cuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stub = stub_driver(emulated_cuda, monkeypatch)
    monkeypatch.setattr(driver, "image", lambda *_: b"\177ELF")
    half = CudaKernels(CPU, Driver(torch.device("cuda"), tmp_path)).feed_forward(feed_forward_weights())
    monkeypatch.setattr(stub, "cuGraphInstantiateWithFlags", lambda *_: 2)
    before = [stub.stub_count(which) for which in range(4)]
    for step in range(4):
        half.forward(random(2, 192, seed=step))
    assert [stub.stub_count(which) - count for which, count in enumerate(before)] == [4 * 4, 0, 0, 0]
    assert capsys.readouterr().err.count("no memory left for CUDA graphs") == 1


@pytest.mark.gpu
def test_on_a_gpu_a_graph_is_its_launches_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes differ in where their inputs lie and in their slots; another stream, a capture of torch's own."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    device = torch.device("cuda", 0)
    graphs = CudaKernels(device)
    monkeypatch.setenv("TIERCACHE_CUDA_GRAPHS", "0")
    plain = CudaKernels(device)
    weights = moved(attention_weights(), device), moved(feed_forward_weights(), device)
    halves = [(each.attention(weights[0]), each.feed_forward(weights[1])) for each in (graphs, plain)]
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for runs in (3, 2):
                for tokens in (1, 5, 9):
                    for step in range(8):
                        found, wanted = (layer(*each, tokens, step, runs, device) for each in halves)
                        assert torch.equal(found, wanted)
            x = random(5, 192).to(device)
            wanted = halves[1][1].forward(x)
            halves[0][1].forward(x)
        stream.synchronize()
    assert all(1 <= len(half._graphs) <= GRAPHS_OF_A_HALF for half in halves[0])
    assert not any(half._graphs for half in halves[1])
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        found = halves[0][1].forward(x)
    found.zero_()
    captured.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, wanted)
