"""What a probe measures of this machine, where it is kept, and how predictions from it are held against runs."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import tiercache
from policies.plan import PlanInputs, fill_tiers
from profiler import read_rates
from profiler.cost_model import pass_time, upgrades
from profiler.figure import Figure, measured
from profiler.fitting import LEAST_PAIRS, Pair, fitted
from profiler.hardware import Hardware, Memory, catalogue
from profiler.matmul_rates import MatmulRates, nearest
from profiler.read_rates import ReadRate
from profiler.workload import Matmul, Workload
from tiercache.bench import card_probe, layer_probe, machine_probe, undisturbed
from tiercache.commands import profiler
from tiercache.commands.predicting import profile
from tiercache.config.options import OffloadConfig
from tiercache.config.sizes import Budget
from tiercache.engine import actuals, probe_cache, this_hardware
from tiercache.engine.machine import Machine
from tiercache.errors import EnvironmentUnsupportedError, StoreError, UsageError
from tiercache.store.format import Piece
from tiercache.store.reader import Reader, aligned_buffer
from tiercache.tiers.device import CpuDevice

GIB = 1 << 30
PICO = Path(__file__).parents[1] / "examples" / "pico" / "checkpoint"
FIGURE = Figure(2.0, "measured", "a test", 0.1)
CPU = torch.device("cpu")


def rates(bytes_per_weight: float = 1.0) -> MatmulRates:
    gbps = {1: Figure(10.0, "measured"), 5: Figure(5.0, "measured")}
    layers = {1: Figure(0.001, "measured"), 5: Figure(0.003, "measured")}
    whole = {1: Figure(0.25, "measured"), 5: Figure(0.25, "measured")}
    activations = {1: Figure(0.0, "measured"), 5: Figure(3.0, "measured")}
    return MatmulRates(bytes_per_weight, gbps, activations, layers, whole, Figure(0.01, "measured"))


def machine() -> Hardware:
    dram, beside = Memory(8 * GIB, Figure(20.0, "measured")), {"pass_s": FIGURE.scaled(0), "unit_s": FIGURE.scaled(0)}
    given = (None, dram, FIGURE.scaled(50), FIGURE, FIGURE.scaled(0.5), FIGURE.scaled(1e-3))
    return Hardware(*given, **beside, matmuls=(rates(),))


def test_seconds_between_token_counts_and_beyond() -> None:
    found = rates()
    assert found.product_s(10**9, 1) == pytest.approx(0.1)
    assert found.product_s(10**9, 3) == pytest.approx(0.15), "half way between 0.1 and 0.2"
    assert found.product_s(10**9, 20) == pytest.approx(0.8), "four times as many tokens as were measured"
    assert found.activation_s(1000, 5) == pytest.approx(3e-9 * 5 * 1000)
    assert found.activation_s(1000, 1) == 0
    assert found.scaled(2).activation_s(1000, 5) == pytest.approx(found.activation_s(1000, 5) / 2)
    assert found.beside_s(10, 3) == pytest.approx(10 * 0.002 + 0.25)
    assert found.beside_s(10, 500) == pytest.approx(10 * 0.003 + 0.25), "Python does not grow with the tokens"
    assert found.with_layers(0.5).beside_s(10, 1) == pytest.approx(10 * 0.0005 + 0.25)


def test_the_nearest_rates_are_of_the_precision() -> None:
    known = [rates(0.56), rates(1.06), rates(2.0)]
    assert [nearest(known, each) for each in (0.44, 0.6, 1.0, 4.0)] == [0, 0, 1, 2]


def _model(matrices: int = 1, **given: Any) -> Workload:
    sizes = dict.fromkeys(range(matrices), GIB)
    needs = PlanInputs(sizes, [*map(str, sizes)], tuple(sizes), frozenset(), None, {}, {})
    matmuls = tuple(Matmul((key,), GIB, 1000) for key in sizes)
    return Workload("int8", 1, matmuls, needs, sizes, 100, 0, 0, **given)


def test_measured_rates_take_the_place_of_roofs_and_leave_the_bound() -> None:
    workload, on = _model(), machine()
    plan = fill_tiers(workload.needs, hbm_bytes=None, dram_bytes=2 * GIB)
    found = pass_time(workload, plan, on)
    assert found.busy_s["compute"] == pytest.approx(GIB / 10e9)
    assert found.overhead_s == pytest.approx(0.001 + 0.25)
    assert found.bound_s == pytest.approx(GIB / 20e9), "the memory's roof"
    faster = upgrades(on)
    assert pass_time(workload, plan, faster["cpu and main memory"]).busy_s["compute"] == pytest.approx(GIB / 20e9)
    assert pass_time(workload, plan, faster["overhead a layer"]).overhead_s == pytest.approx(0.0005 + 0.25)
    plain = replace(on, matmuls=(), pass_s=Figure(0.1))
    assert pass_time(workload, plan, plain).overhead_s == pytest.approx(on.layer_s.value + 0.1), "where nobody measured"


def test_each_unit_that_is_read_costs_beside_its_bytes() -> None:
    workload = _model(8)
    plan = fill_tiers(workload.needs, hbm_bytes=None, dram_bytes=5 * GIB)
    assert plan.streamed
    still = fill_tiers(workload.needs, hbm_bytes=None, dram_bytes=9 * GIB)
    more = pass_time(workload, plan, machine()).overhead_s - pass_time(workload, still, machine()).overhead_s
    assert more == pytest.approx(0.01 * len(plan.streamed))


def test_reads_by_their_size() -> None:
    known = [ReadRate(4, size, Figure(gbps)) for size, gbps in ((1000, 0.1), (3000, 0.1), (1000, 9.0))][:2]
    assert read_rates.seconds(known, 4, [1000, 2000, 500, 6000]) == pytest.approx((1 + 2 + 1 + 6) * 1e-5)
    assert read_rates.seconds(known, 8, [1000]) is None
    workload = _model(8, reads=dict.fromkeys(range(8), (2000, 1000)), readers=4)
    plan = fill_tiers(workload.needs, hbm_bytes=None, dram_bytes=5 * GIB)
    on = replace(machine(), reads=tuple(known))
    assert pass_time(workload, plan, on).busy_s["ssd"] == pytest.approx(3e-5 * len(plan.streamed))
    assert pass_time(workload, plan, upgrades(on)["ssd"]).busy_s["ssd"] == pytest.approx(1.5e-5 * len(plan.streamed))
    assert pass_time(_model(8), plan, on).busy_s["ssd"] == pytest.approx(len(plan.streamed) * GIB / 2e9)


def test_rows_of_a_table_that_stays_nowhere_are_read_one_by_one() -> None:
    plan = fill_tiers(_model().needs, hbm_bytes=None, dram_bytes=2 * GIB)
    on = replace(machine(), reads=(ReadRate(1, 4096, Figure(4096e-9 / 1e-4)),))
    held, nowhere = (pass_time(_model(table=key), plan, on, tokens=5).overhead_s for key in (0, 1))
    assert nowhere - held == pytest.approx(5e-4)


@pytest.mark.parametrize(("offset", "nbytes", "at"), [(0, 5 << 20, 0), (4096, 100, 4096), (100, 5 << 20, 0)])
def test_the_loader_s_reads_are_those_that_are_predicted(tmp_path: Path, offset: int, nbytes: int, at: int) -> None:
    path, sizes = tmp_path / "file", list[int]()
    path.write_bytes(bytes(9 << 20))
    piece = Piece(path, offset, nbytes, at, nbytes)
    with Reader() as reader:
        fetch = reader._fetch

        def counting(descriptor: int, path: Path, offset: int, view: Any, needed: int) -> None:
            sizes.append(len(view))
            fetch(descriptor, path, offset, view, needed)

        reader._fetch = counting  # type: ignore[method-assign]
        reader.read([piece], aligned_buffer(8 << 20)).wait()
    assert sorted(sizes) == sorted(Reader.request_bytes([piece]))


def test_three_parts_of_a_layer_are_told_apart() -> None:
    rows = np.array([[1, 2, 10, 1e3], [1, 10, 50, 5e3], [1, 24, 1e4, 1e7], [1, 4, 5e3, 4e7]])
    parts = np.array([0.0, 1e-3, 2e-7, 1e-10])
    seconds = rows @ parts
    assert layer_probe.not_negative(rows, seconds, 1 / seconds) == pytest.approx(tuple(parts), rel=1e-6, abs=1e-12)
    odd = layer_probe.not_negative(rows, -seconds, 1 / seconds)
    assert odd == (0, 0, 0, 0), "nothing takes less than no time"


def _watch(monkeypatch: pytest.MonkeyPatch, loops: list[float], **options: Any) -> undisturbed.Watch:
    """A watch whose machine has these paces, one after the other, and usually 1."""
    paces = iter([*loops, *[1.0] * 99])
    monkeypatch.setattr(undisturbed, "_PAUSE_S", 0.0)
    monkeypatch.setattr(undisturbed.Pace, "now", lambda: undisturbed.Pace(next(paces), 1.0))
    return undisturbed.Watch(usual=undisturbed.Pace(1.0, 1.0), **options)


def _usual(works: Any, counts: Any) -> Any:
    """Samples of a machine that is as usual."""
    return {key: [undisturbed.Sample(work(), 1.0, 1.0) for _ in range(counts[key])] for key, work in works.items()}


def test_samples_that_others_disturbed_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = _watch(monkeypatch, [3.0, 3.0, 1.0, 2.0, 1.0, 1.1, 1.1])  # waits twice, then the first sample is disturbed
    assert watch.by_turns({"": iter("abc").__next__}, {"": 2})[""] == [
        undisturbed.Sample("b", pytest.approx(1.1), pytest.approx(1.05)),
        undisturbed.Sample("c", pytest.approx(1.1), pytest.approx(1.1)),
    ]
    assert watch.share_disturbed == 0


def test_without_patience_the_most_usual_samples_count(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = _watch(monkeypatch, [3.0, 3.0, 3.0, 2.0, 2.0], patience_s=0.0)
    assert watch.sample(iter("abcd").__next__, 3) == ["c", "a", "b"]
    assert watch.share_disturbed == 1, "told"


def test_seconds_are_those_of_the_usual_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = _watch(monkeypatch, [1.2, 1.2])
    monkeypatch.setattr(undisturbed, "seconds_of", lambda work: 6.0)
    assert watch.timed({"": lambda: None}, {"": 1}) == {"": [pytest.approx(5.0)]}
    watch = _watch(monkeypatch, [1.2, 1.2])
    assert watch.timed({"": lambda: None}, {"": 1}, unpaced_s=3.0) == {"": [pytest.approx(5.5)]}, "half of it memory's"


def test_patience_is_what_waiting_and_trying_again_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 10))  # each look at it ten seconds later
    monkeypatch.setattr(undisturbed.time, "perf_counter", lambda: next(clock))
    watch = _watch(monkeypatch, [1.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0], patience_s=15.0)
    # The first try took all patience: the second counts as it is, and the third is undisturbed.
    assert watch.sample(iter("abcd").__next__, 2) == ["c", "a"]
    assert watch.share_disturbed == 0.5


def test_a_machine_that_becomes_faster_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paces = iter([*[2.0] * 9, 1.0, *[1.0] * 999])
    monkeypatch.setattr(undisturbed, "_LOOK_S", 0.0)
    monkeypatch.setattr(undisturbed.Pace, "now", lambda: undisturbed.Pace(next(paces), 1.0))
    usual = []

    def once(probe: machine_probe._Probe) -> Hardware:
        usual.append(probe._watch.usual.loop_s)
        probe._watch.sample(lambda: None, 99)
        return machine()

    monkeypatch.setattr(machine_probe._Probe, "measure", once)
    assert machine_probe.probe_machine(tmp_path, CPU, show_progress=False) == machine()
    assert usual == [2.0, 1.0]
    watch = undisturbed.Watch(0.0, undisturbed.Pace(2.0, 1.0))
    watch.sample(lambda: None, 3)
    assert watch.share_disturbed == 1, "faster than a pace that is given is not as usual either"


def test_a_slower_pace_slows_the_processor_s_part() -> None:
    workload = _model()
    plan = fill_tiers(workload.needs, hbm_bytes=None, dram_bytes=2 * GIB)
    faster = pass_time(workload, plan, replace(machine(), pace=0.01), tokens=512)
    assert faster.total_s >= faster.bound_s > 0
    slower = pass_time(workload, plan, replace(machine(), pace=1.5))
    usual = pass_time(workload, plan, machine())
    read_s = workload.pass_bytes / 20e9
    assert 0 < read_s < usual.busy_s["compute"]
    assert slower.busy_s["compute"] - read_s == pytest.approx(1.5 * (usual.busy_s["compute"] - read_s))
    assert slower.overhead_s == pytest.approx(1.5 * usual.overhead_s)
    assert slower.busy_s["ssd"] == usual.busy_s["ssd"]


class StandIn(CpuDevice):
    """The processor in a card's place."""

    on_host = False
    name = "Tesla M40 24GB"


