"""The hierarchical roofline by hand, the charts as pictures and as text, and what of them is refused."""

import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from policies.plan import PlanInputs, fill_tiers
from profiler.hardware import Hardware, catalogue
from profiler.roofline import WHOLE, Phase, operations, roofs
from profiler.workload import Matmul, Workload
from tiercache import pictures
from tiercache.commands.profiler import profile

GIB = 1 << 30
NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp neurons", "model.layers.1.mlp neurons", "lm_head")
UNIT = 1_000_000_000  # bytes, of 2e9 weights


def run(*arguments: str) -> Any:
    return CliRunner().invoke(profile, list(arguments))


def workload() -> Workload:
    sizes = dict.fromkeys(range(len(NAMES)), UNIT)
    needs = PlanInputs(sizes, NAMES, tuple(sizes), frozenset(), None, {}, {})
    matmuls = tuple(Matmul((key,), 2 * UNIT) for key in sizes)
    return Workload("int4", 2, matmuls, needs, sizes, 1000, 10_000_000, 4096)


def machine(gpu: str | None = "3090") -> Hardware:
    return catalogue().machine(gpu, dram_bytes=64 * GIB)


@pytest.mark.parametrize(("gpu", "dram_units"), [("3090", 8), ("m40", 3.1), (None, 8), (None, 3.1)])
def test_operations_lie_on_their_roofs(gpu: str | None, dram_units: float) -> None:
    on = machine(gpu)
    plan = fill_tiers(
        workload().needs, hbm_bytes=None if gpu is None else int(3.2 * UNIT), dram_bytes=int(dram_units * UNIT)
    )
    phases = {"decode": Phase(1, 500), "verify": Phase(65, 500), "prefill": Phase(512, 0)}
    found, limits = operations(workload(), plan, on, phases), roofs(on)
    assert {each.phase for each in found} == set(phases)
    for each in found:
        if each.kind == WHOLE:
            assert each.gflops < max(roof.gflops(each.intensity) for roof in limits.values())
        else:
            assert each.gflops == pytest.approx(limits[each.resource].gflops(each.intensity), rel=1e-6), each


def test_a_roof_by_hand() -> None:
    on = machine("3090")
    found = roofs(on)
    assert found["link"].gflops(100) == pytest.approx(100 * 25)
    assert found["link"].ridge == pytest.approx(71000 / 25)
    assert found["cpu"].gflops(1e6) == 600, "the processor's peak"
    assert found["compute"].gbps == pytest.approx(0.82 * 936)
    plan = fill_tiers(workload().needs, hbm_bytes=8 * UNIT, dram_bytes=8 * UNIT)  # all of it on the card
    decode, *_ = operations(workload(), plan, on, {"decode": Phase(1, 500)})
    assert decode.intensity == pytest.approx(4), "two operations for each of two weights a byte"
    assert decode.gflops == pytest.approx(4 * 0.82 * 936)


