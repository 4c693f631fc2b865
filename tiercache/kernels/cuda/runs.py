"""Calls made ready to be launched again and again, and CUDA graphs of them.

Knows the driver's structures; nothing of planes, and not when a graph is worth its making (`driver.py`).
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from weakref import WeakSet

from tiercache.kernels.cuda.launches import Call

GRAPHS_OF_A_HALF = 4
"""That a half of a layer has at once: one for each number of tokens; two of attention without a cache."""

GRAPH_BYTES = 120 << 10
"""Of a card's memory for one: 198 of them took 22 MiB on an H100 (docs/measured.md)."""

_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_uint
_SIZES = ("x", "y", "z", "threads", "threads_y", "threads_z", "shared_bytes")


class LaunchConfig(ctypes.Structure):
    """`CUlaunchConfig` of the driver."""

    _fields_ = (
        *((name, _NUMBER) for name in _SIZES),
        ("stream", _POINTER),
        ("attributes", _POINTER),
        ("attribute_count", _NUMBER),
    )


class NodeParameters(ctypes.Structure):
    """`CUDA_KERNEL_NODE_PARAMS_v1` of the driver, what its functions without `_v2` take, old drivers and new ones."""

    _fields_ = (
        ("function", _POINTER),
        *((name, _NUMBER) for name in _SIZES),
        ("packed", _POINTER),
        ("extra", _POINTER),
    )


class Bound:
    """A call made ready for one stream.

    Attributes:
        call: what it was made of; its arguments may be rewritten between launches, for a launch copies them.
        function: the kernel's handle; None until it was launched first.
        config, packed: addresses of what the driver is given.
    """

    __slots__ = ("_config", "_packed", "call", "config", "function", "packed")

    def __init__(self, call: Call, stream: int) -> None:
        self.call = call
        self._config = LaunchConfig(*call.grid, call.threads, 1, 1, call.shared_bytes, stream)
        self._packed = (_POINTER * 1)(ctypes.addressof(call.arguments))
        self.config, self.packed = ctypes.addressof(self._config), ctypes.addressof(self._packed)
        self.function: int | None = None


class Run:
    """Calls on one stream, one after another: a half of a layer.

    Attributes:
        calls: as they are launched.
        stream: its handle.
        launches: times that they were launched one by one.
        graph: of the same calls, once there is one.
        siblings: all graphs of the half; None where it is not to have any.
    """

    __slots__ = ("calls", "graph", "launches", "siblings", "stream")

    def __init__(self, calls: Sequence[Call], stream: int, siblings: WeakSet[Graph] | None) -> None:
        self.calls = [Bound(call, stream) for call in calls]
        self.stream, self.launches, self.siblings = stream, 0, siblings
        self.graph: Graph | None = None


class Graph:
    """A run as one executable graph of the driver's, which is launched by one call.

    A graph keeps arguments as they were; those that differ at a launch are told to it before, which changes no launch
    that is under way. It lives as long as this object.

    Args:
        library: the driver's.
        run: was launched before, so that its kernels are loaded.
        check: raises for a code of the driver's that is not 0; is told what was done.
        destroy: is given both handles (executable, graph) when this object is gone.
    """

    def __init__(
        self,
        library: ctypes.CDLL,
        run: Run,
        check: Callable[[int, str], None],
        destroy: Callable[[int | None, int | None], None],
    ) -> None:
        self._arguments = [call.call.arguments for call in run.calls]
        self._bytes = [(ctypes.c_char * ctypes.sizeof(each)).from_buffer(each) for each in self._arguments]
        self._parameters = [_node(each) for each in run.calls]
        self._at = [ctypes.addressof(each) for each in self._parameters]
        self._told = [each.raw for each in self._bytes]
        self._set, self._launch = library.cuGraphExecKernelNodeSetParams, library.cuGraphLaunch
        self._stream, self._kept = run.stream, run.calls
        graph, made = _POINTER(), _POINTER()
        try:
            check(library.cuGraphCreate(ctypes.byref(graph), 0), "making a graph")
            self._nodes = [_POINTER() for _ in run.calls]
            for node, before, at in zip(self._nodes, [None, *self._nodes], self._at, strict=False):
                behind = None if before is None else ctypes.byref(before)
                added = library.cuGraphAddKernelNode(ctypes.byref(node), graph, behind, before is not None, at)
                check(added, "adding a kernel to a graph")
            check(library.cuGraphInstantiateWithFlags(ctypes.byref(made), graph, 0), "making a graph ready")
        except BaseException:
            destroy(made.value, graph.value)
            raise
        self._executable = made.value
        ending = weakref.finalize(self, destroy, made.value, graph.value)
        ending.atexit = False  # type: ignore[misc]  # the process's end ends them, too

    def launch(self) -> int:
        """Enqueue the calls with their arguments of now; the driver's code."""
        now, told = [each.raw for each in self._bytes], self._told
        if now != told:
            for i, arguments in enumerate(now):
                if arguments != told[i]:
                    code: int = self._set(self._executable, self._nodes[i], self._at[i])
                    if code:
                        return code
                    told[i] = arguments
        done: int = self._launch(self._executable, self._stream)
        return done


def _node(bound: Bound) -> NodeParameters:
    call = bound.call
    return NodeParameters(bound.function, *call.grid, call.threads, 1, 1, call.shared_bytes, bound.packed, None)