def test_a_probed_card_is_planned_for(monkeypatch: pytest.MonkeyPatch) -> None:
    card = replace(catalogue().gpu("m40"), link_gbps=FIGURE.scaled(6))
    probed = replace(machine(), gpu=card)
    monkeypatch.setattr(this_hardware, "measured_machine", lambda device: probed)
    on = Machine(torch.device("cuda", 0), {})
    found = this_hardware.this_hardware(on, OffloadConfig(hbm=None, dram=Budget()), cpu_multiplies=False)
    assert found == replace(probed, dram=replace(probed.dram, capacity_bytes=found.dram.capacity_bytes))
    slow = OffloadConfig(hbm=None, dram=Budget(), link_gbps=1.5)
    assert this_hardware.this_hardware(on, slow, cpu_multiplies=False).copy_gbps == 1.5


def test_attention_is_the_card_s_where_a_card_computes() -> None:
    with_card = replace(machine(), gpu=catalogue().gpu("m40"), attention_gflops=FIGURE)
    attention = {name: on.attention_gflops for name, on in upgrades(with_card).items()}
    assert attention == {**dict.fromkeys(attention, FIGURE), "gpu": FIGURE.scaled(2)}


def test_a_card_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "BYTES": 4 << 20,
        "BLOCKS": (64 << 10, 1 << 20),
        "GEMM": 64,
        "_ATTENDED": 32,
        "_QUEUED": 2,
    }.items():
        monkeypatch.setattr(card_probe, name, value)
    found = card_probe.CardProbe(StandIn(CPU), _watch(monkeypatch, [])).measure()
    assert 0 <= found.overlap.value <= 1
    assert (found.gpu.name, found.gpu.compute_type, found.gpu.power_w) == ("Tesla M40 24GB", "fp32", 250)
    figures = found.beside(machine()).figures
    assert {figures[name].basis for name in ("gpu memory", "gpu", "link", "attention_gflops")} == {"measured"}
    assert figures["link"] == figures["copies, pinned, up"]
    assert {name for name in figures if name.startswith("copies")} == {
        f"copies, {kind}"
        for kind in (
            "pinned, up",
            "pinned, down",
            "pinned, each way at once",
            "pageable, up",
            "pinned, up, 64 KiB",
            "pinned, up, 1024 KiB",
        )
    }
    assert found.roofs.gflops == pytest.approx(found.gpu.tflops.value * 1e3)
    kept = probe_cache.from_dict(json.loads(json.dumps(probe_cache.to_dict(found.beside(machine())))))
    assert kept == found.beside(machine())


