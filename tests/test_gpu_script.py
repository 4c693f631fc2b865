"""`make gpu` without a card: how parts are run, the table and, with stand-ins for the card, each part's own code."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_compile, gpu_kernels, gpu_launches, gpu_offload, gpu_probe, gpu_roofs
from benchmarks.gpu import Part
from benchmarks.gpu_table import table
from tiercache.bench import card_probe, kernels, layer_probe, machine_probe, shapes, undisturbed
from tiercache.bench import model as bench_model
from tiercache.bench.timing_device import Effort, TimingCpu
from tiercache.kernels.cuda.nvrtc import SourceUnit
from tiercache.kernels.reference import ReferenceKernels
from tiercache.tiers.device import CpuDevice

CPU = torch.device("cpu")
HOUSE = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("one_thread")


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The JSON of the last line."""
    found: dict[str, Any] = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    return found


def test_without_a_card_it_says_so() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=HOUSE, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert done.stderr.splitlines() == ["make gpu needs a CUDA card, and torch sees none; run 'tiercache doctor'"]


def test_a_part_that_fails_or_hangs_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "_LEAST_S", 0.0)
    (tmp_path / "hangs.py").write_text("import time\nprint('so far', flush=True)\ntime.sleep(600)")
    (tmp_path / "fails.py").write_text("raise SystemExit(3)")
    (tmp_path / "works.py").write_text("import sys\nprint('x')\nprint('{\"given\": \"' + sys.argv[1] + '\"}')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{HOUSE}")
    chosen = (Part("hangs", ("hangs",), 2.0), Part("fails", ("fails",), 60), Part("works", ("works", "this"), 60))
    begin = time.perf_counter()
    found = gpu.run(chosen, tmp_path / "out")
    assert time.perf_counter() - begin < 60
    assert [(each["part"], each["exit_code"]) for each in found] == [("hangs", 124), ("fails", 3), ("works", 0)]
    assert found[2]["result"] == {"given": "this"}
    assert "so far" in (tmp_path / "out" / "hangs.log").read_text()
    assert gpu.run(chosen[2:], tmp_path / "out", limit_s=-1.0)[0]["exit_code"] == 124, "no time is left for it"
    assert gpu.finish({"card": "a card", "torch": "2", "parts": found}, tmp_path / "out") == 1
    lines = capsys.readouterr().out.strip().splitlines()
    assert json.loads(lines[-1])["parts"] == found, "the last line"
    assert any("out of time" in line for line in lines[:-1]), "a table before it"
    assert gpu.finish({"card": "a card", "torch": "2", "parts": found[2:]}, tmp_path / "out") == 0


def test_only_files_with_tests_of_a_card_are_collected() -> None:
    files = {path.name for path in gpu.marked_tests(HOUSE / "tests")}
    assert "test_kernels_cuda.py" in files
    assert not files & {"test_serve.py", "test_notebooks.py", "test_gpu_script.py"}


def test_the_table_has_every_part_s_figures() -> None:
    figure = {"value": 2.0}
    results = {
        "offload": {
            "schema": "tiercache.gpu-offload/2",
            "checks": [
                {"check": "a", "ok": True, "peak_bytes": 90, "hbm_bytes": 100},
                {"check": "b", "ok": False, "error": "E: why"},
            ],
        },
        "roofs": {
            "schema": "tiercache.gpu-roofs/3",
            "gpu": {"memory": {"gbps": figure}, "compute_type": "fp16", "tflops": figure},
            "copies": {"pinned, up": {"value": 54.3}},
            "overlap": {"value": 0.97},
            "launch_us": 6.5,
        },
        "launches": {
            "schema": "tiercache.gpu-launches/1",
            "passes": [
                {
                    "tokens": 8,
                    "layers": 2,
                    "pass_ms": 3.0,
                    "card_ms": 1.0,
                    "launches": 10,
                    "synchronisations": 0,
                    "copies": 4,
                }
            ],
        },
        "nothing": None,
    }
    parts = [{"part": name, "seconds": 1.5, "exit_code": 0, "result": each} for name, each in results.items()]
    text = table(parts)
    for wanted in ("1 of 2 pass", "E: why", "0.900 at most", "54.3 GB/s", "0.97", "5 launches", "nothing"):
        assert wanted in text


def test_offload_beside_a_stand_in(checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu_offload, "NEW_TOKENS", 8)
    monkeypatch.setattr(gpu_offload, "TOKEN_COUNTS", (1, 9))
    monkeypatch.setattr(gpu_offload, "DRAFTERS", ("resident",))
    ids = torch.arange(4, 12)[None] % 7 + 10
    checks = gpu_offload.check_everything(checkpoint("llama"), tmp_path, ids, CPU)
    assert len(checks.rows) == 3 * 3 + 1 + 2 + 1
    assert [row for row in checks.rows if not row["ok"]] == []


