"""The kernel benchmarks on toy matrices: their schema, layout in memory and checks, and what they refuse."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from benchmarks import kernels as with_peers
from benchmarks import torch_peers
from tiercache import cli
from tiercache.bench import kernels, kernels_report, timing_device, workset
from tiercache.bench.kernels import Options
from tiercache.bench.timing_device import Effort, TimingCpu
from tiercache.errors import DoesNotFitError, TiercacheError
from tiercache.kernels.contract import QuantizedActivations, Selection
from tiercache.kernels.reference import ReferenceKernels
from tiercache.quant.planes import Planes, decode

BRIEF = Effort(least_s=0, least_samples=1, caches=0, least_bytes=1 << 20, roof_bytes=8 << 20)
TINY = Options(("tiny",), ("int3", "int8"), (1, 3), effort=BRIEF, show_progress=False)
ROW = {
    *("kernel", "device", "shape", "precision", "tokens", "rows", "columns", "gbps", "roof_gbps", "ratio", "seconds"),
    *("gflops", "max_error", "peers", "peer_seconds"),
}


class Toppled(ReferenceKernels):
    """Forgets the last column of what it multiplies by."""

    def quantize_activations(self, x: Tensor, group: int) -> QuantizedActivations:
        x = x.clone()
        x[:, -1] = 0
        return super().quantize_activations(x, group)


class Toxic(ReferenceKernels):
    """Gives NaN."""

    def matmul_transposed(self, x: Tensor, weight: Planes, out: Tensor, rows: Selection = None) -> None:
        out.fill_(torch.nan)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    return kernels.bench(TINY, [TimingCpu(ReferenceKernels())])


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command measures briefly, with the reference."""
    real = kernels.bench

    def bench(options: Options) -> dict[str, Any]:
        return real(dataclasses.replace(options, effort=BRIEF), [TimingCpu(ReferenceKernels())])

    monkeypatch.setattr(kernels, "bench", bench)


def call(*arguments: object) -> Result:
    plain = {"FORCE_COLOR": None, "NO_COLOR": "1"}
    return CliRunner(env=plain).invoke(cli.app, ["bench", *map(str, arguments)])


def test_every_case_has_its_row(result: dict[str, Any]) -> None:
    assert result["schema"] == "tiercache.kernels/1"
    rows = result["results"]
    assert len(rows) == 5 * len(TINY.precisions) * len(TINY.token_counts)
    assert all(row.keys() == ROW for row in rows)
    kinds = {(row["kernel"], row["rows"], row["columns"]) for row in rows}
    alone = {("product", 256, 256), ("product", 704, 256)}
    assert kinds == alone | {("products", 2 * 704, 256), ("product_down", 704, 256), ("ffn", 704, 256)}
    for row in rows:
        assert row["ratio"] == pytest.approx(row["gbps"] / row["roof_gbps"])
        assert 0 <= row["max_error"] < 1e-4  # the reference beside itself, summed in another order
        assert row["peers"] == row["peer_seconds"] == {}
    assert json.loads(json.dumps(result)) == result


def test_gbps_counts_codes_and_scales(result: dict[str, Any]) -> None:
    weights = 704 * 256
    bytes_each = {"int3": 3 / 8 + 4 / 64, "int8": 1 + 4 / 64}
    for row in result["results"]:
        if row["rows"] >= 704:
            parts = {"ffn": 3, "products": 2}.get(row["kernel"], 1)
            read = parts * weights * bytes_each[row["precision"]]
            assert row["gbps"] * 1e9 * row["seconds"] == pytest.approx(read)
            assert row["gflops"] * 1e9 * row["seconds"] == pytest.approx(2 * row["tokens"] * parts * weights)


def test_the_report_names_hardware_seed_and_backend(result: dict[str, Any]) -> None:
    text = kernels_report.report(result)
    head = "".join(text.splitlines()[:3])
    for part in ("seed 0", "threads", "kernels reference", "roof"):
        assert part in head
    assert max(map(len, text.splitlines())) <= 200
    kernels_named = [line.split()[0] for line in text.splitlines() if line.startswith(" product") or "ffn" in line]
    assert kernels_named == sorted(kernels_named, key=["product", "products", "product_down", "ffn"].index)


def test_matrices_lie_as_in_a_slot_and_overflow_the_cache() -> None:
    place = TimingCpu(ReferenceKernels())
    units = workset.make(place, BRIEF, workset.random_codes(0), (704, 256, 3), "int4")
    assert sum(workset.nbytes(weight) for unit in units for weight in unit) >= BRIEF.least_bytes
    gate, up, _ = units[0]
    assert [plane.stride() for plane in gate.planes] == [(3 * 96, 1), (3 * 32, 1)]
    assert gate.scales.stride() == (3 * 8, 2, 1)
    assert up.planes[0].data_ptr() - gate.planes[0].data_ptr() == 96
    assert gate.planes[0].data_ptr() % 4096 == 0
    values = decode(gate, torch.float32)
    assert 0.02 < float(values.std()) < 0.05
    assert not values.equal(decode(up, torch.float32))
    assert not values.equal(decode(units[1][0], torch.float32))


