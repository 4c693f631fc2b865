"""tiercache: run language models much larger than the GPU they run on.

with tiercache.offload("path-or-model", hbm="22GiB", dram="48GiB") as model:
    model.generate(...)
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tiercache.engine.offload import offload
    from tiercache.errors import TiercacheError
    from tiercache.store.convert import convert
    from tiercache.store.planestore import PlaneStore

# Importing the package imports neither torch nor transformers; naming something from it does.
_HOMES = {
    "PlaneStore": "tiercache.store.planestore",
    "TiercacheError": "tiercache.errors",
    "convert": "tiercache.store.convert",
    "offload": "tiercache.engine.offload",
}

__all__ = ["PlaneStore", "TiercacheError", "convert", "offload"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tiercache' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
