"""Launches compiled kernels through CUDA's driver, on torch's current stream.

Knows the driver's interface and torch's streams; nothing of planes. No CUDA toolkit is needed: the driver brings
libcuda, and NVRTC (`nvrtc.py`) the compiler.
"""

from __future__ import annotations

import ctypes
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tiercache.config import environment
from tiercache.errors import EnvironmentUnsupportedError, UsageError
from tiercache.kernels.cuda.contexts import ThreadContext
from tiercache.kernels.cuda.launches import Call
from tiercache.kernels.cuda.nvrtc import SourceUnit, cache_folder, compiler_for, compilers, image
from tiercache.kernels.cuda.runs import GRAPHS_OF_A_HALF, Bound, Graph, LaunchConfig, Run
from tiercache.progress import note
from tiercache.tiers.device import on_gpu

_DEVICE_POINTER = 3  # CU_POINTER_ATTRIBUTE_DEVICE_POINTER
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
_POINTER, _NUMBER = ctypes.c_void_p, ctypes.c_uint

_BEFORE_A_GRAPH = 2
"""Times that a run is launched call by call: a prompt comes once, and its graph would cost more than it saves."""


class Driver:
    """Runs calls. Kernels are compiled, or taken from the disk, when first launched.

    *Ordering*: all calls go to the stream that is torch's current one when they are launched, and overtake nothing
    there. Host memory handed to a call is read later: its owner keeps it locked and unchanged until that stream has
    passed the call.

    Attributes:
        device: the CUDA device.
        capability: the card's compute capability.
        multiprocessors: how many it has.
        stream: gives the handle of torch's current stream there.

    Args:
        device: the CUDA device.
        folder: where compiled kernels are kept; the cache folder if None.

    Raises:
        EnvironmentUnsupportedError: no such device, or no compiler for it.
    """

    def __init__(self, device: torch.device, folder: Path | None = None) -> None:
        if not torch.cuda.is_available():
            raise EnvironmentUnsupportedError(
                "torch sees no CUDA device; use the CPU kernels, or a torch built for CUDA"
            )
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        if self.device.index >= torch.cuda.device_count():
            raise EnvironmentUnsupportedError(
                f"{device}: there are {torch.cuda.device_count()} CUDA devices; name another"
            )
        self.capability = torch.cuda.get_device_capability(self.device)
        self.multiprocessors = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._compiler, self._target = compiler_for(self.capability, compilers())
        self._folder = folder or cache_folder()
        self._library = _library()
        self._launch, self.stream = _launching(self._library), _current_stream(self.device)
        self._lock = threading.Lock()  # over the two tables
        self._modules: dict[SourceUnit, ctypes.c_void_p] = {}
        self._functions: dict[str, int] = {}
        self._here = threading.local()
        self._takes_graphs = environment.wants_cuda_graphs()
        self._gone: deque[tuple[int | None, int | None]] = deque()  # graphs to destroy
        context, number = ctypes.c_void_p(), ctypes.c_int()
        self._check(self._library.cuDeviceGet(ctypes.byref(number), self.device.index), "finding the device")
        retain = self._library.cuDevicePrimaryCtxRetain  # torch's own context, which it keeps until the process ends
        self._check(retain(ctypes.byref(context), number), "opening the device")
        self._context = context.value

    def address(self, tensor: Tensor) -> int:
        """Where a kernel finds the tensor's bytes.

        Raises:
            UsageError: it cannot reach them.
        """
        if tensor.device == self.device:
            return tensor.data_ptr()
        if on_gpu(tensor.device):
            raise UsageError(f"a tensor on {tensor.device} for the kernels of {self.device}; move it there")
        if not tensor.numel():
            return 0
        found = ctypes.c_void_p()
        get = self._library.cuPointerGetAttribute
        with self._current():
            code = get(ctypes.byref(found), _DEVICE_POINTER, ctypes.c_uint64(tensor.data_ptr()))
        if code or not found.value:
            raise UsageError(
                f"{tensor.nbytes} bytes of pageable memory, which no kernel can read; pin them, or move them to "
                f"{self.device}"
            )
        return found.value

    def is_near(self, tensor: Tensor) -> bool:
        """Whether the bytes lie in the card's own memory and not across a link."""
        return on_gpu(tensor.device)

    def launch(self, call: Call) -> None:
        """Enqueue a call; what it reads and writes is in use until the stream has got there."""
        with self._current():
            self._launch_each((Bound(call, self.stream()),))

    def run(self, run: Run) -> None:
        """Enqueue calls one after another, on the stream that they were made ready for.

        They are one CUDA graph from the third time on, unless the stream is being captured (no graph can be launched
        into a capture), the half has as many as it may have, or TIERCACHE_CUDA_GRAPHS is 0. No two threads may be at
        one run.
        """
        with self._current() as here:
            if run.graph is None and not (self._takes_graphs and run.siblings is not None):
                self._launch_each(run.calls)
                return
            captured = self._is_captured(run.stream, here)
            if run.graph is not None and not captured:
                code = run.graph.launch()
                if code:
                    self._check(code, f"launching a graph from {run.calls[0].call.kernel} on")
                return
            self._launch_each(run.calls)
            if not captured:
                run.launches += 1
                if run.launches >= _BEFORE_A_GRAPH and len(run.siblings or ()) < GRAPHS_OF_A_HALF:
                    self._make_graph(run)

    def _is_captured(self, stream: int, here: ThreadContext) -> bool:
        """Whether calls on the stream become part of a graph of somebody else's; the context is current."""
        return bool(self._library.cuStreamIsCapturing(stream, here.status_at) or here.status.value)

    def _launch_each(self, calls: Sequence[Bound]) -> None:
        """Call by call; the context is current."""
        launch = self._launch
        for each in calls:
            if each.function is None:
                each.function = self._functions.get(each.call.kernel) or self._function(each.call.kernel)
            code = launch(each.config, each.function, each.packed, None)
            if code:
                self._check(code, f"launching {each.call.kernel} on a grid of {each.call.grid}")

    def _make_graph(self, run: Run) -> None:
        """Of a run that was launched before; the context is current, and nothing is captured."""
        self._destroy(None, None)  # what could not be destroyed before
        assert run.siblings is not None
        try:
            run.graph = Graph(self._library, run, self._check_graph, self._destroy)
            run.siblings.add(run.graph)
        except MemoryError:
            self._takes_graphs = False
            note(
                f"{self.device} has no memory left for CUDA graphs: kernels are launched one by one, which takes the "
                "processor longer; give a smaller hbm"
            )

    def _check_graph(self, code: int, doing: str) -> None:
        if code == _OUT_OF_MEMORY:
            raise MemoryError(doing)
        self._check(code, doing)

    def _destroy(self, executable: int | None, graph: int | None) -> None:
        """Destroy a graph that nobody can launch any more, after launches that are under way.

        In a thread that captures, which a call like that would spoil, later.
        """
        self._gone.append((executable, graph))
        with self._current() as here, suppress(IndexError):
            while not self._is_captured(self.stream(), here):
                executable, graph = self._gone.popleft()  # until there are none, whoever takes them
                if executable:
                    self._library.cuGraphExecDestroy(executable)
                if graph:
                    self._library.cuGraphDestroy(graph)

    def _function(self, kernel: str) -> int:
        """The kernel's handle; the context is current."""
        with self._lock:
            if kernel not in self._functions:
                unit = SourceUnit.of(kernel)
                if unit not in self._modules:
                    code = image(unit, self._compiler, self._target, self._folder)
                    module = ctypes.c_void_p()
                    loaded = self._library.cuModuleLoadData(ctypes.byref(module), code)
                    self._check(loaded, f"loading {unit.file} for {self._target} (kept in {self._folder}: empty it)")
                    self._modules[unit] = module
                function = ctypes.c_void_p()
                get = self._library.cuModuleGetFunction
                self._check(get(ctypes.byref(function), self._modules[unit], kernel.encode()), f"finding {kernel}")
                self._functions[kernel] = function.value or 0
            return self._functions[kernel]

    def _current(self) -> ThreadContext:
        """The device's context is this thread's, within."""
        here: ThreadContext | None = getattr(self._here, "here", None)
        if here is None:
            here = self._here.here = ThreadContext(self._library, self._context, self._check)
        return here

    def _check(self, code: int, doing: str) -> None:
        if code:
            said = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(said))
            what = (said.value or b"unknown").decode()
            raise EnvironmentUnsupportedError(
                f"CUDA driver error {code} ({what}) {doing}; `tiercache doctor` looks into it"
            )


