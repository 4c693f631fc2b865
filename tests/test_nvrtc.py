"""The CUDA source compiles for every card that is served, is kept well, and gets to a driver. Needs no GPU."""

import ctypes
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_on_cpu.cases import assert_close, dense, matrix, spans
from cuda_on_cpu.emulate import stub_driver

from tiercache.errors import EnvironmentUnsupportedError, UsageError
from tiercache.kernels.cuda import driver, launches, mma_launches, nvrtc
from tiercache.kernels.cuda.backend import CudaKernels
from tiercache.kernels.cuda.driver import Driver
from tiercache.kernels.cuda.runs import Bound


@pytest.fixture(scope="session")
def compiler() -> nvrtc.Nvrtc:
    """An NVRTC of CUDA 12, which serves all cards from 5.2 on."""
    found = [each for each in nvrtc.compilers() if 52 in each.architectures]
    assert found, "the tests need the NVRTC of CUDA 12: pip install nvidia-cuda-nvrtc-cu12"
    return found[0]


def test_every_unit_is_known() -> None:
    newer, older = nvrtc.every_unit(True), nvrtc.every_unit(False)
    files = {path.name for path in Path(nvrtc.__file__).parent.glob("source/*.cu")}
    assert {unit.file for unit in (*newer, *older)} == files
    assert len(set(newer)) == len(newer) == 2 + 3 + 3 * 9
    assert len(set(older)) == len(older) == 2 + 3 * 3 + 2 * 9
    for unit in (*newer, *older):
        assert all(nvrtc.SourceUnit.of(kernel) == unit for kernel in kernels_of(unit))


TO_MACHINE_CODE = (52, 75, 86, 90, 120)  # both branches of the source (before 8.0, from it on), and the newest of each
TO_PTX = (60, 61, 70, 80, 89, 100, 103)
LONGEST = ("attention.cu", "rows.cu", "downmma.cu")  # more than half of the time, and in no way about an architecture


@pytest.mark.parametrize("architecture", sorted(TO_MACHINE_CODE + TO_PTX))
def test_the_source_compiles(compiler: nvrtc.Nvrtc, architecture: int) -> None:
    target = compiler.target(divmod(architecture, 10))
    assert target == f"sm_{architecture}"
    newer = divmod(architecture, 10) >= mma_launches.LEAST_CAPABILITY
    for unit in nvrtc.every_unit(newer):
        if unit.group not in (0, 64) or (architecture in TO_PTX and unit.file in LONGEST):
            continue
        # Three planes load all there is to load. Fewer, which merge otherwise, go to PTX for the oldest card and for
        # one with matrix units. The emulation builds and runs every pair of planes and groups.
        if unit.planes in (0, 3) or architecture in (52, 90):
            whole = unit.planes in (0, 3) and architecture in TO_MACHINE_CODE
            code = compiler.compile(unit, target if whole else target.replace("sm", "compute"))
            assert code.startswith(b"\x7fELF") == whole
            for kernel in kernels_of(unit):
                assert kernel.encode() + (b"\0" if whole else b"(") in code
                assert nvrtc.SourceUnit.of(kernel) == unit


def kernels_of(unit: nvrtc.SourceUnit) -> list[str]:
    p = unit.planes
    return {
        "common.cu": ["prepare", "digits", "sum", "gather"],
        "layer.cu": [f"layer_{name}" for name in ("enter", "rotate", "combine", "leave", "settle")],
        "attention.cu": [f"attention_{p}_{q}_{n}" for n in (1, 2, 4) for q in (1, 4, 8) if q * n < 32],
        "mma.cu": [f"mma_{p}_{t}_{unit.group}" for t in (1, 2)],
        "dots.cu": [f"dots_{p}_1_{unit.group}"],
        "rows.cu": [f"rows_{p}_{t}_{r}" for t in (1, 2, 4, 8) for r in (2, 4)],
        "down.cu": [f"down_{p}_{t}_{unit.group}" for t in (1, 2, 4)],
        "downs.cu": [f"downs_{p}_{t}_{unit.group}" for t in (8, 16, 32, 64)],
        "downmma.cu": [f"downmma_{p}_{t}_{unit.group}" for t in (1, 2)],
        "decode.cu": [f"decode_{p}_0_0"],
    }[unit.file]


class FakeCompiler(nvrtc.Nvrtc):
    """Serves some cards, compiles to a word, counts."""

    def __init__(self, architectures: tuple[int, ...], version: tuple[int, int] = (13, 0)) -> None:
        self.path, self.compiled = "fake", 0
        self.__dict__.update(architectures=architectures, version=version)

    def compile(self, unit: nvrtc.SourceUnit, target: str) -> bytes:
        self.compiled += 1
        return f"{unit} {target}".encode() * 1000


