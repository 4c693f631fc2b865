"""Activations by the names of `contract.ACTIVATIONS`, in torch."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import Tensor
from torch.nn import functional

from tiercache.errors import UsageError

FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "silu": functional.silu,
        "gelu": functional.gelu,
        "gelu_tanh": partial(functional.gelu, approximate="tanh"),
        "relu": functional.relu,
        "relu2": lambda x: functional.relu(x).square(),
        "identity": lambda x: x,
    }
)


def check_activation(name: str) -> None:
    """Refuse the name of an activation that there is not."""
    if name not in FUNCTIONS:
        raise UsageError(f"unknown activation {name!r}; there are {', '.join(FUNCTIONS)}")


def activate(name: str, x: Tensor) -> Tensor:
    """The activation called `name`.

    Raises:
        UsageError: there is none.
    """
    check_activation(name)
    return FUNCTIONS[name](x)
