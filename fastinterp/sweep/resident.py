"""Resident memory: what this process has freed, given back to the system."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache

import torch


@cache
def _trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # A C library other than glibc.
        return None
    found.argtypes = [ctypes.c_size_t]
    return found


def give_back(device: torch.device) -> None:
    """Gives freed memory of the C library's heap back to the system, where the tensors of ``device`` are on that heap.

    glibc keeps freed blocks of up to 32 MB for later; what the next part of a job needs seldom fits between them, so
    that resident memory grows with every part. Nothing happens where the C library has no such call.
    """
    trim = _trim()
    if device.type == "cpu" and trim is not None:
        trim(0)