def test_the_compiler_that_serves_the_card_is_chosen() -> None:
    new, old = FakeCompiler((75, 80, 90, 120)), FakeCompiler((50, 52, 61, 75, 90), (12, 6))
    assert nvrtc.compiler_for((9, 0), [new, old]) == (new, "sm_90")
    assert nvrtc.compiler_for((5, 2), [new, old]) == (old, "sm_52")
    assert nvrtc.compiler_for((12, 0), [old, new]) == (new, "sm_120")
    assert nvrtc.compiler_for((12, 1), [new, old]) == (new, "compute_120")  # the driver translates
    with pytest.raises(EnvironmentUnsupportedError, match=r"5\.2.*found 13\.0 \(from 7\.5\).*nvidia-cuda-nvrtc-cu12"):
        nvrtc.compiler_for((5, 2), [new])
    with pytest.raises(EnvironmentUnsupportedError, match="found none"):
        nvrtc.compiler_for((8, 6), [])


def test_compiled_code_is_kept_and_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIERCACHE_HOME", str(tmp_path))
    folder, unit, fake = nvrtc.cache_folder(), nvrtc.SourceUnit("rows.cu", 2), FakeCompiler((86,))
    assert folder == tmp_path / "kernels"
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(nvrtc.image(unit, fake, "sm_86", folder))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = fake.compiled
    assert set(found) == {nvrtc.image(unit, fake, "sm_86", folder)}
    assert fake.compiled == before
    assert len(list(folder.iterdir())) == 1
    for other in (
        (unit, FakeCompiler((86,), (12, 0)), "sm_86"),
        (nvrtc.SourceUnit("rows.cu", 3), fake, "sm_86"),
        (unit, fake, "sm_90"),
    ):
        nvrtc.image(*other, folder)
    assert len(list(folder.iterdir())) == 4
    (tmp_path / "file").touch()
    with pytest.raises(EnvironmentUnsupportedError, match="TIERCACHE_HOME"):
        nvrtc.image(unit, fake, "sm_86", tmp_path / "file")


def test_what_the_compiler_says_is_passed_on(compiler: nvrtc.Nvrtc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "source", lambda file: b"#error not today\n")
    with pytest.raises(EnvironmentUnsupportedError, match="not today"):
        compiler.compile(nvrtc.SourceUnit("rows.cu", 2), "sm_86")


def test_calls_reach_a_driver(
    compiler: nvrtc.Nvrtc, emulated_cuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From CudaKernels to cuLaunchKernel, with a driver of the same signatures on top of the emulated kernels."""
    library = stub_driver(emulated_cuda, monkeypatch)
    monkeypatch.setattr(driver, "compilers", lambda: [compiler])
    made = Driver(torch.device("cuda"), tmp_path / "kept")
    kernels = CudaKernels(torch.device("cpu"), made)
    assert (str(made.device), kernels.name) == ("cuda:0", "cuda (sm_86)")
    weight, x, out, down = matrix(30, 200, 64, "int3"), torch.randn(3, 200), torch.zeros(3, 30), torch.zeros(3, 200)
    kernels.matmul(kernels.quantize_activations(x, 64), weight, out)
    kernels.matmul_transposed(out, weight, down)
    assert_close(out, x @ dense(weight).T, x.abs() @ spans(weight).T)
    assert_close(down, out @ dense(weight), out.abs() @ spans(weight))
    assert {path.name.split("-")[0] for path in (tmp_path / "kept").iterdir()} == {"common", "mma", "downmma"}
    with ThreadPoolExecutor(1) as pool:  # a thread that torch has not worked in has no context
        pool.submit(kernels.matmul, kernels.quantize_activations(x, 64), weight, out).result()
    assert_close(out, 2 * x @ dense(weight).T, 2 * x.abs() @ spans(weight).T)
    library.stub_refuse(ctypes.c_uint64(weight.scales.data_ptr()))
    with pytest.raises(UsageError, match="pageable memory"):
        kernels.matmul_transposed(out, weight, down)
    with pytest.raises(EnvironmentUnsupportedError, match="there are 1 CUDA devices"):
        Driver(torch.device("cuda", 1), tmp_path)
    for kept in (tmp_path / "kept").iterdir():
        kept.write_bytes(b"spoiled")
    with pytest.raises(EnvironmentUnsupportedError, match=r"stub says no.*empty it"):
        CudaKernels(torch.device("cpu"), Driver(torch.device("cuda"), tmp_path / "kept")).quantize_activations(x, 64)


def test_a_driver_before_launch_configurations_is_served(emulated_cuda: Path) -> None:
    library = ctypes.CDLL(str(emulated_cuda))
    asked: list[tuple[object, ...]] = []
    old = SimpleNamespace(cuLaunchKernel=lambda *given: asked.append(given) or 0)
    bound = Bound(launches.decode_call(launches.MatrixArguments(groups=4, group=64), 2, (), (9, 256), 0), stream=7)
    assert driver._launching(old)(bound.config, 5, bound.packed, None) == 0  # type: ignore[arg-type]
    assert asked == [(5, 9, 1, 1, 256, 1, 1, 0, 7, bound.packed, None)]
    assert driver._launching(library) is library.cuLaunchKernelEx
