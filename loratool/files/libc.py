"""The C library's calls that do not hold Python's lock, while their equals in Python do."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


@cache
def libc() -> Any:
    """The C library of Linux; None where it is another one."""
    if sys.platform != "linux":
        return None
    found = ctypes.CDLL(None, use_errno=True)
    found.mmap.restype = ctypes.c_void_p
    found.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
    found.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    found.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    found.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return found


def same(left: bytearray | memoryview, right: bytearray | memoryview, nbytes: int) -> bool:
    """Whether the first `nbytes` of both are the same; other threads go on meanwhile."""
    system = libc()
    if system is None:
        return memoryview(left)[:nbytes] == memoryview(right)[:nbytes]
    views = [(ctypes.c_char * nbytes).from_buffer(one) for one in (left, right)]
    return bool(system.memcmp(*views, nbytes) == 0)