def test_layers_beside_an_hbm_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_probe, "SHAPES", tuple(layer_probe._shape(heads, 4) for heads in (2, 3, 4, 5)))
    monkeypatch.setattr(layer_probe, "CARD_ROUNDS", {1: 2, 9: 2})
    roofs = layer_probe.Roofs(100.0, 1000.0, 100.0)
    with layer_probe.LayerProbe(roofs, _watch(monkeypatch, []), tmp_path, CpuDevice(CPU), hbm=True) as layers:
        rates = layers.rates("int8")
    assert list(rates.gbps) == [1, 9]
    assert rates.unit_s is not None
    assert "copied up" in rates.unit_s.source
    assert not [*tmp_path.iterdir()]


def _pairs(count: int, **times: float) -> list[Pair]:
    found = []
    for number in range(count):
        busy = {"compute": 0.1 * (1 + number % 3), "cpu": 0.0, "link": 0.0, "dram": 0.0, "ssd": 0.4 * (number % 2)}
        pair = Pair("a test", busy, 0.05 * (1 + number % 4), 0.01, 0.9, 1.0)
        found.append(replace(pair, actual_s=pair.predicted_s(times)))
    return found


def test_factors_are_found_again() -> None:
    assert fitted(_pairs(LEAST_PAIRS - 1, compute=1.3)) == {}
    found = fitted(_pairs(240, compute=1.3, overhead=0.8))
    assert {name: figure.value for name, figure in found.items()} == pytest.approx(
        {"compute": 1.3, "overhead": 0.8, "ssd": 1.0}, rel=0.03
    )
    assert {figure.basis for figure in found.values()} == {"fitted"}
    assert "240" in found["compute"].source


