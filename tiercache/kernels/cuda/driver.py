"""Launches compiled kernels through CUDA's driver, on torch's current stream.

Knows the driver's interface and torch's streams; nothing of planes. No CUDA toolkit is needed: the driver brings
libcuda, and NVRTC (`nvrtc.py`) the compiler.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from tiercache.errors import EnvironmentUnsupportedError, UsageError
from tiercache.kernels.cuda.launches import Call
from tiercache.kernels.cuda.nvrtc import SourceUnit, cache_folder, compiler_for, compilers, image
from tiercache.tiers.device import on_gpu

_DEVICE_POINTER = 3  # CU_POINTER_ATTRIBUTE_DEVICE_POINTER


class Driver:
    """Runs calls. Kernels are compiled, or taken from the disk, when first launched.

    *Ordering*: all calls go to the stream that is torch's current one when they are launched, and overtake nothing
    there. Host memory handed to a call is read later: its owner keeps it locked and unchanged until that stream has
    passed the call.

    Attributes:
        device: the CUDA device.
        capability: the card's compute capability.
        multiprocessors: how many it has.

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
        self._lock = threading.Lock()  # over the two tables
        self._modules: dict[SourceUnit, ctypes.c_void_p] = {}
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._context = ctypes.c_void_p()
        number = ctypes.c_int()
        self._check(self._library.cuDeviceGet(ctypes.byref(number), self.device.index), "finding the device")
        retain = self._library.cuDevicePrimaryCtxRetain  # torch's own context, which it keeps until the process ends
        self._check(retain(ctypes.byref(self._context), number), "opening the device")

    def address(self, tensor: Tensor) -> int:
        """Where a kernel finds the tensor's bytes.

        Raises:
            UsageError: it cannot reach them.
        """
        if on_gpu(tensor.device):
            if tensor.device != self.device:
                raise UsageError(f"a tensor on {tensor.device} for the kernels of {self.device}; move it there")
            return tensor.data_ptr()
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
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        packed = (ctypes.c_void_p * 1)(ctypes.addressof(call.arguments))  # the driver copies it before it returns
        with self._current():
            function = self._function(call.kernel)
            code = self._library.cuLaunchKernel(
                function, *call.grid, call.threads, 1, 1, call.shared_bytes, stream, packed, None
            )
        self._check(code, f"launching {call.kernel} on a grid of {call.grid}")

    def _function(self, kernel: str) -> ctypes.c_void_p:
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
                self._functions[kernel] = function
            return self._functions[kernel]

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The device's context is this thread's: a fresh thread has none until torch has worked in it."""
        self._check(self._library.cuCtxPushCurrent_v2(self._context), "entering the device")
        try:
            yield
        finally:
            self._library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))

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
    numbers = [ctypes.c_uint] * 7
    library.cuLaunchKernel.argtypes = [ctypes.c_void_p, *numbers, *[ctypes.c_void_p] * 3]
    return library
