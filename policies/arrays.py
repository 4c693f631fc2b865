"""numpy, imported when it is first used, and the kinds of arrays that policies take and give.

To import numpy takes longer than all of this package, and who plans or predicts needs none of it. For type checkers
these are numpy's own names; in a run the kinds of arrays are names only.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = ["ArrayLike", "BoolArray", "Floats", "IntArray", "NDArray", "np"]

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

    Floats = NDArray[np.float64]
    IntArray = NDArray[np.int64]
    BoolArray = NDArray[np.bool_]
else:

    class _Numpy:
        def __getattr__(self, name: str) -> Any:
            found = getattr(import_module("numpy"), name)
            setattr(self, name, found)  # so that it is looked up once
            return found

    np = _Numpy()
    ArrayLike = NDArray = Floats = IntArray = BoolArray = Any