def test_no_fit_goes_above_the_bound() -> None:
    workload = _model()
    plan = fill_tiers(workload.needs, hbm_bytes=None, dram_bytes=2 * GIB)
    half = {name: Figure(0.01, "fitted") for name in ("compute", "overhead", "ssd")}
    on = replace(machine(), fitted=half)
    found = pass_time(workload, plan, on)
    assert found.total_s == found.bound_s == pass_time(workload, plan, machine()).bound_s
    assert on.basis == "fitted"


def test_a_median_tells_its_spread() -> None:
    found = measured([1.0, 4.0, 2.0], "a test")
    assert (found.value, found.spread, found.basis) == (2.0, 0.75, "measured")


def test_figures_are_kept_for_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERCACHE_HOME", str(tmp_path / "home"))
    with pytest.raises(UsageError, match="tiercache-profile probe"):
        probe_cache.this_machine()
    path = probe_cache.keep(machine())
    assert probe_cache.this_machine() == machine()
    assert probe_cache.pairs() == []
    probe_cache.add_pairs(_pairs(200, compute=1.3))
    probe_cache.add_pairs(_pairs(100, compute=1.3))
    assert len(probe_cache.pairs()) == 256, "the newest"
    refitted = probe_cache.refit()
    assert refitted.fitted["compute"].value == pytest.approx(1.3, rel=0.03)
    assert probe_cache.this_machine() == refitted
    probe_cache.keep(machine())
    assert probe_cache.pairs() == [], "another probe's"
    with monkeypatch.context() as changed:
        changed.setattr(probe_cache, "source_digest", lambda _: "kernels that were changed")
        with pytest.raises(UsageError, match="nothing was measured of this machine"):
            probe_cache.this_machine()
    monkeypatch.setattr(probe_cache, "processor_name", lambda: "another")
    with pytest.raises(UsageError, match="nothing was measured of this machine"):
        probe_cache.this_machine()
    path.write_bytes(b"not LMDB" * 4096)
    with pytest.raises(StoreError, match="probe again"):
        probe_cache.this_machine()