KINDS = ("roofline", "time", "budgets")
DRAFTED = ("--draft-nodes", "8", "--tokens-per-pass", "2", "--draft-s", "0.001")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_pictures(kind: str, suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"chart{suffix}"
    found = run("plot", "tiny", "--kind", kind, "--gpu", "p40", *DRAFTED, "--out", str(file))
    assert found.exit_code == 0, found.output
    start = file.read_bytes()[:5]
    assert start == (b"\x89PNG\r" if suffix == ".png" else b"<?xml")
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("llama-2-7b", ("--gpu", "2080ti", "--precision", "int8")),
        ("llama-2-7b", ("--gpu", "none", "--dram", "4GiB")),
        ("tiny", ("--gpu", "3090")),
        ("llama-2-70b", ("--gpu", "3090")),
    ],
)
def test_no_label_of_a_roofline_covers_another(
    model: str, arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(pictures, "save", lambda figure, *_: drawn.append(figure))
    assert run("plot", model, *arguments, "--out", str(tmp_path / "chart.png")).exit_code == 0
    (axes,) = drawn[0].axes
    labels = [text for text in axes.texts if text.get_text() and text.get_rotation() == 0]
    assert {"decode", "prefill of 512", "verify 64 nodes"} <= {text.get_text().split(":")[0] for text in labels}
    boxes = [text.get_window_extent() for text in labels]
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    edge = axes.get_window_extent()
    assert all(edge.x0 <= box.x0 and box.x1 <= edge.x1 and edge.y0 <= box.y0 and box.y1 <= edge.y1 for box in boxes)


def test_charts_as_text_and_as_data() -> None:
    roofline = run("plot", "tiny", "--gpu", "p40")
    assert "card memory" in roofline.stderr
    assert "prefill of 512" in roofline.stderr
    assert "fp32 operations" in roofline.stderr, "a prefill is right of the ridge"
    assert not roofline.stdout
    data = json.loads(run("plot", "tiny", "--kind", "time", "--gpu", "p40", "--gpu", "none", *DRAFTED, "--json").stdout)
    assert data["schema"] == "tiercache.plot/1"
    names = [bar["name"].split(",")[0] for bar in data["bars"]]
    assert names == ["p40", "p40", "none", "none"]
    for bar in data["bars"]:
        assert sum(bar["ms"].values()) == pytest.approx(1e3 / bar["tokens_per_s"])
    assert "drafting" in run("plot", "tiny", "--kind", "time", *DRAFTED).stderr


def test_speed_by_budget() -> None:
    found = json.loads(
        run("plot", "llama-2-7b", "--kind", "budgets", "--gpu", "3090", "--gpu", "none", "--json").stdout
    )
    by_dram, by_card = found["panels"]
    assert [line["name"] for line in by_dram["lines"]] == ["3090", "none"]
    assert [line["name"] for line in by_card["lines"]] == ["3090"]
    for line in (*by_dram["lines"], *by_card["lines"]):
        speeds = [speed for _, speed in line["points"] if speed is not None]
        assert speeds == sorted(speeds), "more memory never makes it slower"
        assert max(speeds) >= line["own"][1]
    card = by_card["lines"][0]["points"]
    assert card[0][1] is None, "a card of a GiB does not hold it"
    assert "does not fit" in run("plot", "llama-2-7b", "--kind", "budgets").stderr


def test_a_sweep_s_heat_map(tmp_path: Path) -> None:
    sizes = ("--dram", "1GiB", "--dram", "8GiB")
    wide = ("sweep", "llama-2-7b", "--gpu", "3090", "--gpu", "none", "--ssd", "sata", "--ssd", "pcie-3", *sizes)
    text = run(*wide).stderr
    for name in ("3090, sata", "none, pcie-3", "1GiB", "does not fit"):
        assert name in text
    for suffix in (".png", ".svg"):
        file = tmp_path / f"map{suffix}"
        assert run(*wide, "--out", str(file)).exit_code == 0
        assert file.stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("plot", "tiny", "--out", "chart.jpg"), ".png"),
        (("plot", "tiny", "--out", "nowhere/at/all.png"), "no folder"),
        (("sweep", "tiny", "--out", "map.pdf"), ".svg"),
        (("plot", "tiny", "--gpu", "3090", "--gpu", "m40"), "--kind time"),
        (("plot", "tiny", "--kind", "pie"), "roofline"),
        (("plot", "tiny", "--draft-s", "1"), "--draft-nodes"),
    ],
)
def test_what_cannot_be_drawn(arguments: tuple[str, ...], word: str) -> None:
    found = run(*arguments)
    assert found.exit_code == 2, found.output
    assert word in found.stderr


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "chart.png").mkdir()
    found = run("plot", "tiny", "--out", str(tmp_path / "chart.png"))
    assert found.exit_code == 2, found.output
    assert "cannot be written" in found.stderr


def test_without_matplotlib_there_is_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    found = run("plot", "tiny", "--out", str(tmp_path / "chart.png"))
    assert found.exit_code == 5, found.output
    assert "pip install 'matplotlib" in found.stderr
    assert run("plot", "tiny").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("llama-2-7b", "--gpu", "none", "--dram", "100MiB"), "--dram"),
        (("llama-2-70b", "--gpu", "2080ti", "--context", "65536"), "--gpu"),
    ],
)
def test_what_does_not_fit_says_what_would(arguments: tuple[str, ...], option: str) -> None:
    found = run("predict", *arguments)
    assert found.exit_code == 3, found.output
    way_out = found.stderr.replace("\n", " ").rpartition(";")[2]
    assert option in way_out
    if option == "--dram":
        size = way_out.split("--dram ")[1].split()[0]
        assert run("predict", *arguments[:-1], size).exit_code == 0
    else:
        assert "GiB or more" in way_out
