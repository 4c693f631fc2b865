"""What a probe measures of this machine, where it is kept, and how predictions from it are held against runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from policies.plan import PlanInputs, fill_tiers
from profiler.cost_model import pass_time, upgrades
from profiler.figure import Figure, measured
from profiler.hardware import Hardware, Memory
from profiler.matmul_rates import MatmulRates, nearest
from profiler.workload import Matmul, Workload
from tiercache.bench import machine_probe
from tiercache.commands import profiler
from tiercache.commands.predicting import profile
from tiercache.engine import probe_cache
from tiercache.errors import EnvironmentUnsupportedError, StoreError, UsageError

GIB = 1 << 30
PICO = Path(__file__).parents[1] / "examples" / "pico" / "checkpoint"
FIGURE = Figure(2.0, "measured", "a test", 0.1)


def rates(bytes_per_weight: float = 1.0, weights: int = 1 << 20) -> MatmulRates:
    gbps = {1: Figure(10.0, "measured"), 5: Figure(5.0, "measured")}
    return MatmulRates(bytes_per_weight, weights, gbps, {4: Figure(3.0, "measured")})


def machine() -> Hardware:
    dram = Memory(8 * GIB, Figure(20.0, "measured"))
    return Hardware(None, dram, FIGURE.scaled(50), FIGURE, FIGURE.scaled(0.5), FIGURE.scaled(1e-3), matmuls=(rates(),))


def test_seconds_between_token_counts_and_beyond() -> None:
    found = rates()
    assert found.seconds(10**9, 1) == pytest.approx(0.1)
    assert found.seconds(10**9, 3) == pytest.approx(0.15), "half way between 0.1 and 0.2"
    assert found.seconds(10**9, 20) == pytest.approx(0.8), "four times as many tokens as were measured"
    beside = found.seconds(10**9, 4, width=1000) - found.seconds(10**9, 4)
    assert beside == pytest.approx(3e-9 * 4 * 1000)
    assert found.seconds(10**9, 1, width=1000) == pytest.approx(0.1), "one token's is the layer's"
    assert found.scaled(2).seconds(10**9, 4, width=1000) == pytest.approx(found.seconds(10**9, 4, width=1000) / 2)


def test_the_nearest_rates_are_of_the_precision_first() -> None:
    known = [rates(0.56, 1 << 20), rates(0.56, 1 << 24), rates(1.06, 1 << 20)]
    assert nearest(known, 0.6, 1 << 23) is known[1]
    assert nearest(known, 1.0, 1 << 24) is known[2]
    assert nearest([], 1.0, 1) is None


def test_measured_rates_take_the_place_of_roofs_and_leave_the_bound() -> None:
    needs = PlanInputs({0: GIB}, ["a"], (0,), frozenset(), None, {}, {})
    workload = Workload("int8", 1, (Matmul((0,), GIB, 1000),), needs, {0: GIB}, 100, 0, 0)
    plan = fill_tiers(needs, hbm_bytes=None, dram_bytes=2 * GIB)
    on = replace(machine(), pass_s=Figure(0.25, "measured"))
    found = pass_time(workload, plan, on)
    assert found.busy_s["compute"] == pytest.approx(GIB / 10e9)
    assert found.overhead_s == pytest.approx(2e-3 + 0.25)
    assert found.bound_s == pytest.approx(GIB / 20e9), "the memory's roof"
    faster = upgrades(on)["cpu and main memory"]
    assert pass_time(workload, plan, faster).busy_s["compute"] == pytest.approx(GIB / 20e9)


def test_each_unit_that_is_read_costs_beside_its_bytes() -> None:
    sizes = dict.fromkeys(range(8), GIB)
    needs = PlanInputs(sizes, [*"abcdefgh"], tuple(sizes), frozenset(), None, {}, {})
    workload = Workload("int8", 1, tuple(Matmul((n,), GIB) for n in sizes), needs, sizes, 100, 0, 0)
    plan = fill_tiers(needs, hbm_bytes=None, dram_bytes=5 * GIB)
    assert plan.streamed
    free, costly = (replace(machine(), unit_s=Figure(seconds, "measured")) for seconds in (0.0, 0.01))
    more = pass_time(workload, plan, costly).overhead_s - pass_time(workload, plan, free).overhead_s
    assert more == pytest.approx(0.01 * len(plan.streamed))


def test_a_median_tells_its_spread() -> None:
    found = measured([1.0, 4.0, 2.0], "a test")
    assert (found.value, found.spread, found.basis) == (2.0, 0.75, "measured")


def test_figures_are_kept_for_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERCACHE_HOME", str(tmp_path / "home"))
    with pytest.raises(UsageError, match="tiercache-profile probe"):
        probe_cache.this_machine()
    path = probe_cache.keep(machine())
    assert probe_cache.this_machine() == machine()
    monkeypatch.setattr(probe_cache, "processor_name", lambda: "another")
    with pytest.raises(UsageError, match="nothing was measured of this machine"):
        probe_cache.this_machine()
    path.write_bytes(b"not LMDB" * 4096)
    with pytest.raises(StoreError, match="probe again"):
        probe_cache.this_machine()


def test_a_noisy_machine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = [1.0, 10.0] * machine_probe.REPEATS
    monkeypatch.setattr(machine_probe, "_DISK_BYTES", 8 << 20)
    monkeypatch.setattr("profiler.probe.dram_read", lambda **_: told.pop())
    with pytest.raises(EnvironmentUnsupportedError, match=r"vary by .* probe again"):
        machine_probe.probe_machine(tmp_path, show_progress=False)
    assert not told, "tried twice"


def test_a_folder_that_takes_no_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = CliRunner().invoke(profile, ["probe", "--folder", str(tmp_path / "file")])
    assert result.exit_code == 5
    assert "--folder" in result.stderr


def test_probe_predict_and_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERCACHE_HOME", str(tmp_path / "home"))
    smaller: dict[str, Any] = {"SIDES": (256,), "PRECISIONS": ("int4",), "TOKEN_COUNTS": (1, 16), "REPEATS": 3}
    smaller |= {"_DRAM_BYTES": 64 << 20, "_DISK_BYTES": 16 << 20, "_SOURCE_BYTES": 1 << 20, "TOO_NOISY": 100.0}
    for name, value in smaller.items():
        monkeypatch.setattr(machine_probe, name, value)
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
    found = run("validate", str(PICO), "--precisions", "source", "--token-counts", "1,4")
    assert found["schema"] == "tiercache.validation/1"
    assert len(found["cases"]) == 4
    errors = [abs(case["predicted_s"] / case["measured_s"] - 1) for case in found["cases"]]
    assert found["worst_error"] == pytest.approx(max(errors))
    assert "60% in memory" in found["cases"][-1]["name"]


@pytest.mark.parametrize("counts", ["", "x", "0"])
def test_token_counts_that_cannot_be_meant(counts: str) -> None:
    result = CliRunner().invoke(profiler.measuring.profile, ["validate", "nowhere", "--token-counts", counts])
    assert result.exit_code == 2
    assert "such as 1,16" in result.stderr or "from 1 up" in result.stderr


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(profile, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_the_entry_point_has_every_command() -> None:
    result = CliRunner().invoke(profile, ["--help"])
    assert {"probe", "predict", "sweep", "hardware", "validate"} <= set(result.output.split())