def test_a_noisy_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [1.0, 10.0] * machine_probe.REPEATS
    watch = _watch(monkeypatch, [], patience_s=0.0)
    monkeypatch.setattr(watch, "by_turns", _usual)
    monkeypatch.setattr(machine_probe, "Watch", lambda *_, **__: watch)
    monkeypatch.setattr(machine_probe, "_DISK_BYTES", 8 << 20)
    monkeypatch.setattr(machine_probe, "dram_roof", lambda *_, **__: told.pop())
    with pytest.raises(EnvironmentUnsupportedError, match=r"vary by .* probe again"):
        machine_probe.probe_machine(tmp_path, CPU, show_progress=False)
    assert not told, "tried twice"


def test_a_machine_that_is_never_quiet_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"REPEATS": 1, "_DRAM_BYTES": 1 << 20, "_DISK_BYTES": 8 << 20, "_GEMM": 64}.items():
        monkeypatch.setattr(machine_probe, name, value)
    monkeypatch.setattr(machine_probe, "KINDS", ("int4",))
    monkeypatch.setattr(machine_probe, "TOO_NOISY", 100.0)
    monkeypatch.setattr(layer_probe, "SHAPES", tuple(layer_probe._shape(heads, 4) for heads in (2, 3, 4, 5)))
    monkeypatch.setattr(layer_probe, "ROUNDS", {1: 1, 9: 1})
    never = undisturbed.Pace(1e-9, 1e-9)
    monkeypatch.setattr(machine_probe, "Watch", lambda *_, **__: undisturbed.Watch(0.0, never))
    with pytest.raises(EnvironmentUnsupportedError, match=r"100% of the measurements .* probe again"):
        machine_probe.probe_machine(tmp_path, CPU, show_progress=False)
    assert not [*tmp_path.iterdir()]


