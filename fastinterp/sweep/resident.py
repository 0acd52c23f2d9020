"""Resident memory: what this process has freed, given back to the system."""

import ctypes
import math
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

# Made once: every new path adds to the interpreter's table of strings, which grows by megabytes in a long sweep.
_STATM = Path("/proc/self/statm")


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


class Resident:
    """Keeps what is resident near what is allocated, where that is on the C library's heap.

    Giving freed memory back takes time, and so do the new pages that are needed then: it is done when what is resident
    has grown by ``allowed_bytes``, and not before (None: never).
    """

    def __init__(self, device: torch.device, allowed_bytes: int | None) -> None:
        """Counts from here."""
        self._device = device
        self._allowed_bytes = allowed_bytes if device.type == "cpu" and _trim() is not None else None
        self._most = math.inf
        self._count()

    def check(self) -> None:
        """To be called where little is allocated."""
        if self._allowed_bytes is None or (_resident_bytes() or 0) <= self._most:
            return
        give_back(self._device)
        self._count()

    def _count(self) -> None:
        now = None if self._allowed_bytes is None else _resident_bytes()
        if now is None or self._allowed_bytes is None:
            self._allowed_bytes = None
        else:
            self._most = now + self._allowed_bytes


def _resident_bytes() -> int | None:
    """What is resident of this process, on a Linux system; None where it does not say."""
    try:
        pages = int(_STATM.read_bytes().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
