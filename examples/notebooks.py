"""Makes the notebooks from their text and runs them: `python -m examples.notebooks`, or with some of their numbers.

The text (`*.md`) is what people edit. A notebook has the same cells, and what they gave when they were last run here.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import jupytext
import nbformat

HERE = Path(__file__).parent
_WIDGET = "application/vnd.jupyter.widget-view+json"


def main() -> None:
    """Make, run and write each notebook; exit code 1 where one fails."""
    for number in sys.argv[1:] or ("",):
        for text in sorted(HERE.glob(f"{number or '[1-9]'}_*.md")):
            notebook = text.with_suffix(".ipynb")
            jupytext.write(jupytext.read(text), notebook)
            run(notebook)
            nbformat.write(tidied(nbformat.read(notebook, 4)), notebook)


def run(notebook: Path, **options: Any) -> None:
    """Run a notebook top to bottom, in its own folder, and keep in it what its cells gave.

    Args:
        notebook: the file.
        options: as of `subprocess.run`.

    Raises:
        CalledProcessError: a cell failed; its output says which.
    """
    nbmake = ("--nbmake", "--overwrite", "--nbmake-timeout=1800", "-p", "no:cacheprovider", "-c", "/dev/null")
    command = [sys.executable, "-m", "pytest", "--quiet", *nbmake, "--rootdir", str(notebook.parent), str(notebook)]
    subprocess.run(command, check=True, **options)


def tidied(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what changes from run to run and tells nothing: times, names of cells, progress bars that have gone."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for place, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{place}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined([each for each in cell.outputs if _WIDGET not in each.get("data", {})])
    return notebook


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """What was written piece by piece to one stream, as one piece."""
    found: list[nbformat.NotebookNode] = []
    for each in outputs:
        if found and each.output_type == "stream" and found[-1].get("name") == each.name:
            found[-1].text += each.text
        else:
            found.append(each)
    return found


if __name__ == "__main__":
    main()
