"""The device's context in each thread: a fresh thread has none until torch has worked in it. Knows the driver alone."""

from __future__ import annotations

import ctypes
from collections.abc import Callable


class ThreadContext:
    """Enters the device's context, in a `with`, where it is not the thread's already. Each thread has one of its own.

    No `contextmanager`, which would take longer than a launch.

    Args:
        library: the driver's.
        context: the handle of the device's context.
        check: raises for a code of the driver's that is not 0; is told what was done.

    Attributes:
        status, status_at: what a call of the driver may write a number into, and its address.
    """

    def __init__(self, library: ctypes.CDLL, context: int | None, check: Callable[[int, str], None]) -> None:
        self._library, self._context, self._check = library, context, check
        self._found, self._popped, self.status = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
        self._found_at, self._popped_at = ctypes.addressof(self._found), ctypes.addressof(self._popped)
        self.status_at = ctypes.addressof(self.status)
        self._entered: list[bool] = []

    def __enter__(self) -> ThreadContext:
        self._library.cuCtxGetCurrent(self._found_at)
        outside = self._found.value != self._context
        if outside:
            self._check(self._library.cuCtxPushCurrent_v2(self._context), "entering the device")
        self._entered.append(outside)
        return self

    def __exit__(self, *raised: object) -> None:
        if self._entered.pop():
            self._library.cuCtxPopCurrent_v2(self._popped_at)