def test_a_folder_that_takes_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(profile, ["probe", "--folder", str(tmp_path / "file")])
    assert result.exit_code == 5
    assert "--folder" in result.stderr


def test_probe_predict_and_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERCACHE_HOME", str(tmp_path / "home"))
    smaller = {"REPEATS": 3, "_DRAM_BYTES": 64 << 20, "_DISK_BYTES": 16 << 20, "_GEMM": 256, "TOO_NOISY": 100.0}
    for name, value in smaller.items():
        monkeypatch.setattr(machine_probe, name, value)
    monkeypatch.setattr(layer_probe, "SHAPES", tuple(layer_probe._shape(heads, 4) for heads in (2, 3, 4, 5)))
    monkeypatch.setattr(layer_probe, "ROUNDS", {1: 3, 9: 3})
    monkeypatch.setattr(undisturbed, "AS_USUAL", 1e9)
    monkeypatch.setattr(undisturbed, "_LOOK_S", 0.1)
    disk = tmp_path / "disk"
    disk.mkdir()
    told = run("probe", "--folder", str(disk))
    assert told["schema"] == "tiercache.probe/1"
    assert told["dram"]["gbps"]["basis"] == "measured"
    assert [path.name for path in disk.iterdir()] == []
    predicted = run("predict", "tinyllama-1.1b", "--gpu", "this", "--dram", "8GiB")
    assert predicted["basis"] == "measured"
    assert predicted["low"] < predicted["tokens_per_s"] <= predicted["bound"]
    assert predicted["ssd"] == f"{told['ssd_gbps']['value']:.1f}GB/s"
    for given in (["--ssd", "3.5GB/s"], ["--lanes", "8"], ["--dram-kind", "ddr5-5600"]):
        refused = CliRunner().invoke(profile, ["predict", "tinyllama-1.1b", "--gpu", "this", *given])
        assert refused.exit_code == 2
        assert "as it was measured" in refused.stderr
    found = run("validate", str(PICO), "--precisions", "source,int8", "--token-counts", "1,4", "--refit")
    assert found["schema"] == "tiercache.validation/1"
    assert len(found["cases"]) == 6, "a checkpoint has no planes"
    assert found["fitted"] == {}, "from four pairs"
    assert len(probe_cache.pairs()) == 4
    errors = [abs(case["predicted_s"] / case["measured_s"] - 1) for case in found["cases"]]
    assert found["worst_error"] == pytest.approx(max(errors))
    assert "60% in memory, drafted" in found["cases"][-1]["name"]


@pytest.mark.parametrize(("device", "code"), [("gpu", 2), ("meta", 2), ("cuda:7", 5)])
def test_devices_that_cannot_be_probed(device: str, code: int, tmp_path: Path) -> None:
    result = CliRunner().invoke(profile, ["probe", "--folder", str(tmp_path), "--device", device])
    assert result.exit_code == code