def test_a_shape_beside_a_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_offload, "TOKEN_COUNTS", (1, 9))
    checks = gpu_offload.check_shape("tiny", tmp_path, CPU)
    assert len(checks.rows) == 3 * 2
    assert [row for row in checks.rows if not row["ok"]] == []


def test_offload_tells_what_differs_and_what_fails() -> None:
    checks = gpu_offload.Checks()
    logits = [torch.zeros(2) for _ in range(1 + len(gpu_offload.TOKEN_COUNTS))]
    with checks.row("differs") as row:
        gpu_offload.compare(row, [*logits[:-1], torch.ones(2)], logits)
    with checks.row("fails"):
        raise ValueError("why")
    assert [row["ok"] for row in checks.rows] == [False, False]
    assert checks.rows[0]["differences"] == {str(gpu_offload.TOKEN_COUNTS[-1]): 1.0}
    assert checks.rows[1]["error"] == "ValueError: why"


def test_kernels_are_compiled_at_once_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIERCACHE_HOME", str(tmp_path))
    units = [SourceUnit("common.cu"), SourceUnit("decode.cu", 2)]
    for times in range(2):
        gpu_compile.measure((8, 6), units, 2)
        found = told(capsys)
        assert found["units"] == 2
        assert times == 0 or found["one_by_one_s"] < 1, "read from the cache folder"
    assert len(list((tmp_path / "kernels").iterdir())) == 2
    text = table([{"part": "compile", "seconds": 1.0, "exit_code": 0, "result": found}])
    assert "2 units" in text


def test_roofs_of_a_stand_in(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _small(monkeypatch)
    gpu_roofs.measure(CpuDevice(CPU))
    found = told(capsys)
    assert found["schema"] == "tiercache.gpu-roofs/3"
    assert found["launch_us"] > 0
    assert table([{"part": "roofs", "seconds": 1.0, "exit_code": 0, "result": found}]).count("GB/s") == 6


def test_kernels_of_a_stand_in(capsys: pytest.CaptureFixture[str]) -> None:
    effort = Effort(least_s=0, least_samples=1, caches=0, least_bytes=1 << 20, roof_bytes=8 << 20)
    tiny = kernels.Options(("tiny",), ("int4",), (1, 3), effort=effort, show_progress=False)
    near, far = TimingCpu(ReferenceKernels()), TimingCpu(ReferenceKernels())
    gpu_kernels.measure(near, far, tiny, dataclasses.replace(tiny, token_counts=(1,)))
    found = told(capsys)
    assert len(found["results"]) == 5 * (2 + 1)
    text = table([{"part": "kernels", "seconds": 1.0, "exit_code": 0, "result": found}])
    assert "of the roof" in text
    assert "torch's bf16 product" in text


def test_launches_and_passes_of_a_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_launches, "HBM", "200MiB")
    store = shapes.make_store(shapes.find("tiny"), tmp_path / "tiny-planes-0", 0, show_progress=False)
    gpu_launches.measure(store, CPU)
    passes = told(capsys)
    assert [row["tokens"] for row in passes["passes"]] == list(gpu_launches.TOKEN_COUNTS)
    found = bench_model.bench(
        bench_model.Options(
            shape="tiny", precision="int4", hbm="64MiB", dram="256MiB", folder=tmp_path, show_progress=False
        )
    )
    text = table(
        [
            {"part": "a", "seconds": 1.0, "exit_code": 0, "result": json.loads(json.dumps(each))}
            for each in (passes, found)
        ]
    )
    assert "ms a pass" in text
    assert "launches" in text


def test_the_probe_of_a_stand_in_tells_each_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    _small(monkeypatch)
    for name, value in {
        "_DRAM_BYTES": 8 << 20,
        "_DISK_BYTES": 8 << 20,
        "_GEMM": 64,
        "KINDS": ("int8", "source"),
    }.items():
        monkeypatch.setattr(machine_probe, name, value)
    monkeypatch.setattr(layer_probe, "SHAPES", tuple(layer_probe._shape(heads, 4) for heads in (2, 3, 4, 5, 6)))
    monkeypatch.setattr(layer_probe, "ROUNDS", {1: 1, 9: 1})
    gpu_probe.measure(tmp_path, CPU)
    output = capfd.readouterr()
    assert json.loads(output.out.strip().splitlines()[-1])["figures"]
    for step in ("reads of the disk", "main memory and the processor", "layers at int8"):
        assert f"measured {step} in" in output.err


def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"BYTES": 4 << 20, "BLOCKS": (64 << 10,), "GEMM": 64, "_ATTENDED": 32, "_QUEUED": 2}
    for name, value in sizes.items():
        monkeypatch.setattr(card_probe, name, value)
    monkeypatch.setattr(undisturbed, "_LOOK_S", 0.1)
    monkeypatch.setattr(undisturbed, "_LOOK_ON_S", 0.1)
    monkeypatch.setattr(undisturbed, "AS_USUAL", 1e9)
