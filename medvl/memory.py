"""How this process asks the system for memory."""

from __future__ import annotations

import ctypes
import sys

MALLOC_OPTIONS = {-4: 0, -1: -1}
"""glibc's M_MMAP_MAX and M_TRIM_THRESHOLD, malloc.h: nothing is mapped by itself, and nothing is handed back before the process ends."""


def keep_freed_memory() -> bool:
    """From here on large blocks that are freed are used again, where the C library is glibc; whether it is.

    By default a block of more than 32 MiB is mapped when it is taken and unmapped when it is freed, and the system clears every page of
    it each time. Towers on a CPU take and free the same large blocks in every step; on volumes that cost more than their convolutions.
    The process never becomes smaller than it was at its largest: meant for those that train, and for workers.
    """
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return False
    taken = [libc.mallopt(option, value) for option, value in MALLOC_OPTIONS.items()]
    return all(taken)
