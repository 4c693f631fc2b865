"""Energy and carbon of a token: by hand, by source, and M2Cache's old card against its new one."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from profiler.energy import EnergyInputs, energy_of_token
from profiler.hardware import Hardware, HardwareError, catalogue
from tiercache.bench.energy_meter import EnergyMeter
from tiercache.commands import summary
from tiercache.commands.profiler import profile

GIB = 1 << 30
YEAR_S = 365 * 24 * 3600


def machine(gpu: str | None = "3090") -> Hardware:
    return catalogue().machine(gpu, dram_bytes=64 * GIB)


def test_a_token_by_hand() -> None:
    inputs = EnergyInputs.of(machine(), g_per_kwh=400, embodied_kg=100, lifetime_years=5)
    found = energy_of_token(card_s=1.0, cpu_s=0.5, total_s=2.0, inputs=inputs)
    dram_w = 26 * 64 * GIB / 256e9
    assert found.joules == pytest.approx({"card": 350 * 1.1, "cpu": 105 * 0.65, "dram": 2 * dram_w, "ssd": 4.0})
    assert found.operational_g == pytest.approx(sum(found.joules.values()) / 3.6e6 * 400)
    assert found.embodied_g == pytest.approx(2 / (5 * YEAR_S) * 100_000)
    assert found.how == "estimated"


def test_busy_seconds_never_exceed_the_token() -> None:
    inputs = EnergyInputs.of(machine())
    assert energy_of_token(9.0, 9.0, 1.0, inputs).joules["card"] == pytest.approx(350)


def test_what_is_not_given_says_where_it_is_from() -> None:
    plain, h100, alone = (EnergyInputs.of(machine(name)) for name in ("m40", "h100", None))
    assert plain.g_per_kwh.value == 820
    assert "2410.14740" in plain.g_per_kwh.source
    assert plain.embodied_kg.source.startswith("assumed")
    assert h100.embodied_kg.value == 164
    assert "HGX" in h100.embodied_kg.source
    assert alone.card_w.value == alone.embodied_kg.value == 0
    assert EnergyInputs.of(machine("m40"), embodied_kg=7).embodied_kg.source == "given"
    assert all(figure.source for figure in plain.figures.values())


def test_an_old_card_emits_a_third_of_a_new_one_by_the_year() -> None:
    """M2Cache's claim (arXiv 2410.14740, figure 1) is of a year of each card at its limit: the ratio of their watts."""
    old, new = (
        energy_of_token(1.0, 0.0, 1.0, EnergyInputs.of(machine(name))).joules["card"] for name in ("m40", "h100")
    )
    assert old / new == pytest.approx(250 / 700)


def test_an_embodied_figure_that_is_no_number() -> None:
    known = catalogue()
    entry = {**known.entries["gpu"]["m40"], "embodied_kg": "much"}
    with pytest.raises(HardwareError, match="embodied_kg"):
        type(known)({**known.entries, "gpu": {"m40": entry}}).gpu("m40")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(profile, ["predict", "tiny", *arguments, "--json"])


def test_the_command_counts_energy() -> None:
    plain, clean = (json.loads(run(*more).stdout)["energy"] for more in ((), ("--carbon-intensity", "41")))
    assert plain["joules_per_token"] == pytest.approx(sum(plain["joules"].values()))
    assert plain["g_co2e_per_token"]["operational"] == pytest.approx(20 * clean["g_co2e_per_token"]["operational"])
    assert plain["g_co2e_per_token"]["embodied"] == clean["g_co2e_per_token"]["embodied"] > 0
    assert plain["how"] == "estimated"
    assert clean["assumptions"]["g_per_kwh"] == {"value": 41, "basis": "spec", "source": "given", "spread": 0}
    older = json.loads(run("--lifetime-years", "8").stdout)["energy"]
    assert older["g_co2e_per_token"]["embodied"] == pytest.approx(plain["g_co2e_per_token"]["embodied"] / 2)


def test_drafting_takes_energy() -> None:
    tree = ("--draft-nodes", "8", "--tokens-per-pass", "2")
    free, given, small = (
        json.loads(run(*tree, *more).stdout)["energy"]["joules_per_token"]
        for more in ((), ("--draft-s", "0.1"), ("--drafter", "tiny"))
    )
    assert given - free == pytest.approx((350 + 105 + 26 * 64 * GIB / 256e9 + 2) * 0.1 / 2), "all of it busy"
    assert small > free


# Measured.


def zone(folder: Path, name: str, label: str, used_uj: int) -> Path:
    made = folder / name
    made.mkdir(exist_ok=True)
    for file, text in (("name", label), ("energy_uj", str(used_uj)), ("max_energy_range_uj", "1000000000")):
        (made / file).write_text(text + "\n")
    return made


def test_rapl_s_counters_are_read_and_begin_again(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 999_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 1)
    zone(tmp_path, "intel-rapl:0:1", "dram", 5_000_000)
    zone(tmp_path, "intel-rapl:1", "package-1", 0)
    (zone(tmp_path, "intel-rapl:2", "package-2", 0) / "energy_uj").unlink()
    with EnergyMeter(torch.device("cpu"), tmp_path) as meter:
        zone(tmp_path, "intel-rapl:0", "package-0", 2_000_000)
        zone(tmp_path, "intel-rapl:0:0", "core", 900_000)
        zone(tmp_path, "intel-rapl:0:1", "dram", 6_500_000)
        zone(tmp_path, "intel-rapl:1", "package-1", 4_000_000)
    assert meter.joules == pytest.approx({"cpu": 3 + 4, "dram": 1.5})
    found = meter.of_tokens(2)
    assert found == {"how": "measured", "joules_per_token": 4.25, "joules": meter.joules}
    assert "4.2 J a token" in summary.of_energy(found)[0]


def test_nothing_counts_where_there_are_no_counters(tmp_path: Path) -> None:
    with EnergyMeter(torch.device("cpu"), tmp_path / "none") as meter:
        pass
    assert meter.of_tokens(3) is None
    assert summary.of_energy(None) == []


class NVMLError(Exception):
    pass


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A driver's library with one card, whose counter stands at `mj`."""
    made = SimpleNamespace(
        NVMLError=NVMLError, mj=[10_000, 25_000], open=0, nvmlDeviceGetHandleByUUID=lambda uuid: uuid
    )

    def energy(card: str) -> int:
        assert card == "GPU-some"
        if not made.mj:
            raise NVMLError("not supported")
        return made.mj.pop(0)

    made.nvmlInit = lambda: setattr(made, "open", made.open + 1)
    made.nvmlShutdown = lambda: setattr(made, "open", made.open - 1)
    made.nvmlDeviceGetTotalEnergyConsumption = energy
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="some"))
    yield made
    assert made.open == 0, "the library is closed again"


def test_a_card_s_counter(nvml: SimpleNamespace, tmp_path: Path) -> None:
    with EnergyMeter(torch.device("cuda"), tmp_path) as meter:
        pass
    assert meter.joules == {"card": 15.0}


def test_a_card_without_a_counter(nvml: SimpleNamespace, tmp_path: Path) -> None:
    nvml.mj.clear()
    with EnergyMeter(torch.device("cuda"), tmp_path) as meter:
        pass
    assert meter.of_tokens(1) is None