@pytest.mark.parametrize("wrong", [Toppled(), Toxic()])
def test_wrong_results_stop_the_run(wrong: ReferenceKernels) -> None:
    with pytest.raises(TiercacheError, match="off the reference"):
        kernels.bench(TINY, [TimingCpu(wrong)])


def test_a_peer_that_is_missing_is_told_once() -> None:
    def absent(*_: object) -> torch_peers.Packed:
        raise AttributeError("no such operator\nat all")

    peers = (torch_peers.BF16, torch_peers.Peer("torch int3", absent, lambda x, packed: x))
    options = dataclasses.replace(TINY, precisions=("int3",))
    result = with_peers.bench(options, [TimingCpu(ReferenceKernels())], peers)
    assert result["stands"][0]["peers_left_out"] == {"torch int3": "no such operator"}
    assert all(row.keys() == ROW for row in result["results"])
    assert all(row["peers"].keys() == row["peer_seconds"].keys() == {"torch bf16"} for row in result["results"])
    text = kernels_report.report(result)
    assert text.count("torch int3 is left out: no such operator") == 1
    assert "x torch bf16" in text


def test_the_command_with_peers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    real = with_peers.bench

    def bench(options: Options) -> dict[str, Any]:
        return real(dataclasses.replace(options, effort=BRIEF), [TimingCpu(ReferenceKernels())])

    monkeypatch.setattr(with_peers, "bench", bench)
    with_peers.run(["--kernel-shapes", "tiny", "--precisions", "int4", "--token-counts", "1"])
    told = capsys.readouterr()
    rows = json.loads(told.out)["results"]
    assert all(row["peers"].keys() >= {"torch bf16"} for row in rows)
    assert "x torch bf16" in told.err


def test_peers_multiply_the_same_shapes() -> None:
    pool = torch.arange(256, dtype=torch.uint8).repeat(64)
    packed = torch_peers.BF16.pack(128, 64, pool)
    x = torch.randn(3, 64).bfloat16()
    assert torch_peers.BF16.matmul(x, packed).equal(x @ packed[0].T)
    (codes, scales) = torch_peers.INT8.pack(128, 64, pool)
    assert (codes.dtype, codes.shape, scales.shape) == (torch.int8, (128, 64), (128,))
    assert torch_peers.shapes("ffn", 704, 256) == ((704, 256), (704, 256), (256, 704))


def test_too_little_memory_is_told_before_it_is_taken() -> None:
    with pytest.raises(DoesNotFitError, match="--kernel-shapes") as caught:
        TimingCpu(ReferenceKernels()).memory(1 << 60)
    assert caught.value.missing_bytes > 0


def test_the_cache_of_this_machine() -> None:
    assert timing_device.last_level_cache_bytes() >= 64 << 10


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--kernel-shapes", "7c"), "70b"),
        (("--kernel-shapes", ""), "empty list"),
        (("--precisions", "int4,int2"), "int3, int4, int8"),
        (("--token-counts", "1,many"), "1,16"),
        (("--token-counts", "0"), "512"),
        (("--token-counts", "513"), "512"),
    ],
)
def test_bad_values_name_the_choices(arguments: tuple[str, str], says: str) -> None:
    result = call("kernels", *arguments, "--json")
    assert result.exit_code == 2, result.output
    error = json.loads(result.stdout)
    assert error["error"] == "UsageError"
    assert says in error["message"]


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("more", [(), ("--json",), ("--quiet",)])
def test_the_command_prints_only_json_on_stdout(more: tuple[str, ...]) -> None:
    options = ("--kernel-shapes", "tiny", "--precisions", "int4", "--token-counts", "1", "--seed", 3)
    result = call("kernels", *options, *more)
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert (found["schema"], found["seed"], len(found["results"])) == ("tiercache.kernels/1", 3, 5)
    assert ("product_down" in result.stderr) is ("--quiet" not in more)


@pytest.mark.usefixtures("brief")
def test_the_old_spelling_still_works() -> None:
    options = ("--kernel-shapes", "tiny", "--precisions", "int4", "--token-counts", "1")
    result = call("--kernels", *options, "--json")
    assert json.loads(result.stdout)["schema"] == "tiercache.kernels/1"
    assert f"deprecated; write: tiercache bench kernels {' '.join(options)} --json\n" in result.stderr
    assert "deprecated" not in call("kernels", *options).stderr
    assert call("--kernels", "--shape", "tiny").exit_code == 2
