"""The notebooks run top to bottom on the bundled model, agree with their text, and are committed with whole outputs."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import pytest

from examples import notebooks

HOUSE = Path(__file__).parents[1]
EXAMPLES = HOUSE / "examples"
NAMES = sorted(path.stem for path in EXAMPLES.glob("*.ipynb"))
MOST_BYTES = 1 << 20
MACHINE = re.compile(r"/(home|root|tmp|work|Users|usr)/")  # a path of whoever ran it


def read(path: Path) -> Any:
    return nbformat.read(path, 4)


def kinds(notebook: Any) -> list[list[str]]:
    """Of each cell what it shows beside text that is printed: pictures and tables."""
    shown = [[each for output in cell.get("outputs", ()) for each in output.get("data", {})] for cell in notebook.cells]
    return [[kind for kind in each if kind in ("image/png", "text/html")] for each in shown]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the examples, so that nothing is written where they lie."""
    to = tmp_path_factory.mktemp("notebooks") / "examples"
    shutil.copytree(EXAMPLES, to, ignore=shutil.ignore_patterns("__pycache__"))
    return to


def test_there_are_four() -> None:
    assert [name[0] for name in NAMES] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_top_to_bottom(name: str, place: Path) -> None:
    """In order, in one process, so that stores and calibrations are made once; without a network and a GPU."""
    environment = {**os.environ, "PYTHONPATH": str(HOUSE), "IPYTHONDIR": str(place.parent)}
    for variable in ("MODEL", "STORE", "HBM", "DRAM", "PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST"):
        environment.pop(variable, None)
    try:
        notebooks.run(place / f"{name}.ipynb", env=environment, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stdout[-20_000:])
    assert kinds(read(place / f"{name}.ipynb")) == kinds(read(EXAMPLES / f"{name}.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_text_and_notebook_agree(name: str) -> None:
    text, notebook = (
        [(cell.cell_type, cell.source.strip()) for cell in found.cells]
        for found in (jupytext.read(EXAMPLES / f"{name}.md"), read(EXAMPLES / f"{name}.ipynb"))
    )
    assert text == notebook, f"make it anew: python -m examples.notebooks {name[0]}"


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_committed_whole(name: str) -> None:
    path = EXAMPLES / f"{name}.ipynb"
    notebook = read(path)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in each for each in kinds(notebook))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert path.stat().st_size < MOST_BYTES
    assert not MACHINE.search(path.read_text(encoding="utf-8"))
    assert notebook == notebooks.tidied(read(path))


def test_tidying_leaves_out_bars_and_joins_streams() -> None:
    written = [nbformat.v4.new_output("stream", name="stdout", text=text) for text in ("a", "b")]
    bar = nbformat.v4.new_output("display_data", {"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"})
    picture = nbformat.v4.new_output("display_data", {"image/png": "x"})
    cell = nbformat.v4.new_code_cell("1", outputs=[bar, *written, picture], metadata={"execution": {"iopub": "now"}})
    made = notebooks.tidied(nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {}}))
    assert [output.get("text", output.get("data")) for output in made.cells[0].outputs] == ["ab", {"image/png": "x"}]
    assert made.cells[0].metadata == {}
    assert "widgets" not in made.metadata
