"""What the notebooks run on: your model and budgets where you name them, else a small model that is here.

Environment variables: MODEL (a checkpoint's folder or Hub id), STORE (a folder for its plane store), HBM and DRAM
(budgets such as 22GiB). Without MODEL it is SmolLM2-135M-Instruct where `python -m benchmarks.real.model` has fetched
it, else the bundled pico; both get less memory than their weights take.
"""

import asyncio.locks
import os
from pathlib import Path
from typing import NamedTuple

import torch

from tiercache.config.environment import home_folder

HERE = Path(__file__).parent
SMOL = "SmolLM2-135M-Instruct"


class Setting(NamedTuple):
    """See the module.

    Attributes:
        model: a checkpoint's folder or Hub id.
        store: the folder of its plane store, which is made where it is missing.
        hbm, dram: budgets; without a GPU a region of main memory stands in for it.
        context: tokens that the KV cache is reserved for.
        link_gbps: without a GPU, copies to that region are slowed to so many 1e9 bytes a second; None for not at all.
        prompt: what the model goes on from.
        text: a file to calibrate with.
    """

    model: str
    store: Path
    hbm: str
    dram: str
    context: int
    link_gbps: float | None
    prompt: str
    text: Path


def setting() -> Setting:
    """The setting, from the environment."""
    smol, readme = home_folder() / "real" / SMOL / "checkpoint", HERE.parent / "README.md"
    story = "Once upon a time, in a village by the sea,"
    if named := os.environ.get("MODEL"):
        found = Setting(named, _store(named), "auto", "auto", 2048, None, story, readme)
    elif smol.is_dir():
        found = Setting(str(smol), _store(SMOL), "150MB", "100MB", 128, 0.1, story, readme)
    else:
        code = Path(asyncio.locks.__file__)  # pico writes Python; this module is among those that it was not shown
        pico = HERE / "pico" / "checkpoint"
        found = Setting(str(pico), _store("pico"), "9MiB", "3MiB", 40, 0.05, "def read_lines(path):", code)
    budgets = {name: os.environ.get(name.upper(), getattr(found, name)) for name in ("hbm", "dram")}
    link = None if torch.cuda.is_available() else found.link_gbps
    return found._replace(**budgets, store=Path(os.environ.get("STORE", found.store)), link_gbps=link)


def _store(model: str) -> Path:
    return home_folder() / "stores" / Path(model).name
