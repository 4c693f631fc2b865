"""Compiling the CPU kernels: once, whole or not at all, else with a way out; and the line about what serves a device.

Only the portable instruction set is compiled here: it takes less than a second.
"""

import shutil
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch

from tiercache.config.cache_folder import TAG_FILE
from tiercache.errors import EnvironmentUnsupportedError, UsageError
from tiercache.kernels import select
from tiercache.kernels.cpu import build
from tiercache.kernels.cpu.backend import CpuKernels

CPU = torch.device("cpu")
ISA = "portable"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where this test's kernels go: a folder that is not there yet."""
    monkeypatch.setenv("TIERCACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """`fake(lines)`: a compiler of these lines of Python."""

    def make(lines: str) -> None:
        script = tmp_path / "compiler.py"
        script.write_text(lines)
        monkeypatch.setenv("CC", f"'{sys.executable}' '{script}'")

    return make


def files(home: Path) -> list[str]:
    """All that lies below a folder, folders included, but for the cache's tag."""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.name != TAG_FILE)


def without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")


def test_the_first_use_compiles_and_the_next_does_not(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not build.is_built(ISA)
    path = build.library(ISA)
    assert path.parent == home / "kernels"
    assert build.is_built(ISA)
    without_a_compiler(monkeypatch)
    assert build.library(ISA) == path
    assert files(home) == ["kernels", f"kernels/{path.name}"]
    out = torch.zeros(4, dtype=torch.uint8)
    CpuKernels(ISA).gather([torch.arange(6, dtype=torch.uint8).view(3, 2)], torch.tensor([2, 0]), out)
    assert out.tolist() == [4, 5, 0, 1]


def test_the_cache_of_the_user_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIERCACHE_HOME", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.library(ISA).parent == tmp_path / "tiercache" / "kernels"


def test_another_source_is_another_file(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.library(ISA)
    source = shutil.copytree(build.SOURCE, tmp_path / "source")
    monkeypatch.setattr(build, "SOURCE", source)
    monkeypatch.setattr(build, "_MAIN", source / "planes.c")
    assert build.library(ISA) == before
    with (source / "planes.h").open("a") as file:
        file.write("/* changed */\n")
    assert not build.is_built(ISA)
    after = build.library(ISA)
    assert files(home) == ["kernels", *sorted(f"kernels/{path.name}" for path in {before, after})]
    assert len({before, after}) == 2


def test_other_flags_are_another_file(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.library(ISA)
    monkeypatch.setitem(build.ISAS, ISA, (frozenset(), ("-DUNUSED",)))
    assert build.library(ISA) != before
    assert len(files(home)) == 3


def test_processes_may_compile_at_once(home: Path, start_child: Callable[..., tuple[BaseProcess, Connection]]) -> None:
    children = [start_child(compile_when_told, str(home)) for _ in range(3)]
    for _, pipe in children:
        assert pipe.recv() == "ready"
    for _, pipe in children:
        pipe.send("go")
    names = {pipe.recv() for _, pipe in children}
    for process, _ in children:
        process.join()
    assert names == {build.library(ISA).name}
    assert files(home) == ["kernels", f"kernels/{names.pop()}"]


def compile_when_told(pipe: Connection, home: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIERCACHE_HOME", home)
        pipe.send("ready")
        pipe.recv()
        path = build.library(ISA)
        CpuKernels(ISA)
        pipe.send(path.name)


@pytest.mark.parametrize(
    "lines",
    ["raise SystemExit('no such flag')", "import sys; open(sys.argv[-2], 'w').write('half'); raise SystemExit(1)"],
)
def test_a_compiler_that_fails_leaves_nothing(home: Path, fake: Callable[[str], None], lines: str) -> None:
    fake(lines)
    with pytest.raises(EnvironmentUnsupportedError, match="gcc 9 or newer, or name another compiler in CC") as caught:
        build.library(ISA)
    assert "compiler.py cannot compile the kernels for portable" in str(caught.value).replace("'", "")
    assert ("no such flag" in str(caught.value)) is ("flag" in lines)
    assert files(home) == ["kernels"]
    assert not build.is_built(ISA)


def test_a_compiler_that_makes_nothing_is_a_failure(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "true")
    with pytest.raises(EnvironmentUnsupportedError):
        build.library(ISA)
    assert files(home) == ["kernels"]


def test_false_is_no_compiler(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")
    with pytest.raises(EnvironmentUnsupportedError, match="false cannot compile"):
        build.library(ISA)
    assert files(home) == ["kernels"]


@pytest.mark.parametrize("named", [True, False])
def test_without_a_compiler_it_says_what_to_install(home: Path, monkeypatch: pytest.MonkeyPatch, named: bool) -> None:
    without_a_compiler(monkeypatch)
    if named:
        monkeypatch.setenv("CC", str(home / "gcc"))
    with pytest.raises(EnvironmentUnsupportedError, match="install gcc"):
        build.library(ISA)
    assert not home.exists()


def test_a_folder_that_cannot_be_written_is_named(home: Path) -> None:
    home.write_text("a file")
    with pytest.raises(EnvironmentUnsupportedError, match="set TIERCACHE_HOME to a folder that can be written"):
        build.library(ISA)


def test_a_name_in_cc_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "true -m64")
    assert build.compiler() == ["true", "-m64"]
    monkeypatch.setenv("CC", "/nonexistent/gcc")
    assert build.compiler() is None


def test_an_unknown_instruction_set_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="avx512vnni, avx2, portable"):
        build.library("sse")
    with pytest.raises(UsageError, match="unknown instruction set 'neon'"):
        CpuKernels("neon")


def test_any_processor_runs_the_portable_path() -> None:
    assert build.instruction_sets()[-1] == ISA
    assert set(build.instruction_sets()) <= build.ISAS.keys()


@pytest.mark.usefixtures("home")
def test_instructions_that_the_processor_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "instruction_sets", lambda: ("avx2",))
    with pytest.raises(EnvironmentUnsupportedError, match="lacks portable; it has avx2"):
        CpuKernels(ISA)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize(("best", "note"), [("avx512vnni", ""), ("avx2", "no AVX-512 with VNNI, so avx2 is the best")])
def test_a_line_about_fast_kernels(monkeypatch: pytest.MonkeyPatch, best: str, note: str) -> None:
    monkeypatch.setattr(build, "instruction_sets", lambda: (best, ISA))
    for built, state in ((False, "compiled at first use"), (True, "compiled")):
        monkeypatch.setattr(build, "is_built", lambda isa, built=built: built)
        fast, line = select.describe(CPU)
        assert fast
        assert line.partition(";")[0] == f"cpu ({best}), {state}"
        assert note in line
        assert bool(note) is (";" in line)


def test_a_line_about_portable_kernels(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "instruction_sets", lambda: (ISA,))
    fast, line = select.describe(CPU)
    assert not fast
    assert line.startswith("cpu (portable), compiled at first use; ")
    assert not home.exists()  # asking compiles nothing
    build.library(ISA)
    without_a_compiler(monkeypatch)
    assert select.describe(CPU)[1].startswith("cpu (portable), compiled; ")


@pytest.mark.usefixtures("home")
def test_a_line_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    without_a_compiler(monkeypatch)
    fast, line = select.describe(CPU)
    assert not fast
    assert "install gcc" in line


def test_the_backend_of_a_device_is_made_once() -> None:
    assert select.select(CPU) is select.select(CPU)
    assert select.select(CPU).name == f"cpu ({build.instruction_sets()[0]})"
    with pytest.raises(EnvironmentUnsupportedError, match="no plane kernels for meta"):
        select.select(torch.device("meta"))