def _library() -> ctypes.CDLL:
    """The driver's library, with a signature where ctypes would guess wrong."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise EnvironmentUnsupportedError(f"no CUDA driver ({error}); install NVIDIA's") from error
    code = library.cuInit(0)
    if code:
        raise EnvironmentUnsupportedError(f"the CUDA driver does not start (error {code}); see nvidia-smi")
    by_reference, address = ctypes.c_void_p, ctypes.c_uint64
    for name, kinds in {
        "cuDeviceGet": (by_reference, ctypes.c_int),
        "cuDevicePrimaryCtxRetain": (by_reference, ctypes.c_int),
        "cuCtxGetCurrent": (by_reference,),
        "cuCtxPushCurrent_v2": (_POINTER,),
        "cuCtxPopCurrent_v2": (by_reference,),
        "cuGetErrorString": (ctypes.c_int, by_reference),
        "cuPointerGetAttribute": (by_reference, ctypes.c_int, address),
        "cuModuleLoadData": (by_reference, ctypes.c_char_p),
        "cuModuleGetFunction": (by_reference, _POINTER, ctypes.c_char_p),
        "cuLaunchKernel": (_POINTER, *[_NUMBER] * 7, *[_POINTER] * 3),
        "cuStreamIsCapturing": (_POINTER, by_reference),
        "cuGraphCreate": (by_reference, _NUMBER),
        "cuGraphAddKernelNode": (by_reference, _POINTER, by_reference, ctypes.c_size_t, by_reference),
        "cuGraphInstantiateWithFlags": (by_reference, _POINTER, ctypes.c_uint64),
        "cuGraphExecKernelNodeSetParams": (_POINTER, _POINTER, by_reference),
        "cuGraphLaunch": (_POINTER, _POINTER),
        "cuGraphExecDestroy": (_POINTER,),
        "cuGraphDestroy": (_POINTER,),
    }.items():
        if not hasattr(library, name):
            raise EnvironmentUnsupportedError(
                f"the CUDA driver lacks {name}: it is older than CUDA 11.4; install a newer"
            )
        getattr(library, name).argtypes = kinds
    return library


def _launching(library: ctypes.CDLL) -> Callable[..., int]:
    """cuLaunchKernelEx, which has four arguments to pack and not eleven; for drivers before CUDA 11.8 what it does."""
    if hasattr(library, "cuLaunchKernelEx"):
        library.cuLaunchKernelEx.argtypes = [_POINTER] * 4
        launch: Callable[..., int] = library.cuLaunchKernelEx
        return launch

    def unpacked(config: int, function: int, packed: int, extra: None) -> int:
        c = LaunchConfig.from_address(config)
        sizes = c.x, c.y, c.z, c.threads, c.threads_y, c.threads_z, c.shared_bytes
        return int(library.cuLaunchKernel(function, *sizes, c.stream, packed, extra))

    return unpacked


def _current_stream(device: torch.device) -> Callable[[], int]:
    """What gives the handle of torch's current stream on the device."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # what torch's own compiler calls: no objects made
    if raw is not None:
        return partial(raw, device.index)
    return lambda: int(torch.cuda.current_stream(device).cuda_stream)