@pytest.mark.parametrize("counts", ["", "x", "0"])
def test_token_counts_that_cannot_be_meant(counts: str) -> None:
    result = CliRunner().invoke(profiler.measuring.profile, ["validate", "nowhere", "--token-counts", counts])
    assert result.exit_code == 2
    assert "such as 1,16" in result.stderr or "from 1 up" in result.stderr


def test_a_run_is_compared_where_the_machine_was_probed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIERCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(probe_cache, "will_compile", lambda: False)  # they are built, in the other home

    def passes(count: int, **options: Any) -> Any:
        with tiercache.offload(PICO, dram="64MiB", context=64, **options) as model:
            ids = torch.tensor([[5, 6, 7]])
            model.generate(ids, max_new_tokens=1 + count, min_new_tokens=1 + count, do_sample=False, pad_token_id=0)
            return model.tiercache.stats().to_dict()

    told = passes(actuals.LEAST_PASSES)
    assert told["actual_pass_s"] > 0
    assert told["predicted_pass_s"] is None
    assert not (tmp_path / "home" / "probe.mdb").exists(), "nothing was probed, nothing is kept"
    probe_cache.keep(machine())
    assert passes(actuals.LEAST_PASSES - 1)["actual_pass_s"] is None
    assert probe_cache.pairs() == []
    told = passes(actuals.LEAST_PASSES)
    (pair,) = probe_cache.pairs()
    assert pair.actual_s == told["actual_pass_s"]
    assert pair.predicted_s({}) == pytest.approx(told["predicted_pass_s"])
    assert "off by more than" in capsys.readouterr().err, "a pass of a quarter of a second was predicted"
    monkeypatch.setattr(actuals, "add_pairs", lambda pairs: 1 / 0)
    assert passes(actuals.LEAST_PASSES)["predicted_pass_s"], "a run goes on"
    assert "could not be kept" in capsys.readouterr().err
    assert passes(actuals.LEAST_PASSES, drafter="ngram")["actual_pass_s"] is None, "rounds are no plain passes"


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(profile, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_entry_point_has_every_command() -> None:
    result = CliRunner().invoke(profile, ["--help"])
    assert {"probe", "predict", "sweep", "hardware", "validate"} <= set(result.output.split())


@pytest.mark.parametrize("kept", [b"{", b"[]", b"{}", b"3"])
def test_what_was_kept_and_cannot_be_read_is_said_and_stops_no_run(kept: bytes) -> None:
    path = probe_cache.keep(machine())
    with lmdb.open(str(path), subdir=False) as env, env.begin(write=True) as entries:
        entries.put(probe_cache.fingerprint().encode(), kept)
    with pytest.raises(StoreError, match="probe again"):
        probe_cache.this_machine()
    assert probe_cache.measured_machine() is None
    path.unlink()


def test_a_file_that_was_cut_short_is_told_before_it_ends_the_process() -> None:
    path = probe_cache.keep(machine())
    with path.open("r+b") as file:
        file.truncate(2 * 4096)
    with pytest.raises(StoreError):
        probe_cache.this_machine()
    assert probe_cache.measured_machine() is None
    path.unlink()


def test_threads_share_the_file() -> None:
    path = probe_cache.keep(machine())
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: probe_cache.measured_machine(), range(16))) == [machine()] * 16
    path.unlink()


@pytest.mark.parametrize(
    ("told", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA GeForce RTX 3090", "3090"),
        ("NVIDIA GeForce RTX 3090 Ti", "3090ti"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "4070tisuper"),
        ("Tesla P40", "p40"),
        ("Tesla M40 24GB", "m40"),
        ("Tesla T4", "t4"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L40S", None),
        ("AMD Radeon", None),
    ],
)
def test_a_card_is_known_by_what_its_driver_calls_it(told: str, key: str | None) -> None:
    found = catalogue().gpu_of_driver(told)
    assert found == (None if key is None else catalogue().gpu(key))
